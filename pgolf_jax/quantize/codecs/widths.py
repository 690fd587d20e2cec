"""How wide the values of a quantised matrix scatter: a class for each column, and for each row where rows differ.

M rows, N columns.
"""

import numpy as np

from pgolf_jax.quantize.codecs import laws
from pgolf_jax.quantize.codecs.laws import CENTRE, CLASSES, PHASES

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
  plain_N = _class_of(square_MxN.sum(axis=0) / rows)
  column_N = plain_N
  for _ in range(2):
    weight_N = _inverse_variance(column_N)
    # In a row whose width is its columns', the mean of square/σ² is _UNIT.
    relative_M = np.matmul(square_MxN, weight_N) / (2**20 * columns)
    row_M = (_class_of(relative_M) - CENTRE + ROW_STEP // 2) // ROW_STEP
    weight_M = _inverse_variance(CENTRE + ROW_STEP * row_M)
    column_N = _class_of(np.matmul(weight_M, square_MxN) / (2**20 * rows))
  ways = ((plain_N, np.zeros(rows, np.int32)), (column_N, row_M))
  return min(((*way, _bits(square_MxN, *way)) for way in ways), key=lambda found: found[-1])


def _bits(square_MxN: np.ndarray, column_N: np.ndarray, row_M: np.ndarray) -> float:
  """Bits of normal values under these classes, up to a constant, and of the row classes themselves."""
  columns, rows = len(column_N), len(row_M)
  widths = (rows * int(column_N.sum()) + columns * ROW_STEP * int(row_M.sum())) / laws.STEPS
  column_square_N = np.matmul(_inverse_variance(CENTRE + ROW_STEP * row_M), square_MxN) / 2**20
  spread = np.sum(column_square_N * _inverse_variance(column_N) / 2**20) / _UNIT
  counts = np.unique(row_M, return_counts=True)[1]
  return widths + 0.5 * 1.4426950408889634 * spread - float(np.sum(counts * np.log2(counts / rows)))
