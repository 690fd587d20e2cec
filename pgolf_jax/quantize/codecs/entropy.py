"""The `entropy` codec: an ANS coder under models of what each kind of array holds.

Grids under matrices.py's model; fp16 values as a counted high part (sign, exponent, leading digits) and a low part,
which is as good as noise; small integers counted. Every model is derived from whole numbers alone.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from pgolf_jax.quantize.codecs import Content, laws, matrices, plain
from pgolf_jax.quantize.codecs.ans import Reader, Writer, put_counted, table, take_counted
from pgolf_jax.quantize.codecs.laws import CLASSES, PHASES, SHAPES
from pgolf_jax.quantize.codecs.matrices import B_LIMIT, RANKS, Mean, Model, cells
from pgolf_jax.quantize.errors import ArtifactError

_LOW_BITS = 6  # of a float16, stored as they are
_HALF_ALPHABET = 1 << (16 - _LOW_BITS)
_ROW_CENTRE = 128  # row classes are stored as 0 … 255
_REACH = 254  # of an integer less its mean, either of which lies in −127 … 127
_COUNTED, _ZSTD = 0, 1  # first byte of a stream that is no grid's
_WORD = table(np.ones(1 << 16))
_BASIS = table(laws.weights(matrices.BASIS_WIDTH, 0, 0, -B_LIMIT, B_LIMIT))


def encode(content: Content, arrays: Sequence[np.ndarray]) -> bytes:
  if content == "grid":
    return _coded(_put_grids, arrays)
  # A model that has hardly been trained repeats values (rows of equal norm, scales still at 1): Zstandard finds them.
  coded = bytes([_COUNTED]) + _coded(_put_halves if content == "half" else _put_small, arrays)
  return min(coded, bytes([_ZSTD]) + plain.encode(content, arrays), key=len)


def decode(content: Content, data: bytes, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
  if content == "grid":
    return _decoded(_take_grids, data, shapes)
  if data[:1] == bytes([_ZSTD]):
    return plain.decode(content, data[1:], shapes)
  if data[:1] != bytes([_COUNTED]):
    raise ArtifactError("A stream of the artifact names a method that does not exist: it is damaged.")
  return _decoded(_take_halves if content == "half" else _take_small, data[1:], shapes)


def _coded(put, arrays: Sequence[np.ndarray]) -> bytes:
  writer = Writer()
  put(writer, arrays)
  return writer.finish()


def _decoded(take, data: bytes, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
  reader = Reader(data)
  arrays = take(reader, shapes)
  reader.finish()
  return arrays


# fp16 and small integers.


def _put_halves(writer: Writer, arrays: Sequence[np.ndarray]) -> None:
  bits = _joined([a.astype(np.float16).reshape(-1).view(np.uint16) for a in arrays])
  put_counted(writer, bits >> _LOW_BITS, _HALF_ALPHABET)
  writer.put(bits & ((1 << _LOW_BITS) - 1), table(np.ones(1 << _LOW_BITS)))


def _take_halves(reader: Reader, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
  count = sum(map(math.prod, shapes))
  bits = take_counted(reader, count, _HALF_ALPHABET) << _LOW_BITS
  bits |= reader.take(count, table(np.ones(1 << _LOW_BITS)))
  return _parts(bits.astype(np.uint16).view(np.float16), shapes)


def _put_small(writer: Writer, arrays: Sequence[np.ndarray]) -> None:
  put_counted(writer, _joined([a.reshape(-1) for a in arrays]) + 128, 256)


def _take_small(reader: Reader, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
  values = take_counted(reader, sum(map(math.prod, shapes)), 256) - 128
  return _parts(values.astype(np.int8), shapes)


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
  return np.concatenate([np.zeros(0, np.int32), *arrays]).astype(np.int32)


def _parts(values: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
  ends = np.cumsum([0, *map(math.prod, shapes)]).tolist()
  return [values[a:b].reshape(shape) for a, b, shape in zip(ends[:-1], ends[1:], shapes, strict=True)]


# Grids.


def _put_grids(writer: Writer, arrays: Sequence[np.ndarray]) -> None:
  models = [matrices.fit(q) for q in arrays]
  pieces = [list(_pieces(q, model)) for q, model in zip(arrays, models, strict=True)]
  low = min((int(v.min()) for p in pieces for *_, v in p if len(v)), default=0)
  high = max((int(v.max()) for p in pieces for *_, v in p if len(v)), default=0)
  high = max(high, low + 1)  # the coder has no alphabets of one symbol
  shape = _best_shape([piece for p in pieces for piece in p], low, high)
  for value in (shape, low + _REACH, high + _REACH):
    writer.put(np.array([value]), _WORD)
  ranks = [0 if m.mean is None else m.mean.b_KxN.shape[0] for m in models]
  put_counted(writer, np.array(ranks, np.int32), RANKS + 1)
  put_counted(writer, _joined([m.column_N for m in models]), CLASSES)
  put_counted(writer, _joined([m.row_M for m in models]) + _ROW_CENTRE, 2 * _ROW_CENTRE)
  for model, parts in zip(models, pieces, strict=True):
    if model.mean is not None:
      _put_mean(writer, model.mean)
    for width, phase, values in parts:
      writer.put(values - low, _law(width, shape, phase, low, high))


def _take_grids(reader: Reader, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
  shape, low, high = (int(reader.take(1, _WORD)[0]) for _ in range(3))
  low, high = low - _REACH, high - _REACH
  if shape >= len(SHAPES) or not low < high <= _REACH + 1:
    raise ArtifactError("A stream of the artifact names a distribution that does not exist: it is damaged.")
  ranks = take_counted(reader, len(shapes), RANKS + 1).tolist()
  columns = _parts(take_counted(reader, sum(n for _, n in shapes), CLASSES), [(n,) for _, n in shapes])
  rows = take_counted(reader, sum(m for m, _ in shapes), 2 * _ROW_CENTRE) - _ROW_CENTRE
  rows = _parts(rows, [(m,) for m, _ in shapes])
  found = []
  for size, rank, column_N, row_M in zip(shapes, ranks, columns, rows, strict=True):
    model = Model(_take_mean(reader, size, rank) if rank else None, column_N, row_M)
    found.append(_take_grid(reader, model, size, shape, low, high))
  return found


def _pieces(q_MxN: np.ndarray, model: Model):
  """(width class, phase, values less the whole part of their mean), in the order in which they are stored."""
  eighths_MxN = None if model.mean is None else model.mean.eighths()
  for row, column, width in cells(model):
    # By column, as the columns' classes come.
    part = q_MxN.T[np.ix_(column, row)].astype(np.int32).reshape(-1)
    if eighths_MxN is None:
      yield width, 0, part
      continue
    eighths = eighths_MxN.T[np.ix_(column, row)].reshape(-1)
    for phase in range(PHASES):
      chosen = (eighths & (PHASES - 1)) == phase
      yield width, phase, part[chosen] - (eighths[chosen] >> 3)


def _take_grid(reader: Reader, model: Model, size: tuple[int, ...], shape: int, low: int, high: int) -> np.ndarray:
  rows, columns = size
  q_NxM = np.zeros((columns, rows), np.int8)
  eighths_MxN = None if model.mean is None else model.mean.eighths()
  for row, column, width in cells(model):
    where = np.ix_(column, row)
    if eighths_MxN is None:
      part = reader.take(len(column) * len(row), _law(width, shape, 0, low, high)) + low
    else:
      eighths = eighths_MxN.T[where].reshape(-1)
      part = eighths >> 3
      for phase in range(PHASES):
        chosen = (eighths & (PHASES - 1)) == phase
        part[chosen] += reader.take(int(chosen.sum()), _law(width, shape, phase, low, high)) + low
    if len(part) and not -128 <= part.min() <= part.max() <= 127:
      raise ArtifactError("A stream of the artifact holds integers of more than 8 bits: it is damaged.")
    q_NxM[where] = part.reshape(len(column), len(row))
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
