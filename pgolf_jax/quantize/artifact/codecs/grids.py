"""The entropy model of quantised matrices: a low-rank mean, and around it a normal law of a width by row and column.

A trained matrix on its rows' grids is close to rounded normal noise. What differs is the width from column to column
(inputs of different size), sometimes from row to row, and, in an embedding, a mean that few directions explain. So a
matrix is stored as: factors of its mean, classes of columns and rows, and the integers under the law that these name.
M rows, N columns, K rank.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from pgolf_jax.errors import ArtifactError
from pgolf_jax.quantize.artifact.codecs import laws, means, widths
from pgolf_jax.quantize.artifact.codecs.ans import Reader, Writer, joined, parts, put_counted, table, take_counted
from pgolf_jax.quantize.artifact.codecs.laws import CLASSES, PHASE_BITS, PHASES, SHAPES
from pgolf_jax.quantize.artifact.codecs.means import B_LIMIT, LEAST_SIDE, RANKS, Mean
from pgolf_jax.quantize.artifact.codecs.widths import ROW_STEP

_ROW_CENTRE = 128  # row classes are stored as 0 … 255
_CELL = 1 << 20  # values
_PATIENCE = 2  # directions that may pass without saving anything
_REACH = 255  # of an integer less its mean, −128 … 127 less −127 … 127
_WORD = table(np.ones(1 << 16))
_BASIS = table(laws.weights(means.BASIS_WIDTH, 0, 0, -B_LIMIT, B_LIMIT))


@dataclasses.dataclass(frozen=True)
class Model:
  mean: Mean | None
  column_N: np.ndarray  # int32, width class of each column
  row_M: np.ndarray  # int32, in units of ROW_STEP, added to the column's class


def _cells(model: Model) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
  """(rows, columns, width class) of submatrices of one class, in a fixed order, together covering the matrix.

  None is much larger than `_CELL`, whatever the classes, so that working on one takes little memory.
  """
  rows = [(int(r), np.flatnonzero(model.row_M == r)) for r in np.unique(model.row_M)]
  columns = [(int(c), np.flatnonzero(model.column_N == c)) for c in np.unique(model.column_N)]
  for r, row in rows:
    for c, column in columns:
      slab = max(1, _CELL // len(row))
      for first in range(0, len(column), slab):
        yield row, column[first : first + slab], min(max(c + ROW_STEP * r, 0), CLASSES - 1)


def fit(q_MxN: np.ndarray) -> Model:
  """The model that stores an int8 matrix in the fewest bytes, by estimates from second moments."""
  q_MxN = PHASES * q_MxN.astype(np.int32)
  *classes, least = widths.fit(q_MxN)
  best = Model(None, *classes)
  mean = means.fit(q_MxN // PHASES)
  # What looked like a direction may have been a few wide columns or rows, which their classes tell for less: so the
  # directions are taken one after the other for as long as that helps.
  for rank in range(1, 1 + (0 if mean is None else len(mean.b_KxN))):
    part = mean.leading(rank)
    *classes, bits = widths.fit(q_MxN - part.phases().T)
    bits += part.bits()
    if bits < least:
      best, least = Model(part, *classes), bits
    elif rank - (0 if best.mean is None else len(best.mean.b_KxN)) == _PATIENCE:
      break
  return best


def put_grids(writer: Writer, arrays: Sequence[np.ndarray]) -> None:
  """Writes int8 matrices: what their models have in common, the classes of all, then each one's mean and values."""
  from threadpoolctl import threadpool_limits  # not needed to read

  # Many products of a few megaflops: more threads wait for each other and take three times the core-seconds.
  with threadpool_limits(1, "blas"):
    models = [fit(q) for q in arrays]
  pieces = [list(_pieces(q, model)) for q, model in zip(arrays, models, strict=True)]
  low = min((int(v.min()) for p in pieces for *_, v in p if len(v)), default=0)
  high = max((int(v.max()) for p in pieces for *_, v in p if len(v)), default=0)
  high = max(high, low + 1)  # the coder has no alphabets of one symbol
  shape = _best_shape([piece for p in pieces for piece in p], low, high)
  for value in (shape, low + _REACH, high + _REACH):
    writer.put(np.array([value]), _WORD)
  ranks = [0 if m.mean is None else m.mean.b_KxN.shape[0] for m in models]
  put_counted(writer, np.array(ranks, np.int32), RANKS + 1)
  put_counted(writer, joined([m.column_N for m in models]), CLASSES)
  put_counted(writer, joined([m.row_M for m in models]) + _ROW_CENTRE, 2 * _ROW_CENTRE)
  for model, own in zip(models, pieces, strict=True):
    if model.mean is not None:
      _put_mean(writer, model.mean)
    for width, phase, values in own:
      writer.put(values - low, _law(width, shape, phase, low, high))


