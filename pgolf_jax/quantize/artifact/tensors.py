"""The stored forms of a parameter, how each becomes fp32 weights again, and how banks are taken apart and put together.

Weights have the same bits on every machine.

Only NumPy's elementwise IEEE arithmetic is used: a matrix product may fuse or reorder its sums, so its last bit depends
on the machine. M outputs, N inputs, R rank.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping

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


# The matrices of each bank in the order of its first axis, every layer of the first before any of the second.
BANKS = {
  "qo_bank": ("attn.c_q.weight", "attn.proj.weight"),
  "kv_bank": ("attn.c_k.weight", "attn.c_v.weight"),
  "mlp_up_bank": ("mlp.fc.weight",),
  "mlp_down_bank": ("mlp.proj.weight",),
}
_SUFFIXES = {suffix for suffixes in BANKS.values() for suffix in suffixes}
_IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def unbank(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns flat parameters with every bank taken apart into `blocks.{i}.…` matrices, the rest unchanged.

  The banks' matrices come first, layer by layer, then the other parameters as given. The order decides ties in the
  choice of AWQ groups and LQER matrices: the earlier one wins.
  """
  matrices = {}
  for bank, suffixes in BANKS.items():
    if bank not in params:
      continue
    layers = len(params[bank]) // len(suffixes)
    for i in range(layers):
      for half, suffix in enumerate(suffixes):
        matrices[f"blocks.{i}.{suffix}"] = params[bank][half * layers + i]
  return matrices | {name: value for name, value in params.items() if name not in BANKS}


def rebank(names: Collection[str], value: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the parameters that `unbank` took apart, holding only one matrix beside the banks at a time.

  Args:
    names: of all matrices and parameters.
    value: returns the matrix of a name; called once for each.

  Raises:
    KeyError: a bank lacks a matrix.
    ValueError: a bank's matrices differ in shape.
  """
  layers = 1 + max((int(match[1]) for name in names if (match := _IN_BLOCK.fullmatch(name))), default=-1)
  params = {}
  for bank, suffixes in BANKS.items():
    parts = [f"blocks.{i}.{suffix}" for suffix in suffixes for i in range(layers)]
    if not any(name in names for name in parts):
      continue
    if missing := [name for name in parts if name not in names]:
      raise KeyError(missing[0])
    for i, name in enumerate(parts):
      matrix = value(name)
      if i == 0:
        params[bank] = np.empty((len(parts), *matrix.shape), matrix.dtype)
      if matrix.shape != params[bank].shape[1:]:
        raise ValueError(f"{name} is {matrix.shape}, {parts[0]} {params[bank].shape[1:]}")
      params[bank][i] = matrix
      del matrix  # before the next one is made
  return params | {name: value(name) for name in names if not _in_a_bank(name)}


def kind(name: str) -> str:
  """Returns the name without its layer: matrices of one kind share statistics and, in the artifact, a stream."""
  match = _IN_BLOCK.fullmatch(name)
  return match[2] if match else name


def _in_a_bank(name: str) -> bool:
  return kind(name) != name and kind(name) in _SUFFIXES
