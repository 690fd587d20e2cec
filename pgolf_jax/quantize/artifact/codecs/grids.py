"""The entropy model of quantised matrices: a low-rank mean, and noise around it whose width depends on row and column.

A trained matrix on the grids of its rows is close to rounded normal noise. Its width differs from column to column
(inputs differ in size) and sometimes from row to row. An embedding also has a mean that few directions explain: its
rows drift together, and tokens that never occurred stay together. A matrix is therefore stored as the factors of its
mean, the width classes of its columns and rows, and its integers under the laws that these select. M rows, N columns,
R rank.

Reading a mean is whole-number arithmetic, done in float64 where that is exact (products and sums below 2^53, in any
order), so every machine computes the same one.
"""

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from pgolf_jax.errors import ArtifactError
from pgolf_jax.quantize.artifact.codecs import ans
from pgolf_jax.quantize.artifact.codecs.ans import (
  CENTRE,
  CLASSES,
  PHASE_BITS,
  PHASES,
  SHAPES,
  SLAB,
  STEPS,
  Distribution,
  Reader,
  Writer,
  distribution,
  joined,
  parts,
  put_counted,
  take_counted,
)

ROW_STEP = 2  # row classes are multiples of this many width classes
MAX_RANK = 16
LEAST_SIDE = 2 * MAX_RANK  # rows and columns of a matrix that may have a mean
B_LIMIT = 2**10 - 1
FACTOR_BITS = 16  # fraction bits of the factor from A·B to the mean
_WORD = distribution(np.ones(1 << 16))

_COEFFICIENT_BITS = 8  # of A's coefficients, coded under counts; lower bits are stored as they are
_MAX_SHIFT = 7
_BASIS = distribution(ans.weights(CENTRE + 3 * STEPS, 0, 0, -B_LIMIT, B_LIMIT))
_ROW_CENTRE = 128  # row classes are stored as 0 … 255
_CELL = 1 << 20  # values
_MOST_MEAN = 1 << 24  # with scales
_FREE_CELLS, _VALUES_PER_CELL = 1 << 14, 1 << 8  # of a stream; a trained model has thousands of values to a cell
_REACH = 255  # of an integer less its mean: −128 … 127 less −127 … 127


