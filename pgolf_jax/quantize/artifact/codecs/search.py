"""The search for the model that stores a quantised matrix in the fewest bytes.

For integers of 8 bits it is by estimates from second moments, for integers of any size by the laws themselves.

Directions of the mean and width classes are found in whole-number arithmetic, done in float64 where that is exact: the
same matrix gets the same model on every machine, so writing an artifact twice gives the same file. M rows, N columns,
R directions.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

from pgolf_jax.quantize.artifact.codecs import ans, integers, trellis
from pgolf_jax.quantize.artifact.codecs.ans import (
  CENTRE,
  CLASSES,
  COUNT_WEIGHT,
  PHASE_BITS,
  PHASES,
  SHAPES,
  STEPS,
  chunks,
)
from pgolf_jax.quantize.artifact.codecs.grids import B_LIMIT, FACTOR_BITS, LEAST_SIDE, MAX_RANK, ROW_STEP, Mean, Model
from pgolf_jax.quantize.artifact.codecs.integers import WIDE, WIDTHS, Law, MatrixModel, MatrixModels, Plan, Steps

_PATIENCE = 2  # directions that may pass without saving anything

_A_LIMIT, _FACTOR_LIMIT = 2**15 - 1, 2**32 - 1  # with B_LIMIT and MAX_RANK they keep A·B · factor within int64
_BASIS_LEVEL = 8  # root mean square of B's entries
_BASIS_BITS = 5.1  # about what an entry of B takes
_HEADER_BITS = 64  # about what a direction takes beside its coefficients and entries
_STEP_SIGMAS = 2.5  # step of A's coefficients, in standard deviations of what remains
_GLANCE, _ROUNDS = 3, 12  # of subspace iteration: to see whether there is a mean at all, and to compute it

_MOST_WEIGHT = 2**13  # in the search for a mean
_SLAB = 1 << 18  # values whose costs are looked up at a time
_BIT = 256  # costs are counted in this part of a bit
_ROUNDS_OF_CLASSES = 4
_FAR, _NEAR = (-8, -4, -2, 0, 2, 4, 8), (-2, -1, 0, 1, 2)  # moves of classes from a first guess, and later
_NEAR_A_MOMENT = range(-7, 4)  # moves from the class that the second moment names
_HALF_LOG2E = 0.5 * 1.4426950408889634
_UNIT = 3 * PHASES**2  # variances are counted in 1/_UNIT, in which that of rounding, 1/12, is whole
_ROUNDING = _UNIT // 12
# Variance up to which a class is the nearest one: half a class above its own.
_BOUNDS = np.array([_UNIT * (ans.sigma(c) * 1.0442737824274138) ** 2 for c in range(CLASSES - 1)])
_INVERSE_VARIANCE = np.array([np.rint(2.0**20 / ans.sigma(c) ** 2) for c in range(-CLASSES, 2 * CLASSES)])


def fit_matrices(arrays: Sequence[np.ndarray], steps: Sequence[Steps]) -> MatrixModels:
  """Returns the models of matrices of integers of any size, given their steps."""
  models = [_fit_matrix(q_MxN, step) for q_MxN, step in zip(arrays, steps, strict=True)]
  return MatrixModels(models, fit_integers(integers.class_residuals([model.model for model in models], steps)))


def _fit_matrix(q_MxN: np.ndarray, step: Steps) -> MatrixModel:
  """Returns the model that stores a matrix of integers of any size in the fewest bytes, given its steps."""
  # Directions are sought in the weights, which differ less in size than the integers, as whole numbers of about 2^7.
  row_M, column_N = (integers.powers(steps) for steps in step[:2])
  value_MxN = PHASES * q_MxN
  if step.trellis_N is not None:
    value_MxN += PHASES // 2 * trellis.matrix_parities(q_MxN, step.trellis_M, step.trellis_N)
  weight_MxN = value_MxN * (row_M / PHASES)[:, None] * column_N
  exponent = 7 - math.frexp(math.sqrt(float(np.square(weight_MxN).mean())))[1]
  mean = fit_mean(np.clip(np.rint(np.ldexp(weight_MxN, exponent)), -_MOST_WEIGHT, _MOST_WEIGHT))
  predicted = (-ROW_STEP * step.column_N, -step.row_M)
  best, least, passed = None, math.inf, 0
  # Without a mean, and with fewer and fewer directions for as long as that helps: see `fit`.
  for rank in (0, *range(0 if mean is None else mean.rank, 0, -1)):
    part = integers.scaled(mean.leading(rank), exponent, step) if rank else None
    classes, shape, bits = _fit_classes(value_MxN - part.phases().T if rank else value_MxN, predicted)
    bits += _mean_bits(part) if rank else 0
    passed = 0 if bits < least else passed + 1
    if bits < least:
      best, least = MatrixModel(Model(part, *(c.astype(np.int32) for c in classes)), shape, exponent), bits
    elif passed == _PATIENCE and best.model.rank:
      break
  return best


_Classes = tuple[np.ndarray, np.ndarray]  # of columns and rows


def _fit_classes(value_MxN: np.ndarray, predicted: _Classes) -> tuple[_Classes, int, float]:
  """Returns the classes and the shape that are best by the laws themselves, and all bits of values and classes.

  Second moments say little of values that are nearly all 0, or of laws with long tails.

  Args:
    value_MxN: values less their mean, in units of 1/PHASES.
    predicted: classes up to a constant, by the steps.
  """
  size_MxN = np.abs(value_MxN)
  classes, shape, moves = (_first_columns(size_MxN, predicted[1]), predicted[1]), 0, _FAR
  for _ in range(_ROUNDS_OF_CLASSES):
    before = classes
    for axis, unit in enumerate((1, ROW_STEP)):
      cost_OxK = _costs(size_MxN, classes, shape, [unit * move for move in moves], axis)
      cost_OxK += np.stack([_names(classes[axis] - predicted[axis], move)[0] for move in moves])
      moved_K = classes[axis] + np.array(moves)[np.argmin(cost_OxK, axis=0)]
      classes = (moved_K, classes[1]) if axis == 0 else (classes[0], moved_K)
    bits_S = [int(_costs(size_MxN, classes, s, (0,), 0).sum()) for s in range(len(SHAPES))]
    shape = int(np.argmin(bits_S))
    if moves == _NEAR and all(np.array_equal(a, b) for a, b in zip(before, classes, strict=True)):
      break
    moves = _NEAR
  total = bits_S[shape] + sum(_names(c - p)[1] for c, p in zip(classes, predicted, strict=True))
  return classes, shape, total / _BIT


def _first_columns(size_MxN: np.ndarray, row_M: np.ndarray) -> np.ndarray:
  """Guesses the classes of columns by second moments, or by mean logarithms where a few values stand out."""
  square_N = np.square(np.minimum(size_MxN, 1 << 24), dtype=np.int64).sum(axis=0) / len(row_M)
  bounds = [PHASES**2 * (ans.sigma(c) ** 2 + 1 / 12) for c in range(WIDTHS - 1)]
  log_N = np.frexp(size_MxN + PHASES // 2)[1].sum(axis=0) / len(row_M) - (PHASE_BITS - 0.4)
  class_N = np.minimum(np.searchsorted(bounds, square_N), CENTRE + np.rint(STEPS * log_N).astype(np.int64))
  return class_N - int(np.median(ROW_STEP * row_M))


def _names(residual_K: np.ndarray, move: int = 0) -> tuple[np.ndarray, int]:
  """(cost of each class less its prediction after a move, in 1/_BIT, were all others to stay; cost of all)."""
  low = int(residual_K.min(initial=0)) - 8
  count = np.bincount(residual_K - low, minlength=int(residual_K.max(initial=0)) - low + 9)
  share = np.convolve(count, (0.125, 0.75, 0.125), "same") + 0.125  # classes are stored under a law, neighbours alike
  cost = np.rint(-_BIT * np.log2(share / share.sum())).astype(np.int64)
  return cost[residual_K + move - low], int(cost[residual_K - low].sum())


def _costs(size_MxN: np.ndarray, classes: _Classes, shape: int, moves: Sequence[int], axis: int) -> np.ndarray:
  """Cost in 1/_BIT of each column's (axis 0) or row's (1) values, [moves, N] or [moves, M], when all widths move.

  Args:
    size_MxN: sizes of the values less their mean, in units of 1/PHASES.
    moves: changes of the width classes.
  """
  column_N, row_M = classes
  table, places = _cost_table(shape)
  cost = np.zeros((len(moves), size_MxN.shape[1 - axis]), np.int64)
  for r in np.unique(row_M):
    row = np.flatnonzero(row_M == r)
    slab = max(1, _SLAB // size_MxN.shape[1])
    for rows in np.split(row, range(slab, len(row), slab)):
      part = size_MxN[rows]
      for move, total in zip(moves, cost, strict=True):
        width_N = np.clip(column_N + ROW_STEP * int(r) + move, 0, WIDTHS - 1)
        shift_N = np.maximum((width_N - WIDE) // STEPS + 1, 0)
        place = np.minimum(part >> shift_N, places - 1)
        place += (width_N - STEPS * shift_N) * places
        bits = table.take(place)
        bits += (_BIT * shift_N).astype(np.int32)
        if axis == 0:
          total += bits.sum(axis=0)
        else:
          total[rows] += bits.sum(axis=1)
  return cost


@functools.lru_cache(maxsize=len(SHAPES))
def _cost_table(shape: int) -> tuple[np.ndarray, int]:
  """(cost in 1/_BIT by width class below WIDE and size in 1/PHASES, flat; number of sizes)."""
  places = PHASES * (integers.reach_of(WIDE - 1) + 2)
  cost = np.empty((WIDE, places), np.int32)
  for width, cost_P in enumerate(cost):
    reach = integers.reach_of(width)
    for phase in range(PHASES):
      weights = integers.law_weights(width, shape, phase)
      bits = np.rint(_BIT * np.log2(weights.sum() / weights))
      cost_P[phase::PHASES] = bits[-1] + _BIT * integers.ESCAPE_BITS
      cost_P[np.abs(PHASES * np.arange(-reach, reach + 1) - phase)] = bits[:-1]
  return cost.reshape(-1), places


def _counted_bits(symbols: np.ndarray, alphabet: int) -> float:
  """About how many bits `put_counted` takes."""
  counts, bits = np.zeros(alphabet, np.int64), 0.0
  for start, end in chunks(len(symbols)):
    chunk = np.bincount(symbols[start:end], minlength=alphabet)
    weights = 1 + COUNT_WEIGHT * counts
    bits += float(np.sum(chunk * np.log2(weights.sum() / weights)))
    counts += chunk
  return bits


def fit_integers(arrays: Sequence[np.ndarray]) -> list[Plan]:
  """Returns how each array is stored in the fewest bytes."""
  flat = [np.asarray(array, np.int32).reshape(-1) for array in arrays]
  plans = []
  for i, values in enumerate(flat):
    best = _plan(values, Plan(0, 0, 0, Law(0, 0)), flat[:i])
    explained, slope, back = 0.0, 0.0, 0  # by the earlier array that leaves least
    for b in range(1, min(i, integers.MOST_BACK) + 1):
      if len(flat[i - b]) == len(values) and (variance := _covariance(flat[i - b], flat[i - b])):
        shared = max(0.0, _covariance(values, flat[i - b]))
        explained, slope, back = max((explained, slope, back), (shared**2 / variance, shared / variance, b))
    if back:
      quarters = min(max(round(4 * slope), 1), integers.SLOPES)
      best = min(best, _plan(values, Plan(back, quarters - 1, 0, Law(0, 0)), flat[:i]))
    plans.append(best[1])
  return plans


def _covariance(a: np.ndarray, b: np.ndarray) -> float:
  """Times the square of the arrays' size: a whole number, exact for steps."""
  return float(len(a) * np.sum(a * b.astype(np.float64)) - a.sum() * float(b.sum()))


