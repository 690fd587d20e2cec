"""The stored forms of a parameter, and how each becomes fp32 weights again, with the same bits on every machine.

Only NumPy's elementwise IEEE arithmetic is used: a matrix product may fuse or reorder its sums, so its last bit depends
on the machine. M outputs, N inputs, R rank.
"""

import dataclasses

import numpy as np

_SLAB = 1 << 18  # values of a product worked on at a time


@dataclasses.dataclass(frozen=True)
class Half:
  """A parameter kept as fp16, of any shape."""

  values: np.ndarray  # float16

  def dequantize(self) -> np.ndarray:
    return self.values.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Rows:
  """Integers with one fp16 step per row, the form of attention gates."""

  q_MxN: np.ndarray  # int8
  step_M: np.ndarray  # float16

  def dequantize(self) -> np.ndarray:
    return self.q_MxN.astype(np.float32) * self.step_M.astype(np.float32)[:, None]


@dataclasses.dataclass(frozen=True)
class LowRank:
  """A correction A·B that is added to a matrix on its grids (LQER); both factors are integers with fp16 steps.

  A has one step per row, or a single one. The flattened B is cut into `b_step.size` pieces of equal length, a row or a
  group each, with one step per piece.
  """

  a_MxR: np.ndarray  # int8
  a_step: np.ndarray  # float16 [M] or [1]
  b_RxN: np.ndarray  # int8
  b_step: np.ndarray  # float16 [R] or [R·N / group]

  def a(self) -> np.ndarray:
    return self.a_MxR.astype(np.float32) * self.a_step.astype(np.float32)[:, None]

  def b(self) -> np.ndarray:
    groups = self.b_RxN.reshape(self.b_step.size, -1).astype(np.float32)
    return (groups * self.b_step.astype(np.float32)[:, None]).reshape(self.b_RxN.shape)

  def dequantize(self) -> np.ndarray:
    a_MxR, b_RxN = self.a(), self.b()
    total_MxN = np.zeros((a_MxR.shape[0], b_RxN.shape[1]), np.float32)
    rows = max(1, _SLAB // b_RxN.shape[1])
    for first in range(0, len(total_MxN), rows):
      slab = slice(first, first + rows)
      # Each rank is added in float64 and the sum rounded to float32, as a fused multiply-add does.
      for r in range(b_RxN.shape[0]):
        product = np.multiply.outer(a_MxR[slab, r].astype(np.float64), b_RxN[r].astype(np.float64))
        total_MxN[slab] = total_MxN[slab] + product
    return total_MxN


@dataclasses.dataclass(frozen=True)
class Grid:
  """A matrix on the grids of its rows (GPTQ): q · step, with a finer step for the columns of some groups (AWQ)."""

  q_MxN: np.ndarray  # int8
  step_M: np.ndarray  # float16
  fine_starts: tuple[int, ...] = ()  # first column of each group with the finer step
  fine_size: int = 0  # columns in such a group
  fine_step_M: np.ndarray | None = None  # float16; None without such groups
  low_rank: LowRank | None = None

  def dequantize(self) -> np.ndarray:
    weight_MxN = self.q_MxN.astype(np.float32)
    weight_MxN *= self.step_M.astype(np.float32)[:, None]
    for start in self.fine_starts:
      columns = slice(start, start + self.fine_size)
      weight_MxN[:, columns] = self.q_MxN[:, columns] * self.fine_step_M.astype(np.float32)[:, None]
    if self.low_rank is not None:
      weight_MxN += self.low_rank.dequantize()
    return weight_MxN


Quantized = Half | Rows | Grid