def take_grids(reader: Reader, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
  """Reads what `put_grids` wrote. Raises ArtifactError on what it cannot have written."""
  shape, low, high = (int(reader.take(1, _WORD)[0]) for _ in range(3))
  low, high = low - _REACH, high - _REACH
  if shape >= len(SHAPES) or not low < high <= _REACH + 1:
    raise ArtifactError("A stream of the artifact names a distribution that does not exist: it is damaged.")
  ranks = take_counted(reader, len(shapes), RANKS + 1).tolist()
  columns = parts(take_counted(reader, sum(n for _, n in shapes), CLASSES), [(n,) for _, n in shapes])
  rows = take_counted(reader, sum(m for m, _ in shapes), 2 * _ROW_CENTRE) - _ROW_CENTRE
  rows = parts(rows, [(m,) for m, _ in shapes])
  found = []
  for size, rank, column_N, row_M in zip(shapes, ranks, columns, rows, strict=True):
    model = Model(_take_mean(reader, size, rank) if rank else None, column_N, row_M)
    found.append(_take_grid(reader, model, size, shape, low, high))
  return found


def _pieces(q_MxN: np.ndarray, model: Model):
  """(width class, phase, values less the whole part of their mean), in the order in which they are stored."""
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


def _take_grid(reader: Reader, model: Model, size: tuple[int, ...], shape: int, low: int, high: int) -> np.ndarray:
  rows, columns = size
  q_NxM = np.zeros((columns, rows), np.int8)
  for row, column, width in _cells(model):
    if model.mean is None:
      part = reader.take(len(column) * len(row), _law(width, shape, 0, low, high)) + low
    else:
      mean = model.mean.phases(row, column).reshape(-1)
      part = mean >> PHASE_BITS
      for phase in range(PHASES):
        chosen = (mean & (PHASES - 1)) == phase
        part[chosen] += reader.take(int(chosen.sum()), _law(width, shape, phase, low, high)) + low
    if not -128 <= part.min() <= part.max() <= 127:
      raise ArtifactError("A stream of the artifact holds integers of more than 8 bits: it is damaged.")
    q_NxM[np.ix_(column, row)] = part.reshape(len(column), len(row))
  return np.ascontiguousarray(q_NxM.T)


@functools.lru_cache(maxsize=1024)
def _law(width: int, shape: int, phase: int, low: int, high: int) -> object:
  return table(laws.weights(width, shape, phase, low, high))


def _best_shape(pieces, low: int, high: int) -> int:
  """The law under which the pieces take the fewest bits."""
  counts = defaultdict(lambda: np.zeros(high - low + 1, np.int64))
  for width, phase, values in pieces:
    counts[width, phase] += np.bincount(values - low, minlength=high - low + 1)

  def bits(shape: int) -> float:
    total = 0.0
    for (width, phase), count in counts.items():
      weights = laws.weights(width, shape, phase, low, high)
      total -= float(np.sum(count * np.log2(weights / weights.sum())))
    return total

  return min(range(len(SHAPES)), key=bits)


def _put_mean(writer: Writer, mean: Mean) -> None:
  for word in (int(mean.flipped), mean.factor >> 16, mean.factor & 0xFFFF):
    writer.put(np.array([word]), _WORD)
  for coefficients in mean.a_MxK.T:
    _put_coefficients(writer, coefficients)
  writer.put(mean.b_KxN + B_LIMIT, _BASIS)


def _take_mean(reader: Reader, size: tuple[int, ...], rank: int) -> Mean:
  if min(size) < LEAST_SIDE:
    raise ArtifactError("A stream of the artifact gives a mean to a matrix too small for it: it is damaged.")
  flipped, high, low = (int(reader.take(1, _WORD)[0]) for _ in range(3))
  tall, wide = size[::-1] if flipped else size
  a_MxK = np.stack([_take_coefficients(reader, tall) for _ in range(rank)], axis=1)
  b_KxN = reader.take(rank * wide, _BASIS).reshape(rank, wide) - B_LIMIT
  return Mean(a_MxK, b_KxN, high << 16 | low, bool(flipped))


def _put_coefficients(writer: Writer, values: np.ndarray) -> None:
  """Whole numbers below 2^15 in size: the lowest bits as they are, the rest counted."""
  shift = max(0, int(np.abs(values).max(initial=0)).bit_length() - 8)
  high = values >> shift
  low, top = int(high.min(initial=0)), int(high.max(initial=0))
  for word in (shift, low + 256, top + 256):
    writer.put(np.array([word]), _WORD)
  put_counted(writer, high - low, top - low + 2)
  if shift:
    writer.put(values & ((1 << shift) - 1), table(np.ones(1 << shift)))


def _take_coefficients(reader: Reader, count: int) -> np.ndarray:
  shift, low, top = (int(reader.take(1, _WORD)[0]) for _ in range(3))
  if shift > 7 or not low <= top <= 512:
    raise ArtifactError("A stream of the artifact names a distribution that does not exist: it is damaged.")
  values = (take_counted(reader, count, top - low + 2) + low - 256) << shift
  return values | reader.take(count, table(np.ones(1 << shift))) if shift else values