def _plan(values: np.ndarray, plan: Plan, before: Sequence[np.ndarray]) -> tuple[float, Plan]:
  """(bits, plan) of an array that is stored by another one, or by none, in the best way."""
  values = values - plan.base(before)
  if not len(values):
    return 0.0, plan
  low, span = int(values.min()), int(np.ptp(values))
  bits = _counted_bits(values - low, span + 2) if span < integers.MOST_COUNTED else math.inf
  best = bits, plan._replace(centre=low, law=Law(0, integers.COUNTED))
  centre, phase = divmod(int(np.rint(PHASES * values.mean())), PHASES)
  near = min(WIDTHS - 1, CENTRE + round(STEPS * math.log2(values.std() + 2.0**-4)))
  size_Kx1 = np.abs(PHASES * (values - centre) - phase)[:, None]
  for shape in range(len(SHAPES)):
    classes = np.array([near]), np.zeros(len(values), np.int64)
    cost_O = _costs(size_Kx1, classes, shape, _NEAR_A_MOMENT, 0)[:, 0] / _BIT
    width = min(max(near + _NEAR_A_MOMENT[np.argmin(cost_O)], 0), WIDTHS - 1)
    best = min(best, (float(cost_O.min()), plan._replace(centre=centre, law=Law(width, shape, phase))))
  return best


