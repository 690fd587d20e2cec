"""The stored forms of a parameter, how each becomes fp32 weights again, and how banks are taken apart and put together.

Weights have the same bits on every machine.

Only NumPy's elementwise IEEE arithmetic is used: a matrix product may fuse or reorder its sums, so its last bit depends
on the machine. M outputs, N inputs, R rank.
"""

import abc
import dataclasses
import re
from collections.abc import Iterator, Mapping

import numpy as np

from pgolf_jax.quantize.artifact.codecs.trellis import matrix_parities

_SLAB = 1 << 18  # values of a product worked on at a time


class Stored(abc.ABC):
  """A parameter in its stored form."""

  @property
  @abc.abstractmethod
  def shape(self) -> tuple[int, ...]:
    """Shape of the weights."""

  @abc.abstractmethod
  def write_to(self, out: np.ndarray) -> None:
    """Writes the fp32 weights to `out`; beside it only a slab of them is held."""

  def dequantize(self) -> np.ndarray:
    """Returns the fp32 weights."""
    out = np.empty(self.shape, np.float32)
    self.write_to(out)
    return out


@dataclasses.dataclass(frozen=True)
class Half(Stored):
  """A parameter kept as fp16, of any shape."""

  values: np.ndarray  # float16

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape

  def write_to(self, out: np.ndarray) -> None:
    out[...] = self.values


@dataclasses.dataclass(frozen=True)
class Rows(Stored):
  """Integers with one fp16 step per row, the form of attention gates."""

  q_MxN: np.ndarray  # int8
  step_M: np.ndarray  # float16

  @property
  def shape(self) -> tuple[int, ...]:
    return self.q_MxN.shape

  def write_to(self, out: np.ndarray) -> None:
    out[...] = self.q_MxN
    out *= self.step_M.astype(np.float32)[:, None]


@dataclasses.dataclass(frozen=True)
class LowRank(Stored):
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

  @property
  def shape(self) -> tuple[int, ...]:
    return (self.a_MxR.shape[0], self.b_RxN.shape[1])

  def write_to(self, out: np.ndarray) -> None:
    a_MxR, b_RxN = self.a(), self.b()
    for slab in _slabs(self.shape):
      out[slab] = _product(a_MxR[slab], b_RxN)


def _product(a_MxR: np.ndarray, b_RxN: np.ndarray) -> np.ndarray:
  """A·B in fp32: each rank is added in float64 and the sum rounded to float32, as a fused multiply-add does."""
  total_MxN = np.zeros((a_MxR.shape[0], b_RxN.shape[1]), np.float32)
  for a_M, b_N in zip(a_MxR.T, b_RxN, strict=True):
    total_MxN[...] = total_MxN + np.multiply.outer(a_M.astype(np.float64), b_N.astype(np.float64))
  return total_MxN


@dataclasses.dataclass(frozen=True)
class Grid(Stored):
  """A matrix on the grids of its rows (GPTQ): q · step, with a finer step for the columns of some groups (AWQ)."""

  q_MxN: np.ndarray  # int8
  step_M: np.ndarray  # float16
  fine_starts: tuple[int, ...] = ()  # first column of each group with the finer step
  fine_size: int = 0  # columns in such a group
  fine_step_M: np.ndarray | None = None  # float16; None without such groups
  low_rank: LowRank | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    return self.q_MxN.shape

  def write_to(self, out: np.ndarray) -> None:
    step_Mx1 = self.step_M.astype(np.float32)[:, None]
    if self.fine_starts:
      fine_C = np.add.outer(np.array(self.fine_starts), np.arange(self.fine_size)).reshape(-1)
      fine_step_Mx1 = self.fine_step_M.astype(np.float32)[:, None]
    if self.low_rank is not None:
      a_MxR, b_RxN = self.low_rank.a(), self.low_rank.b()
    for slab in _slabs(self.shape):
      weight_MxN = self.q_MxN[slab] * step_Mx1[slab]
      if self.fine_starts:
        weight_MxN[:, fine_C] = self.q_MxN[slab][:, fine_C] * fine_step_Mx1[slab]
      if self.low_rank is not None:
        weight_MxN += _product(a_MxR[slab], b_RxN)
      out[slab] = weight_MxN


OCTAVE = 4
"""Steps of a `LogGrid` for each factor of two."""
MAX_STEP = 200
"""Classes of rows and of columns are at most this in size, so that every weight is finite."""
# 2^(i/4), i = 0 … 3, in float32.
_ROOTS = np.array([1.0, 1.1892071150027210667, 1.4142135623730950488, 1.6817928305074290861], np.float32)


def log_step(classes: np.ndarray) -> np.ndarray:
  """Returns 2^(class / OCTAVE) in fp32, the same bits on every machine."""
  low = int(classes.min(initial=0))
  octave, part = np.divmod(np.arange(low, int(classes.max(initial=0)) + 1), OCTAVE)
  return np.ldexp(_ROOTS[part], octave)[classes - low]