@dataclasses.dataclass(frozen=True)
class Mean:
  """mean_MxN = A·B · factor / 2^16 in units of 1/PHASES; of the transposed matrix where `flipped`.

  With scales it is A·B times those of a value's row and column, which hold the factor, and may be of any size.
  """

  a_MxR: np.ndarray  # int32
  b_RxN: np.ndarray  # int32
  factor: int
  flipped: bool
  scales: tuple[np.ndarray, np.ndarray] | None = None  # float64 [M], [N]

  @property
  def rank(self) -> int:
    return self.b_RxN.shape[0]

  def leading(self, rank: int) -> "Mean":
    """Returns the mean of the first directions only."""
    return dataclasses.replace(self, a_MxR=self.a_MxR[:, :rank], b_RxN=self.b_RxN[:rank])

  def phases(self, row=slice(None), column=slice(None)) -> np.ndarray:
    """Returns a part of the mean, int32 [columns, rows], in units of 1/PHASES.

    Args:
      row, column: indices of the part.
    """
    left, right = (column, row) if self.flipped else (row, column)
    a_MxR, b_RxN = self.a_MxR[left], self.b_RxN[:, right].astype(np.float64)
    if self.scales is not None:
      scale_M, scale_N = (scale[part] for scale, part in zip(self.scales, (row, column), strict=True))
      scale_M, scale_N = (scale_N, scale_M) if self.flipped else (scale_M, scale_N)
    mean_MxN = np.empty((a_MxR.shape[0], b_RxN.shape[1]), np.int32)
    rows = max(1, SLAB // max(1, b_RxN.shape[1]))
    for first in range(0, len(mean_MxN), rows):  # a slab at a time, for the memory that wide types take
      slab = slice(first, first + rows)
      product = np.matmul(a_MxR[slab].astype(np.float64), b_RxN)
      if self.scales is None:
        product = (product.astype(np.int64) * self.factor + (1 << (FACTOR_BITS - 1))) >> FACTOR_BITS
        mean_MxN[slab] = np.clip(product, -127 * PHASES, 127 * PHASES)
      else:  # single operations of IEEE arithmetic, in this order
        product *= scale_M[slab, None]
        product *= scale_N
        mean_MxN[slab] = np.clip(np.rint(product), -_MOST_MEAN * PHASES, _MOST_MEAN * PHASES)
    return mean_MxN if self.flipped else mean_MxN.T


@dataclasses.dataclass(frozen=True)
class Model:
  """What a matrix is coded under."""

  mean: Mean | None
  column_N: np.ndarray  # int32, width class of each column
  row_M: np.ndarray  # int32, in units of ROW_STEP, added to the column's class

  @property
  def rank(self) -> int:
    return 0 if self.mean is None else self.mean.rank


@dataclasses.dataclass(frozen=True)
class _Laws:
  """The distributions of one stream: a shape for all of it, and the range of its values less their means."""

  shape: int
  low: int
  high: int

  def of(self, width: int, phase: int) -> Distribution:
    return _distribution(width, self.shape, phase, self.low, self.high)


@functools.lru_cache(maxsize=1024)
def _distribution(*law: int) -> Distribution:
  return distribution(ans.weights(*law))


def put_grids(writer: Writer, arrays: Sequence[np.ndarray], models: Sequence[Model]) -> None:
  """Writes int8 matrices: the range and shape of the laws, the classes of all, then the mean and values of each."""
  _check_cells([q.shape for q in arrays], [m.column_N for m in models], [m.row_M for m in models])
  pieces = [list(_pieces(q, model)) for q, model in zip(arrays, models, strict=True)]
  low = min((int(v.min()) for p in pieces for *_, v in p if len(v)), default=0)
  high = max((int(v.max()) for p in pieces for *_, v in p if len(v)), default=0)
  high = max(high, low + 1)  # the coder has no alphabets of one symbol
  stream = _Laws(_best_shape((piece for p in pieces for piece in p), low, high), low, high)
  for value in (stream.shape, low + _REACH, high + _REACH):
    writer.put(np.array([value]), _WORD)
  put_counted(writer, np.array([model.rank for model in models], np.int32), MAX_RANK + 1)
  put_counted(writer, joined([model.column_N for model in models]), CLASSES)
  put_counted(writer, joined([model.row_M for model in models]) + _ROW_CENTRE, 2 * _ROW_CENTRE)
  for model, matrix_pieces in zip(models, pieces, strict=True):
    if model.mean is not None:
      put_mean(writer, model.mean)
    for width, phase, values in matrix_pieces:
      writer.put(values - low, stream.of(width, phase))


def take_grids(reader: Reader, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
  """Reads what `put_grids` wrote. Raises ArtifactError on what it cannot have written."""
  shape, low, high = (int(reader.take(1, _WORD)[0]) for _ in range(3))
  stream = _Laws(shape, low - _REACH, high - _REACH)
  if shape >= len(SHAPES) or not stream.low < stream.high <= _REACH + 1:
    raise ArtifactError("A stream of the artifact names a distribution that does not exist: it is damaged.")
  ranks = take_counted(reader, len(shapes), MAX_RANK + 1).tolist()
  columns = parts(take_counted(reader, sum(n for _, n in shapes), CLASSES), [(n,) for _, n in shapes])
  rows = take_counted(reader, sum(m for m, _ in shapes), 2 * _ROW_CENTRE)
  rows -= _ROW_CENTRE
  rows = parts(rows, [(m,) for m, _ in shapes])
  _check_cells(shapes, columns, rows)
  matrices = []
  for size, rank, column_N, row_M in zip(shapes, ranks, columns, rows, strict=True):
    model = Model(take_mean(reader, size, rank) if rank else None, column_N, row_M)
    matrices.append(_take_grid(reader, model, stream))
  return matrices


def _check_cells(shapes: Sequence[tuple[int, ...]], columns: Sequence[np.ndarray], rows: Sequence[np.ndarray]) -> None:
  """Raises ArtifactError if matrices have so many cells of different width that reading them would take minutes."""
  cells = sum(len(np.unique(column_N)) * len(np.unique(row_M)) for column_N, row_M in zip(columns, rows, strict=True))
  most = _FREE_CELLS + sum(map(math.prod, shapes)) // _VALUES_PER_CELL
  if cells > most:
    raise ArtifactError(f"A stream of the artifact has {cells} width classes where at most {most} are allowed.")


def _cells(model: Model) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
  """Yields (rows, columns, width class) of submatrices of one class that together cover the matrix, in a fixed order.

  No cell is much larger than `_CELL`, whatever the classes, which bounds the memory that coding one takes.
  """
  rows = [(int(r), np.flatnonzero(model.row_M == r)) for r in np.unique(model.row_M)]
  columns = [(int(c), np.flatnonzero(model.column_N == c)) for c in np.unique(model.column_N)]
  for r, row in rows:
    for c, column in columns:
      slab = max(1, _CELL // len(row))
      for first in range(0, len(column), slab):
        yield row, column[first : first + slab], min(max(c + ROW_STEP * r, 0), CLASSES - 1)


def _pieces(q_MxN: np.ndarray, model: Model) -> Iterator[tuple[int, int, np.ndarray]]:
  """Yields (width class, phase, values less the whole part of their mean) in the order in which they are stored."""
  for row, column, width in _cells(model):
    # By column, as the columns' classes come.
    part = q_MxN.T[np.ix_(column, row)].astype(np.int32).reshape(-1)
    if model.mean is None:
      yield width, 0, part
      continue
    mean = model.mean.phases(row, column).reshape(-1)
    for phase in range(PHASES):
      chosen = (mean & (PHASES - 1)) == phase
      yield width, phase, part[chosen] - (mean[chosen] >> PHASE_BITS)


def _take_grid(reader: Reader, model: Model, stream: _Laws) -> np.ndarray:
  q_NxM = np.zeros((len(model.column_N), len(model.row_M)), np.int8)
  for row, column, width in _cells(model):
    if model.mean is None:
      part = reader.take(len(column) * len(row), stream.of(width, 0)) + stream.low
    else:
      mean = model.mean.phases(row, column).reshape(-1)
      part = mean >> PHASE_BITS
      for phase in range(PHASES):
        chosen = (mean & (PHASES - 1)) == phase
        part[chosen] += reader.take(int(chosen.sum()), stream.of(width, phase)) + stream.low
    if not -128 <= part.min() <= part.max() <= 127:
      raise ArtifactError("A stream of the artifact holds integers of more than 8 bits: it is damaged.")
    q_NxM[np.ix_(column, row)] = part.reshape(len(column), len(row))
  return np.ascontiguousarray(q_NxM.T)


def _best_shape(pieces: Iterable[tuple[int, int, np.ndarray]], low: int, high: int) -> int:
  """Returns the shape of law under which the pieces take the fewest bits."""
  counts = defaultdict(lambda: np.zeros(high - low + 1, np.int64))
  for width, phase, values in pieces:
    counts[width, phase] += np.bincount(values - low, minlength=high - low + 1)

  def bits(shape: int) -> float:
    total = 0.0
    for (width, phase), count in counts.items():
      weights = ans.weights(width, shape, phase, low, high)
      total -= float(np.sum(count * np.log2(weights / weights.sum())))
    return total

  return min(range(len(SHAPES)), key=bits)


def put_mean(writer: Writer, mean: Mean) -> None:
  """Writes a mean."""
  for word in (int(mean.flipped), mean.factor >> 16, mean.factor & 0xFFFF):
    writer.put(np.array([word]), _WORD)
  for coefficients in mean.a_MxR.T:
    _put_coefficients(writer, coefficients)
  writer.put(mean.b_RxN + B_LIMIT, _BASIS)


def take_mean(reader: Reader, shape: tuple[int, ...], rank: int) -> Mean:
  """Reads the mean of a matrix of this shape. Raises ArtifactError if such a matrix cannot have one."""
  if min(shape) < LEAST_SIDE:
    raise ArtifactError("A stream of the artifact gives a mean to a matrix too small for it: it is damaged.")
  flipped, high, low = (int(reader.take(1, _WORD)[0]) for _ in range(3))
  tall, wide = shape[::-1] if flipped else shape
  a_MxR = np.empty((tall, rank), np.int32)
  for r in range(rank):
    a_MxR[:, r] = _take_coefficients(reader, tall)
  b_RxN = reader.take(rank * wide, _BASIS).reshape(rank, wide) - B_LIMIT
  return Mean(a_MxR, b_RxN, high << 16 | low, bool(flipped))


def _put_coefficients(writer: Writer, values: np.ndarray) -> None:
  """Writes whole numbers below 2^15 in size: the lowest bits as they are, the rest under counts."""
  shift = max(0, int(np.abs(values).max(initial=0)).bit_length() - _COEFFICIENT_BITS)
  high = values >> shift
  low, top = int(high.min(initial=0)), int(high.max(initial=0))
  for word in (shift, low + 256, top + 256):
    writer.put(np.array([word]), _WORD)
  put_counted(writer, high - low, top - low + 2)
  if shift:
    writer.put(values & ((1 << shift) - 1), distribution(np.ones(1 << shift)))


def _take_coefficients(reader: Reader, count: int) -> np.ndarray:
  shift, low, top = (int(reader.take(1, _WORD)[0]) for _ in range(3))
  if shift > _MAX_SHIFT or not low <= top <= 512:
    raise ArtifactError("A stream of the artifact names a distribution that does not exist: it is damaged.")
  values = (take_counted(reader, count, top - low + 2).astype(np.int32) + (low - 256)) << shift
  return values | reader.take(count, distribution(np.ones(1 << shift))) if shift else values
