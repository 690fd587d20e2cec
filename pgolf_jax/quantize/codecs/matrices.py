"""The entropy model of quantised matrices: what remains after a low-rank mean, normal with a width per row and column.

A trained matrix on its rows' grids is close to rounded normal noise. What differs is the width from column to column
(inputs of different size), sometimes from row to row, and, in an embedding, a mean that few directions explain (common
drift, tokens that never occurred). So a matrix is stored as: factors A·B of its mean, classes of columns and rows, and
the integers under the law that these name. A mean never has more than `RANKS` directions, and most matrices have none.

Reading is whole-number arithmetic throughout, carried out in float64 where that is exact (products and sums below
2^53, in any order): every machine finds the same mean. Writing rounds its estimates to few classes and directions, so
that it too gives the same file wherever it runs. M rows, N columns, K rank.
"""

import dataclasses

import numpy as np

from pgolf_jax.quantize.codecs import laws
from pgolf_jax.quantize.codecs.laws import CENTRE, CLASSES, PHASES

RANKS = 16
A_LIMIT, B_LIMIT, FACTOR_LIMIT = 2**15 - 1, 2**10 - 1, 2**32 - 1  # with RANKS, they keep A·B · factor within int64
ROW_STEP = 2  # row classes are multiples of this many width classes
_BASIS_LEVEL = 8  # root mean square of B's entries
BASIS_WIDTH = CENTRE + 3 * laws.STEPS  # their width class
_STEP_SIGMAS = 2.5  # step of A's coefficients, in standard deviations of what remains
_GLANCE, _ROUNDS = 3, 12  # of subspace iteration: to see whether there is a mean at all, and to find it
_FACTOR_BITS = 16  # fraction bits of the factor from A·B to eighths of a unit


@dataclasses.dataclass(frozen=True)
class Mean:
  """mean_MxN = A·B · factor / 2^16 in units of 1/PHASES; of the transposed matrix where `flipped`."""

  a_MxK: np.ndarray  # int32
  b_KxN: np.ndarray  # int32
  factor: int
  flipped: bool

  def eighths(self) -> np.ndarray:
    """int32 [M, N], held to the range of int8, so that no file can ask for more."""
    product = np.matmul(self.a_MxK.astype(np.float64), self.b_KxN.astype(np.float64)).astype(np.int64)
    found = (product * self.factor + (1 << (_FACTOR_BITS - 1))) >> _FACTOR_BITS
    found = np.clip(found, -127 * PHASES, 127 * PHASES).astype(np.int32)
    return found.T if self.flipped else found


@dataclasses.dataclass(frozen=True)
class Model:
  mean: Mean | None
  column_N: np.ndarray  # int32, width class of each column
  row_M: np.ndarray  # int32, in units of ROW_STEP, added to the column's class


def cells(model: Model):
  """(rows, columns, width class) of each submatrix of one class, in a fixed order, together covering the matrix."""
  rows = [(int(r), np.flatnonzero(model.row_M == r)) for r in np.unique(model.row_M)]
  columns = [(int(c), np.flatnonzero(model.column_N == c)) for c in np.unique(model.column_N)]
  for r, row in rows:
    for c, column in columns:
      yield row, column, min(max(c + ROW_STEP * r, 0), CLASSES - 1)


def fit(q_MxN: np.ndarray) -> Model:
  """The model that stores an int8 matrix in the fewest bytes, by estimates from second moments."""
  q_MxN = q_MxN.astype(np.int32)
  mean = _fit_mean(q_MxN)
  residual_MxN = PHASES * q_MxN - (0 if mean is None else mean.eighths())
  column_N, row_M = _fit_widths(3.0 * np.square(residual_MxN, dtype=np.int64) - _ROUNDING)
  return Model(mean, column_N, row_M)


# Widths.