def fit(q_MxN: np.ndarray) -> Model:
  """Returns the model that stores an int8 matrix in the fewest bytes."""
  q_MxN = PHASES * q_MxN.astype(np.int32)
  *classes, least = fit_widths(q_MxN)
  best = Model(None, *classes)
  mean = fit_mean(q_MxN // PHASES)
  # A few wide columns or rows may look like a direction, but classes of their own describe them in fewer bytes.
  # Directions are therefore added one by one for as long as that helps.
  for rank in range(1, 1 + (0 if mean is None else mean.rank)):
    part = mean.leading(rank)
    *classes, bits = fit_widths(q_MxN - part.phases().T)
    bits += _mean_bits(part)
    if bits < least:
      best, least = Model(part, *classes), bits
    elif rank - best.rank == _PATIENCE:
      break
  return best


def fit_mean(q_MxN: np.ndarray) -> Mean | None:
  """Returns the leading directions of the matrix that save more than they cost, or None."""
  flipped = q_MxN.shape[0] < q_MxN.shape[1]
  tall_MxN = (q_MxN.T if flipped else q_MxN).astype(np.float64)
  rows, columns = tall_MxN.shape
  if columns < LEAST_SIDE:
    return None
  gram_NxN = np.matmul(tall_MxN.T, tall_MxN)
  if not gram_NxN.any():
    return None
  if not _gain(_leading_directions(gram_NxN, _GLANCE), gram_NxN, rows)[0]:
    return None
  basis_RxN = _leading_directions(gram_NxN, _ROUNDS)
  rank, sigma = _gain(basis_RxN, gram_NxN, rows)
  if not rank:
    return None
  norm_R = np.square(basis_RxN[:rank]).sum(axis=1)
  basis_RxN = basis_RxN[:rank]
  # A's unit is a step of `_STEP_SIGMAS` σ along B's direction, the same for all directions.
  per_unit = _STEP_SIGMAS * sigma / (_BASIS_LEVEL * np.sqrt(columns))
  factor = int(np.clip(np.rint(per_unit * PHASES * 2**FACTOR_BITS), 1, _FACTOR_LIMIT))
  a_MxR = np.rint(np.matmul(tall_MxN, basis_RxN.T) / (norm_R * (factor / (PHASES * 2**FACTOR_BITS))))
  return Mean(np.clip(a_MxR, -_A_LIMIT, _A_LIMIT).astype(np.int32), basis_RxN.astype(np.int32), factor, flipped)


def fit_widths(residual_MxN: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
  """Returns column classes, row classes (added to them in units of ROW_STEP), and about how many bits values then take.

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
  choices = ((_cheapened(square_MxN, plain_N, flat_M), flat_M), (_cheapened(square_MxN, column_N, row_M), row_M))
  return min(((*classes, _bits(square_MxN, *classes)) for classes in choices), key=lambda choice: choice[-1])


def _mean_bits(mean: Mean) -> float:
  """About what it takes to store the factors."""
  counts = [np.unique(a_M, return_counts=True)[1] for a_M in mean.a_MxR.T]
  rows = mean.a_MxR.shape[0]
  return _BASIS_BITS * mean.b_RxN.size + sum(_HEADER_BITS - float(np.sum(c * np.log2(c / rows))) for c in counts)


def _gain(basis_RxN: np.ndarray, gram_NxN: np.ndarray, rows: int) -> tuple[int, float]:
  """(how many of the directions save more than they cost, standard deviation of what remains after them).

  Normal approximation: a direction shortens every value; its coefficient in each row and its entries must be stored.
  """
  columns = gram_NxN.shape[0]
  total = float(np.trace(gram_NxN))
  energy_R = (np.matmul(basis_RxN, gram_NxN) * basis_RxN).sum(axis=1) / np.square(basis_RxN).sum(axis=1)
  left_R = np.maximum(total - np.cumsum(energy_R), total / 1024)
  sigma_R = np.sqrt(left_R / (rows * columns))
  saved_R = 0.5 * rows * columns * np.log2(total / left_R)
  coefficient_R = np.sqrt(energy_R / rows) / (_STEP_SIGMAS * sigma_R)
  # The last term is what rounding the coefficients adds to the values.
  per_row_R = 2.05 + 0.5 * np.log2(coefficient_R**2 + 1 / 12) + 0.25
  cost_R = np.cumsum(rows * per_row_R + columns * _BASIS_BITS + _HEADER_BITS)
  best = int(np.argmax(saved_R - cost_R))
  return (best + 1, float(sigma_R[best])) if saved_R[best] > 1.01 * cost_R[best] else (0, 0.0)


def _leading_directions(gram_NxN: np.ndarray, rounds: int) -> np.ndarray:
  """Whole-number directions [MAX_RANK, N] near the leading eigenvectors, by falling eigenvalue, nearly orthogonal.

  Subspace iteration in which the basis is rounded to 15 bits after every product, so that no sum is ever inexact.
  """
  columns = gram_NxN.shape[0]
  # Any start that is not orthogonal to the leading eigenvectors will do: the columns with the largest values.
  basis_RxN = np.zeros((MAX_RANK, columns))
  basis_RxN[np.arange(MAX_RANK), np.argsort(-np.diagonal(gram_NxN), kind="stable")[:MAX_RANK]] = 1
  gram_NxN = np.rint(gram_NxN * (2.0**26 / max(float(np.abs(gram_NxN).max()), 1.0)))
  for _ in range(rounds):
    basis_RxN = _orthogonal(np.matmul(basis_RxN, gram_NxN))
  # Rows differ in length: each has the same largest entry.
  length_R = np.maximum(np.square(basis_RxN).sum(axis=1), 1)
  energy_R = (np.matmul(basis_RxN, gram_NxN) * basis_RxN).sum(axis=1) / length_R
  basis_RxN = basis_RxN[np.argsort(-energy_R, kind="stable")]
  norm_Rx1 = np.maximum(np.sqrt(np.square(basis_RxN).sum(axis=1, keepdims=True)), 1)
  coarse_RxN = np.clip(np.rint(basis_RxN * (_BASIS_LEVEL * np.sqrt(columns) / norm_Rx1)), -B_LIMIT, B_LIMIT)
  coarse_RxN[~coarse_RxN.any(axis=1), 0] = 1
  return coarse_RxN


def _orthogonal(basis_RxN: np.ndarray) -> np.ndarray:
  """Gram-Schmidt, each row rounded to whole numbers of at most 2^14."""
  done: list[np.ndarray] = []
  for row_N in basis_RxN:
    row_N = _rounded(row_N)
    for other_N in done:
      row_N = row_N - np.rint(other_N * (np.dot(row_N, other_N) / max(np.dot(other_N, other_N), 1.0)))
    done.append(_rounded(row_N))
  return np.stack(done)


def _rounded(row_N: np.ndarray) -> np.ndarray:
  return np.rint(row_N * (2.0**14 / max(float(np.abs(row_N).max()), 1.0)))


def _class_of(variance: np.ndarray) -> np.ndarray:
  """Width class of values whose variance before rounding is given, in 1/_UNIT; 0 or less is the narrowest."""
  return np.searchsorted(_BOUNDS, variance).astype(np.int32)


def _inverse_variance(classes: np.ndarray) -> np.ndarray:
  """2^20/σ², whole; σ within 2^-16 … 2^16."""
  return _INVERSE_VARIANCE[np.clip(classes, -CLASSES, 2 * CLASSES - 1) + CLASSES]


def _cheapened(square_MxN: np.ndarray, column_N: np.ndarray, row_M: np.ndarray) -> np.ndarray:
  """Column classes after each column may change to a common one: a cheaper name against values that fit less well."""
  rows = len(row_M)
  column_square_N = _column_squares(square_MxN, row_M)
  for _ in range(4):
    used_U, inverse_N, count_U = np.unique(column_N, return_inverse=True, return_counts=True)
    name_U = np.log2(len(column_N) / count_U)
    value_NxU = rows * used_U / ans.STEPS + np.outer(column_square_N, _HALF_LOG2E * _inverse_variance(used_U) / 2**20)
    chosen_N = np.argmin(value_NxU + name_U, axis=1)
    if np.array_equal(chosen_N, inverse_N):
      break
    column_N = used_U[chosen_N]
  return column_N


def _column_squares(square_MxN: np.ndarray, row_M: np.ndarray) -> np.ndarray:
  """Σ over rows of squares, each in units of its row's variance."""
  return np.matmul(_inverse_variance(CENTRE + ROW_STEP * row_M), square_MxN) / 2**20 / _UNIT


def _bits(square_MxN: np.ndarray, column_N: np.ndarray, row_M: np.ndarray) -> float:
  """Bits of normal values under these classes, up to a constant, and of the classes themselves."""
  columns, rows = len(column_N), len(row_M)
  widths = (rows * int(column_N.sum()) + columns * ROW_STEP * int(row_M.sum())) / ans.STEPS
  spread = np.sum(_column_squares(square_MxN, row_M) * _inverse_variance(column_N)) / 2**20
  names = 0.0
  for classes in (column_N, row_M):
    count_U = np.unique(classes, return_counts=True)[1]
    names -= float(np.sum(count_U * np.log2(count_U / len(classes))))
  return widths + _HALF_LOG2E * spread + names
