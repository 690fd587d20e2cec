"""How wide the values of a quantised matrix scatter: a class for each column, and for each row where rows differ.

M rows, N columns.
"""

import numpy as np

from pgolf_jax.quantize.artifact.codecs import laws
from pgolf_jax.quantize.artifact.codecs.laws import CENTRE, CLASSES, PHASES

_HALF_LOG2E = 0.5 * 1.4426950408889634
ROW_STEP = 2  # row classes are multiples of this many width classes
_UNIT = 3 * PHASES**2  # variances are counted in 1/_UNIT, in which that of rounding, 1/12, is whole
_ROUNDING = _UNIT // 12
# Variance up to which a class is the nearest one: half a class above its own.
_BOUNDS = np.array([_UNIT * (laws.sigma(c) * 1.0442737824274138) ** 2 for c in range(CLASSES - 1)])


def _class_of(variance: np.ndarray) -> np.ndarray:
  """Width class of values whose variance before rounding is given, in 1/_UNIT; 0 or less is the narrowest."""
  return np.searchsorted(_BOUNDS, variance).astype(np.int32)


def _inverse_variance(classes: np.ndarray) -> np.ndarray:
  """2^20/σ², whole; σ within 2^-16 … 2^16."""
  return _INVERSE_VARIANCE[np.clip(classes, -CLASSES, 2 * CLASSES - 1) + CLASSES]


_INVERSE_VARIANCE = np.array([np.rint(2.0**20 / laws.sigma(c) ** 2) for c in range(-CLASSES, 2 * CLASSES)])


def fit(residual_MxN: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
  """Column classes, row classes (added to them in units of ROW_STEP), and about how many bits values then take.

  Rows get classes of their own only where that saves more than it costs. The bits are up to a constant per value.

  Args:
    residual_MxN: values less their mean, in units of 1/PHASES.
  """
  square_MxN = 3.0 * np.square(residual_MxN, dtype=np.int64) - _ROUNDING
  rows, columns = square_MxN.shape
  flat_M = np.zeros(rows, np.int32)
  plain_N = column_N = _class_of(square_MxN.sum(axis=0) / rows)
  for _ in range(2):
    weight_N = _inverse_variance(column_N)
    # In a row whose width is its columns', the mean of square/σ² is _UNIT.
    relative_M = np.matmul(square_MxN, weight_N) / (2**20 * columns)
    row_M = (_class_of(relative_M) - CENTRE + ROW_STEP // 2) // ROW_STEP
    weight_M = _inverse_variance(CENTRE + ROW_STEP * row_M)
    column_N = _class_of(np.matmul(weight_M, square_MxN) / (2**20 * rows))
  ways = ((_cheapened(square_MxN, plain_N, flat_M), flat_M), (_cheapened(square_MxN, column_N, row_M), row_M))
  return min(((*way, _bits(square_MxN, *way)) for way in ways), key=lambda found: found[-1])


def _cheapened(square_MxN: np.ndarray, column_N: np.ndarray, row_M: np.ndarray) -> np.ndarray:
  """Column classes after each column may take another one in use: what the values lose against what the name saves."""
  rows = len(row_M)
  column_square_N = _column_squares(square_MxN, row_M)
  for _ in range(4):
    used_C, inverse_N, count_C = np.unique(column_N, return_inverse=True, return_counts=True)
    name_C = np.log2(len(column_N) / count_C)
    value_NxC = rows * used_C / laws.STEPS + np.outer(column_square_N, _HALF_LOG2E * _inverse_variance(used_C) / 2**20)
    chosen_N = np.argmin(value_NxC + name_C, axis=1)
    if np.array_equal(chosen_N, inverse_N):
      break
    column_N = used_C[chosen_N]
  return column_N


def _column_squares(square_MxN: np.ndarray, row_M: np.ndarray) -> np.ndarray:
  """Σ over rows of squares, each in units of its row's variance."""
  return np.matmul(_inverse_variance(CENTRE + ROW_STEP * row_M), square_MxN) / 2**20 / _UNIT


def _bits(square_MxN: np.ndarray, column_N: np.ndarray, row_M: np.ndarray) -> float:
  """Bits of normal values under these classes, up to a constant, and of the classes themselves."""
  columns, rows = len(column_N), len(row_M)
  widths = (rows * int(column_N.sum()) + columns * ROW_STEP * int(row_M.sum())) / laws.STEPS
  spread = np.sum(_column_squares(square_MxN, row_M) * _inverse_variance(column_N)) / 2**20
  names = 0.0
  for classes in (column_N, row_M):
    count_C = np.unique(classes, return_counts=True)[1]
    names -= float(np.sum(count_C * np.log2(count_C / len(classes))))
  return widths + _HALF_LOG2E * spread + names