_UNIT = 3 * PHASES**2  # variances are counted in 1/_UNIT, in which that of rounding, 1/12, is whole
_ROUNDING = _UNIT // 12
# Variance up to which a class is the nearest one: half a class above its own.
_BOUNDS = np.array([_UNIT * (laws.sigma(c) * 1.0442737824274138) ** 2 for c in range(CLASSES - 1)])


def class_of(variance: np.ndarray) -> np.ndarray:
  """Width class of values whose variance before rounding is given, in 1/_UNIT; 0 or less is the narrowest."""
  return np.searchsorted(_BOUNDS, variance).astype(np.int32)


def _inverse_variance(classes: np.ndarray) -> np.ndarray:
  """2^20/σ², whole; σ within 2^-16 … 2^16."""
  return _INVERSE_VARIANCE[np.clip(classes, -CLASSES, 2 * CLASSES - 1) + CLASSES]


_INVERSE_VARIANCE = np.array([np.rint(2.0**20 / laws.sigma(c) ** 2) for c in range(-CLASSES, 2 * CLASSES)])


def _fit_widths(square_MxN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(column classes, row classes) from squares less the rounding's share, in 1/_UNIT; rows differ where that pays."""
  rows, columns = square_MxN.shape
  plain_N = class_of(square_MxN.sum(axis=0) / max(rows, 1))
  column_N = plain_N
  for _ in range(2):
    weight_N = _inverse_variance(column_N)
    # In a row whose width is its columns', the mean of square/σ² is _UNIT.
    relative_M = np.matmul(square_MxN, weight_N) / (2**20 * max(columns, 1))
    row_M = (class_of(relative_M) - CENTRE + ROW_STEP // 2) // ROW_STEP
    weight_M = _inverse_variance(CENTRE + ROW_STEP * row_M)
    column_N = class_of(np.matmul(weight_M, square_MxN) / (2**20 * max(rows, 1)))
  flat_M = np.zeros(rows, np.int32)
  if _bits(square_MxN, column_N, row_M) < _bits(square_MxN, plain_N, flat_M):
    return column_N, row_M
  return plain_N, flat_M


def _bits(square_MxN: np.ndarray, column_N: np.ndarray, row_M: np.ndarray) -> float:
  """Bits of normal values under these classes, up to a constant, and of the row classes themselves."""
  columns, rows = len(column_N), len(row_M)
  widths = (rows * int(column_N.sum()) + columns * ROW_STEP * int(row_M.sum())) / laws.STEPS
  column_square_N = np.matmul(_inverse_variance(CENTRE + ROW_STEP * row_M), square_MxN) / 2**20
  spread = np.sum(column_square_N * _inverse_variance(column_N) / 2**20) / _UNIT
  counts = np.unique(row_M, return_counts=True)[1]
  return widths + 0.5 * 1.4426950408889634 * spread - float(np.sum(counts * np.log2(counts / max(rows, 1))))


# The mean.


def _fit_mean(q_MxN: np.ndarray) -> Mean | None:
  """The leading directions of the matrix that save more than they cost, or None."""
  flipped = q_MxN.shape[0] < q_MxN.shape[1]
  tall_MxN = (q_MxN.T if flipped else q_MxN).astype(np.float64)
  rows, columns = tall_MxN.shape
  if columns < 2 * RANKS:
    return None
  gram_NxN = np.matmul(tall_MxN.T, tall_MxN)
  if not gram_NxN.any():
    return None
  if not _gain(_leading_directions(gram_NxN, _GLANCE), gram_NxN, rows)[0]:
    return None
  basis_KxN = _leading_directions(gram_NxN, _ROUNDS)
  rank, sigma = _gain(basis_KxN, gram_NxN, rows)
  if not rank:
    return None
  norm_K = np.square(basis_KxN[:rank]).sum(axis=1)
  basis_KxN = basis_KxN[:rank]
  # A's unit is a step of `_STEP_SIGMAS` σ along B's direction, the same for all directions.
  per_unit = _STEP_SIGMAS * sigma / (_BASIS_LEVEL * np.sqrt(columns))
  factor = int(np.clip(np.rint(per_unit * PHASES * 2**_FACTOR_BITS), 1, FACTOR_LIMIT))
  a_MxK = np.rint(np.matmul(tall_MxN, basis_KxN.T) / (norm_K * (factor / (PHASES * 2**_FACTOR_BITS))))
  return Mean(np.clip(a_MxK, -A_LIMIT, A_LIMIT).astype(np.int32), basis_KxN.astype(np.int32), factor, flipped)


def _gain(basis_KxN: np.ndarray, gram_NxN: np.ndarray, rows: int) -> tuple[int, float]:
  """(how many of the directions save more than they cost, standard deviation of what remains after them).

  Normal approximation: a direction shortens every value; its coefficient in each row and its own entries must be kept.
  """
  columns = gram_NxN.shape[0]
  total = float(np.trace(gram_NxN))
  energy_K = (np.matmul(basis_KxN, gram_NxN) * basis_KxN).sum(axis=1) / np.square(basis_KxN).sum(axis=1)
  left_K = np.maximum(total - np.cumsum(energy_K), total / 1024)
  sigma_K = np.sqrt(left_K / (rows * columns))
  saved_K = 0.5 * rows * columns * np.log2(total / left_K)
  coefficient_K = np.sqrt(energy_K / rows) / (_STEP_SIGMAS * sigma_K)
  per_row_K = 2.05 + 0.5 * np.log2(coefficient_K**2 + 1 / 12) + 0.25  # and what its rounding adds to the values
  cost_K = np.cumsum(rows * per_row_K + columns * 5.1 + 64)
  best = int(np.argmax(saved_K - cost_K))
  return (best + 1, float(sigma_K[best])) if saved_K[best] > 1.01 * cost_K[best] else (0, 0.0)


def _leading_directions(gram_NxN: np.ndarray, rounds: int) -> np.ndarray:
  """Whole-number directions [RANKS, N] near the leading eigenvectors, by falling eigenvalue, nearly orthogonal.

  Subspace iteration in which the basis is rounded to 15 bits after every product, so that no sum is ever inexact.
  """
  columns = gram_NxN.shape[0]
  # Any start does that is not orthogonal to what is sought: the hardest-driven columns.
  basis_KxN = np.zeros((RANKS, columns))
  basis_KxN[np.arange(RANKS), np.argsort(-np.diagonal(gram_NxN), kind="stable")[:RANKS]] = 1
  gram_NxN = np.rint(gram_NxN * (2.0**26 / max(float(np.abs(gram_NxN).max()), 1.0)))
  for _ in range(rounds):
    basis_KxN = _orthogonal(np.matmul(basis_KxN, gram_NxN))
  energy_K = (np.matmul(basis_KxN, gram_NxN) * basis_KxN).sum(axis=1)
  basis_KxN = basis_KxN[np.argsort(-energy_K, kind="stable")]
  norm_Kx1 = np.maximum(np.sqrt(np.square(basis_KxN).sum(axis=1, keepdims=True)), 1)
  coarse_KxN = np.clip(np.rint(basis_KxN * (_BASIS_LEVEL * np.sqrt(columns) / norm_Kx1)), -B_LIMIT, B_LIMIT)
  coarse_KxN[~coarse_KxN.any(axis=1), 0] = 1
  return coarse_KxN


def _orthogonal(basis_KxN: np.ndarray) -> np.ndarray:
  """Gram-Schmidt, each row rounded to whole numbers of at most 2^14."""
  done: list[np.ndarray] = []
  for row_N in basis_KxN:
    row_N = _rounded(row_N)
    for other_N in done:
      row_N = row_N - np.rint(other_N * (np.dot(row_N, other_N) / max(np.dot(other_N, other_N), 1.0)))
    done.append(_rounded(row_N))
  return np.stack(done)


def _rounded(row_N: np.ndarray) -> np.ndarray:
  return np.rint(row_N * (2.0**14 / max(float(np.abs(row_N).max()), 1.0)))