@dataclasses.dataclass(frozen=True)
class LogGrid(Stored):
  """A matrix whose steps are the product of a row's and a column's: q_ij · 2^((row_i + column_j) / OCTAVE).

  Where row and column are under a trellis it is q_ij + parity_ij / 2: the parities follow from the integers above in
  such rows (`parities`), so that each value lies on one of two grids at half their spacing.
  """

  q_MxN: np.ndarray  # int32, below 2^24 in size
  row_M: np.ndarray  # int32
  column_N: np.ndarray  # int32
  trellis_N: np.ndarray | None = None  # bool; both are None if nothing is under a trellis
  trellis_M: np.ndarray | None = None  # bool

  @property
  def shape(self) -> tuple[int, ...]:
    return self.q_MxN.shape

  def write_to(self, out: np.ndarray) -> None:
    rows, columns = self.shape
    width = min(columns, max(1, 4 * _SLAB // rows))  # parities are worked out from the first row to the last
    for column in _slices(columns, width):
      if self.trellis_N is not None:
        parity_MxN = matrix_parities(self.q_MxN[:, column], self.trellis_M, self.trellis_N[column])
      for row in _slices(rows, max(1, _SLAB // width)):
        q_MxN = self.q_MxN[row, column]
        # In fp32 where that holds halves; either way a weight is rounded once.
        value_MxN = q_MxN.astype(np.float32 if np.abs(q_MxN).max(initial=0) < 1 << 22 else np.float64)
        if self.trellis_N is not None:
          value_MxN += parity_MxN[row] * np.float32(0.5)
        out[row, column] = value_MxN * log_step(self.row_M[row][:, None] + self.column_N[column])


@dataclasses.dataclass(frozen=True)
class Even(Stored):
  """A parameter of any shape on one step: q · 2^(step / OCTAVE)."""

  q: np.ndarray  # int32, below 2^24 in size
  step: int

  @property
  def shape(self) -> tuple[int, ...]:
    return self.q.shape

  def write_to(self, out: np.ndarray) -> None:
    step, q, values = log_step(np.array([self.step])), self.q.reshape(-1), out.reshape(-1)
    for part in _slices(len(q), _SLAB):
      values[part] = q[part] * step


def _slabs(shape: tuple[int, int]) -> Iterator[slice]:
  """Yields the rows of a matrix in slices of at most `_SLAB` values, or one row."""
  return _slices(shape[0], max(1, _SLAB // shape[1]))


def _slices(size: int, most: int) -> Iterator[slice]:
  return (slice(first, first + most) for first in range(0, size, most))


Quantized = Half | Rows | Grid | LogGrid | Even


# The matrices of each bank in the order of its first axis, every layer of the first before any of the second.
BANKS = {
  "qo_bank": ("attn.c_q.weight", "attn.proj.weight"),
  "kv_bank": ("attn.c_k.weight", "attn.c_v.weight"),
  "mlp_up_bank": ("mlp.fc.weight",),
  "mlp_down_bank": ("mlp.proj.weight",),
}
_SUFFIXES = {suffix for suffixes in BANKS.values() for suffix in suffixes}
_IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def names_in(bank: str, layers: int) -> list[str]:
  """Returns the matrices of a bank in the order of its first axis."""
  return [f"blocks.{layer}.{suffix}" for suffix in BANKS[bank] for layer in range(layers)]


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


def rebank(tensors: Mapping[str, Stored]) -> dict[str, np.ndarray]:
  """Returns the fp32 parameters that `unbank` took apart, holding no matrix beside the banks.

  Args:
    tensors: all matrices and parameters, by name.

  Raises:
    KeyError: a bank lacks a matrix.
    ValueError: a bank's matrices differ in shape.
  """
  layers = {int(match[1]) for name in tensors if (match := _IN_BLOCK.fullmatch(name))}
  if missing := [i for i in range(len(layers)) if i not in layers]:
    raise KeyError(f"blocks.{missing[0]}")
  params = {}
  for bank in BANKS:
    parts = names_in(bank, len(layers))
    if not any(name in tensors for name in parts):
      continue
    if missing := [name for name in parts if name not in tensors]:
      raise KeyError(missing[0])
    shape = tensors[parts[0]].shape
    for name in parts:
      if tensors[name].shape != shape:
        raise ValueError(f"{name} is {tensors[name].shape}, {parts[0]} {shape}")
    params[bank] = np.empty((len(parts), *shape), np.float32)
    for i, name in enumerate(parts):
      tensors[name].write_to(params[bank][i])
  return params | {name: tensor.dequantize() for name, tensor in tensors.items() if not _in_a_bank(name)}


def kind(name: str) -> str:
  """Returns the name without its layer: matrices of one kind share statistics and, in the artifact, a stream."""
  match = _IN_BLOCK.fullmatch(name)
  return match[2] if match else name


def multiplies(name: str) -> bool:
  """Whether a parameter is a matrix that activations are multiplied by: one of a bank, or the embedding."""
  return name == "tok_emb.weight" or _in_a_bank(name)


def _in_a_bank(name: str) -> bool:
  return kind(name) != name and kind(name) in _SUFFIXES
