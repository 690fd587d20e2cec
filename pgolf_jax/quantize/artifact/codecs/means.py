"""The mean of a quantised matrix: a product of two whole-number factors, and how it is stored.

Embeddings have a mean that is worth storing (all rows drift together, and tokens that never occurred stay together);
most matrices do not. Reading is whole-number arithmetic, done in float64 where that is exact (products and sums below
2^53, in any order), so every machine computes the same mean. M rows, N columns, R rank.
"""

import dataclasses

import numpy as np

from pgolf_jax.errors import ArtifactError
from pgolf_jax.quantize.artifact.codecs import laws
from pgolf_jax.quantize.artifact.codecs.ans import Reader, Writer, distribution, put_counted, take_counted
from pgolf_jax.quantize.artifact.codecs.laws import CENTRE, PHASES, STEPS

MAX_RANK = 16
LEAST_SIDE = 2 * MAX_RANK  # rows and columns of a matrix that may have a mean
B_LIMIT = 2**10 - 1
FACTOR_BITS = 16  # fraction bits of the factor from A·B to the mean
WORD = distribution(np.ones(1 << 16))

_COEFFICIENT_BITS = 8  # of A's coefficients, coded under counts; lower bits are stored as they are
_MAX_SHIFT = 7
_BASIS = distribution(laws.weights(CENTRE + 3 * STEPS, 0, 0, -B_LIMIT, B_LIMIT))


@dataclasses.dataclass(frozen=True)
class Mean:
  """mean_MxN = A·B · factor / 2^16 in units of 1/PHASES; of the transposed matrix where `flipped`."""

  a_MxR: np.ndarray  # int32
  b_RxN: np.ndarray  # int32
  factor: int
  flipped: bool

  @property
  def rank(self) -> int:
    return self.b_RxN.shape[0]

  def phases(self, row=slice(None), column=slice(None)) -> np.ndarray:
    """Returns a part of the mean, int32 [columns, rows], in units of 1/PHASES and within the range of int8.

    Args:
      row, column: indices of the part.
    """
    left, right = (column, row) if self.flipped else (row, column)
    product = np.matmul(self.a_MxR[left].astype(np.float64), self.b_RxN[:, right].astype(np.float64)).astype(np.int64)
    mean = (product * self.factor + (1 << (FACTOR_BITS - 1))) >> FACTOR_BITS
    mean = np.clip(mean, -127 * PHASES, 127 * PHASES).astype(np.int32)
    return mean if self.flipped else mean.T


def put_mean(writer: Writer, mean: Mean) -> None:
  """Writes a mean."""
  for word in (int(mean.flipped), mean.factor >> 16, mean.factor & 0xFFFF):
    writer.put(np.array([word]), WORD)
  for coefficients in mean.a_MxR.T:
    _put_coefficients(writer, coefficients)
  writer.put(mean.b_RxN + B_LIMIT, _BASIS)


def take_mean(reader: Reader, shape: tuple[int, ...], rank: int) -> Mean:
  """Reads the mean of a matrix of this shape. Raises ArtifactError if such a matrix cannot have one."""
  if min(shape) < LEAST_SIDE:
    raise ArtifactError("A stream of the artifact gives a mean to a matrix too small for it: it is damaged.")
  flipped, high, low = (int(reader.take(1, WORD)[0]) for _ in range(3))
  tall, wide = shape[::-1] if flipped else shape
  a_MxR = np.stack([_take_coefficients(reader, tall) for _ in range(rank)], axis=1)
  b_RxN = reader.take(rank * wide, _BASIS).reshape(rank, wide) - B_LIMIT
  return Mean(a_MxR, b_RxN, high << 16 | low, bool(flipped))


def _put_coefficients(writer: Writer, values: np.ndarray) -> None:
  """Writes whole numbers below 2^15 in size: the lowest bits as they are, the rest under counts."""
  shift = max(0, int(np.abs(values).max(initial=0)).bit_length() - _COEFFICIENT_BITS)
  high = values >> shift
  low, top = int(high.min(initial=0)), int(high.max(initial=0))
  for word in (shift, low + 256, top + 256):
    writer.put(np.array([word]), WORD)
  put_counted(writer, high - low, top - low + 2)
  if shift:
    writer.put(values & ((1 << shift) - 1), distribution(np.ones(1 << shift)))


def _take_coefficients(reader: Reader, count: int) -> np.ndarray:
  shift, low, top = (int(reader.take(1, WORD)[0]) for _ in range(3))
  if shift > _MAX_SHIFT or not low <= top <= 512:
    raise ArtifactError("A stream of the artifact names a distribution that does not exist: it is damaged.")
  values = (take_counted(reader, count, top - low + 2) + low - 256) << shift
  return values | reader.take(count, distribution(np.ones(1 << shift))) if shift else values
