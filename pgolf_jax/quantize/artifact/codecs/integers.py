"""Integers of any size under laws with an escape: matrices whose steps are known, and other arrays.

Beyond a law's reach a value is escaped and stored as it is; of wide values the low bits are. No alphabet has more than
a few hundred symbols, whatever the range of the values.

The step of a row or column predicts the width of its integers: an octave finer makes them an octave wider. Width
classes are therefore stored less that prediction. M rows, N columns.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pgolf_jax.errors import ArtifactError
from pgolf_jax.quantize.artifact.codecs import ans
from pgolf_jax.quantize.artifact.codecs.ans import (
  CENTRE,
  PHASE_BITS,
  PHASES,
  RAW,
  SHAPES,
  STEPS,
  Distribution,
  Reader,
  Writer,
  distribution,
  put_bits,
  put_counted,
  put_number,
  take_bits,
  take_counted,
  take_number,
)
from pgolf_jax.quantize.artifact.codecs.grids import FACTOR_BITS, MAX_RANK, ROW_STEP, Mean, Model, put_mean, take_mean
from pgolf_jax.quantize.artifact.codecs.trellis import cells, parities

WIDTHS = 26 * STEPS
"""Width classes: σ from 2^-4 to 2^22."""
WIDE = CENTRE + 4 * STEPS
"""First width class of which low bits are stored as they are."""
LIMIT = 1 << 24
"""Integers are smaller than this in size."""
_ESCAPE_WEIGHT = 1 << 12  # of a law's 2^26
ESCAPE_BITS = 26
_MOST_EXPONENT = 200  # of a mean
_EVEN_WIDTH = CENTRE + STEPS // 2  # from here on odd and even values are equally frequent
COUNTED = len(SHAPES)  # in place of a shape: values under counts
MOST_BACK = 127
"""Arrays before an array that it may be stored by."""
SLOPES = 8
_PLANS = (MOST_BACK + 1, SLOPES, len(SHAPES) + 1, WIDTHS, PHASES)
_PLAN_BITS = 23  # 2^23 is more than their product
MOST_COUNTED = 512  # values from the least to the largest
_SLAB = 1 << 19  # values that are sorted by their laws at a time
_FREE_PIECES, _VALUES_PER_PIECE = 1 << 15, 1 << 7  # of a stream


class Steps(NamedTuple):
  """The steps of a matrix, by which the widths of its integers are predicted, and which columns have a trellis."""

  row_M: np.ndarray  # int32, in units of ROW_STEP width classes
  column_N: np.ndarray
  trellis_N: np.ndarray | None = None  # bool; None without any
  trellis_M: np.ndarray | None = None  # bool: rows that take part in it


class Law(NamedTuple):
  width: int  # 0 … WIDTHS − 1
  shape: int
  phase: int = 0
  low: int = -1  # lowest bit of the values if it is known


class _Prepared(NamedTuple):
  shift: int  # low bits that are stored as they are
  known: int  # 1 if the lowest bit is known, and the law has every other value only
  first: int  # value of the first symbol
  escape: int  # last symbol
  model: Distribution


@functools.lru_cache(maxsize=2048)
def _prepared(law: Law) -> _Prepared:
  shift, first, weights = shift_of(law.width), -reach_of(law.width), law_weights(*law[:3])
  known = int(law.low >= 0 and not shift)
  if known:
    first += first + law.low & 1
    weights = np.append(weights[first + reach_of(law.width) : -1 : 2], weights[-1])
  return _Prepared(shift, known, first, len(weights) - 1, distribution(weights))


def shift_of(width: int) -> int:
  """Returns how many low bits of a value are stored as they are."""
  return max(0, (width - WIDE) // STEPS + 1)


def reach_of(width: int) -> int:
  """Returns the largest size of the rest of a value that is not escaped."""
  return 8 + int(8 * ans.sigma(width - STEPS * shift_of(width)))


def law_weights(width: int, shape: int, phase: int) -> np.ndarray:
  """Returns the weights of −reach … reach and of the escape."""
  reach = reach_of(width)
  return np.append(ans.weights(width - STEPS * shift_of(width), shape, phase, -reach, reach), _ESCAPE_WEIGHT)


def put_values(writer: Writer, values: np.ndarray, law: Law) -> None:
  """Writes values below 2^25 in size under one law."""
  shift, known, first, escape, model = _prepared(law)
  if shift:
    values = values + (1 << shift >> 1)
    skip = int(law.low >= 0)
    put_bits(writer, values >> skip, shift - skip)
    values = values >> shift
  symbols = values - first >> known
  escaped = (symbols < 0) | (symbols >= escape)
  writer.put(np.where(escaped, escape, symbols), model)
  if escaped.any():
    put_bits(writer, values[escaped] + (1 << ESCAPE_BITS - 1), ESCAPE_BITS)


def take_values(reader: Reader, count: int, law: Law) -> np.ndarray:
  shift, known, first, escape, model = _prepared(law)
  low = 0
  if shift:
    half, skip = 1 << shift >> 1, int(law.low >= 0)
    low = take_bits(reader, count, shift - skip) << skip
    low += (law.low + half & skip) - half
  values = reader.take(count, model)
  escaped = values == escape
  values <<= known
  values += first
  if escaped.any():
    values[escaped] = take_bits(reader, int(escaped.sum()), ESCAPE_BITS) - (1 << ESCAPE_BITS - 1)
  return (values << shift) + low


class Plan(NamedTuple):
  """How an array is stored: less `centre` and (slope + 1) / 4 times the `back`-th array before it, under a law."""

  back: int  # 0: no other
  slope: int
  centre: int
  law: Law  # of shape COUNTED: under counts, from 0 on

  def base(self, flat: Sequence[np.ndarray]) -> np.ndarray:
    """Returns what the values are stored less than, given the arrays before, flat."""
    return self.centre + (flat[-self.back] * (self.slope + 1) >> 2 if self.back else np.int32(0))


def put_integers(writer: Writer, arrays: Sequence[np.ndarray], plans: Sequence[Plan]) -> None:
  """Writes arrays of integers below LIMIT in size."""
  flat = [array.reshape(-1).astype(np.int32) for array in arrays]
  for i, plan in enumerate(plans):
    law, values = plan.law, flat[i] - plan.base(flat[:i])
    place = np.ravel_multi_index((plan.back, plan.slope, law.shape, law.width, law.phase), _PLANS)
    put_bits(writer, np.array([place]), _PLAN_BITS)
    put_number(writer, plan.centre)
    if law.shape == COUNTED:
      most = int(values.max(initial=0))
      put_number(writer, most)
      put_counted(writer, values, most + 2)
      continue
    for first in range(0, len(values), _SLAB):
      put_values(writer, values[first : first + _SLAB], law)


def take_integers(reader: Reader, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
  """Reads what `put_integers` wrote. Raises ArtifactError on what it cannot have written."""
  flat: list[np.ndarray] = []
  for size in map(math.prod, shapes):
    place, centre = int(take_bits(reader, 1, _PLAN_BITS)[0]), take_number(reader)
    _require(place < math.prod(_PLANS) and abs(centre) <= 4 * LIMIT)
    back, slope, *law = map(int, np.unravel_index(place, _PLANS))
    plan = Plan(back, slope, centre, Law(law[1], law[0], law[2]))
    _require(back <= len(flat) and (not back or flat[-back].size == size))
    values = np.empty(size, np.int32)
    if plan.law.shape == COUNTED:
      most = take_number(reader)
      _require(0 <= most < MOST_COUNTED)
      values[...] = take_counted(reader, size, most + 2)
    else:
      for first in range(0, size, _SLAB):
        slab = values[first : first + _SLAB]
        slab[...] = take_values(reader, len(slab), plan.law)
    values += plan.base(flat)
    _require_small(values)
    flat.append(values)
  return [values.reshape(shape) for values, shape in zip(flat, shapes, strict=True)]


class MatrixModel(NamedTuple):
  """What a matrix is coded under."""

  model: Model
  shape: int
  exponent: int  # of the mean, if there is one


class MatrixModels(NamedTuple):
  """What the matrices of a stream are coded under."""

  models: Sequence[MatrixModel]
  classes: Sequence[Plan]  # of all arrays of `class_residuals`


def put_matrices(writer: Writer, arrays: Sequence[np.ndarray], steps: Sequence[Steps], models: MatrixModels) -> None:
  """Writes matrices of integers below LIMIT in size: the classes of all, then the mean and values of each."""
  budget = _Budget(arrays)
  put_integers(writer, class_residuals([model.model for model in models.models], steps), models.classes)
  for q_MxN, step, (model, shape, exponent) in zip(arrays, steps, models.models, strict=True):
    put_number(writer, shape)
    put_number(writer, model.rank)
    if model.mean is not None:
      put_number(writer, exponent)
      put_mean(writer, model.mean)
    for slab in _slabs(model, shape, step):
      values_NxM = q_MxN.T[slab.column] - slab.whole_NxM
      bit_KxL = (values_NxM[slab.trellis] & 1).astype(np.uint8)
      for place, law in budget.spend(slab.bit_pieces()):
        writer.put(bit_KxL.reshape(-1)[place], law)
      order, laws, shift_NxM = slab.value_pieces(bit_KxL)
      values = (values_NxM - shift_NxM).reshape(-1)[order]
      for first, end, law in budget.spend(laws):
        put_values(writer, values[first:end], law)


def take_matrices(reader: Reader, shapes: Sequence[tuple[int, ...]], steps: Sequence[Steps]) -> list[np.ndarray]:
  """Reads what `put_matrices` wrote. Raises ArtifactError on what it cannot have written."""
  arrays = [np.empty(shape, np.int32) for shape in shapes]
  budget = _Budget(arrays)
  classes = take_integers(reader, [array.shape for step in steps for array in (step.column_N, step.row_M)])
  for q_MxN, step, classes_N, classes_M in zip(arrays, steps, classes[::2], classes[1::2], strict=True):
    shape, rank = take_number(reader), take_number(reader)
    _require(0 <= shape < len(SHAPES) and 0 <= rank <= MAX_RANK)
    mean = None
    if rank:
      exponent = take_number(reader)
      _require(abs(exponent) <= _MOST_EXPONENT)
      mean = scaled(take_mean(reader, q_MxN.shape, rank), exponent, step)
    model = Model(mean, classes_N - ROW_STEP * step.column_N, classes_M - step.row_M)
    for slab in _slabs(model, shape, step):
      bit_KxL = np.empty(slab.width_NxM[slab.trellis].shape, np.uint8)
      for place, law in budget.spend(slab.bit_pieces()):
        bit_KxL.reshape(-1)[place] = reader.take(len(place), law)
      order, laws, shift_NxM = slab.value_pieces(bit_KxL)
      values = np.empty(len(order), np.int32)
      for first, end, law in budget.spend(laws):
        values[order[first:end]] = take_values(reader, end - first, law)
      values = values.reshape(slab.width_NxM.shape)
      values += shift_NxM
      values += slab.whole_NxM
      q_MxN[:, slab.column] = values.T
    _require_small(q_MxN)
  return arrays


def powers(classes: np.ndarray) -> np.ndarray:
  """Returns the steps of these classes, float64."""
  return np.array([ans.sigma(CENTRE + ROW_STEP * k) for k in classes.tolist()])


def scaled(mean: Mean, exponent: int, step: Steps) -> Mean:
  """Returns the mean in units of the steps, of one that is 2^exponent times that of the weights."""
  row_M, column_N = (powers(-steps) for steps in step[:2])
  row_M *= math.ldexp(mean.factor, -FACTOR_BITS - exponent)
  return dataclasses.replace(mean, scales=(row_M, column_N))


def class_residuals(models: Sequence[Model], steps: Sequence[Steps]) -> list[np.ndarray]:
  """Returns of each matrix the columns' and the rows' classes less what their steps predict, one after the other."""
  pairs = zip(models, steps, strict=True)
  return [x for model, step in pairs for x in (model.column_N + ROW_STEP * step.column_N, model.row_M + step.row_M)]


def _slabs(model: Model, shape: int, step: Steps) -> "Iterator[_Slab]":
  """Yields some columns at a time."""
  columns = max(1, _SLAB // max(1, len(model.row_M)))
  for start in range(0, len(model.column_N), columns):
    yield _Slab(model, shape, slice(start, start + columns), step)


class _Slab:
  """Some columns of a matrix: what is known of their values before they are read. Arrays are [columns, rows].

  Under a trellis the lowest bits of values (less the whole part of their mean) come first. All parities follow from
  them, and move the means by half a step.
  """

  def __init__(self, model: Model, shape: int, column: slice, step: Steps):
    self._shape, self.column = shape, column
    self.trellis = np.s_[:0]  # index of the K · L values under a trellis
    if step.trellis_N is not None:
      self.trellis = cells(step.trellis_N[column] != 0, step.trellis_M != 0)
    width_NxM = np.add.outer(model.column_N[column], ROW_STEP * model.row_M)
    self.width_NxM = np.clip(width_NxM, 0, WIDTHS - 1, out=width_NxM).astype(np.uint16)
    mean_NxM = np.zeros((1, 1), np.int32) if model.mean is None else model.mean.phases(column=column)
    if model.mean is not None:
      # A phase is nothing to a law so wide that low bits are stored as they are.
      wide_NxM = self.width_NxM >= WIDE
      mean_NxM[wide_NxM] = mean_NxM[wide_NxM] + PHASES // 2 & -PHASES
    self.whole_NxM, self._phase_NxM = mean_NxM >> PHASE_BITS, (mean_NxM & PHASES - 1).astype(np.uint16)

  def bit_pieces(self) -> list[tuple[np.ndarray, Distribution]]:
    """Returns [(places, law)] of the lowest bits of the values under a trellis."""
    width_KxL, phase_KxL = self.width_NxM[self.trellis], self._under_trellis(self._phase_NxM)
    key_KxL = np.where(width_KxL < _EVEN_WIDTH, width_KxL * PHASES + phase_KxL, _EVEN_WIDTH * PHASES)
    order, pieces = _grouped(key_KxL)
    return [(order[a:b], _bit_law(key // PHASES, self._shape, key % PHASES)) for key, a, b in pieces]

  def _under_trellis(self, values_NxM: np.ndarray) -> np.ndarray:
    return values_NxM[self.trellis] if values_NxM.size > 1 else values_NxM

  def value_pieces(self, bit_KxL: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int, Law]], np.ndarray]:
    """Returns (order of all values by law, [(first, end, law)] in that order, what parities add to the whole mean).

    Args:
      bit_KxL: lowest bits of the values under a trellis, uint8.
    """
    key_NxM = (self.width_NxM * PHASES + self._phase_NxM) * 3
    shift_NxM = np.zeros((1, 1), np.int32)
    if bit_KxL.size:
      whole, phase = map(self._under_trellis, (self.whole_NxM, self._phase_NxM))
      parity_KxL = parities((bit_KxL ^ (whole & 1).astype(np.uint8)).T).T
      # Half a step less: phases below the half come from the whole number before.
      width_KxL = self.width_NxM[self.trellis]
      moved_KxL = (parity_KxL & (width_KxL < WIDE)).astype(np.uint16)
      before_KxL = moved_KxL & (phase < PHASES // 2)
      key_KxL = width_KxL * PHASES + (phase ^ PHASES // 2 * moved_KxL)
      key_NxM[self.trellis] = key_KxL * 3 + 1 + (bit_KxL ^ before_KxL)
      shift_NxM = np.zeros(self.width_NxM.shape, np.int32)
      shift_NxM[self.trellis] -= before_KxL
    order, pieces = _grouped(key_NxM)
    laws = [(a, b, Law(key // 3 // PHASES, self._shape, key // 3 % PHASES, key % 3 - 1)) for key, a, b in pieces]
    return order, laws, shift_NxM


def _grouped(key_NxM: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
  """(order by uint16 keys, [(key, first, end)] in that order)."""
  key = key_NxM.reshape(-1)
  ends = itertools.pairwise([0, *np.cumsum(np.bincount(key)).tolist()])
  return np.argsort(key, kind="stable"), [(k, first, end) for k, (first, end) in enumerate(ends) if first < end]


@functools.lru_cache(maxsize=1024)
def _bit_law(width: int, shape: int, phase: int) -> Distribution:
  """Law of the lowest bit of values of either parity."""
  if width >= _EVEN_WIDTH:
    return RAW[1]
  odd = []
  for moved in (phase, phase ^ PHASES // 2):
    weights = law_weights(width, shape, moved)[:-1]
    is_other = moved > phase  # these values are one more
    odd.append(int(weights[reach_of(width) + 1 + is_other & 1 :: 2].sum() * (1 << 26) // weights.sum()))
  return distribution(np.array([(1 << 27) - sum(odd), sum(odd)]) + 1)


class _Budget:
  """Refuses a stream that is cut into so many pieces that reading them would take minutes."""

  def __init__(self, arrays: Sequence[np.ndarray]):
    self._left = _FREE_PIECES + sum(array.size for array in arrays) // _VALUES_PER_PIECE

  def spend(self, pieces: list) -> list:
    self._left -= len(pieces)
    _require(self._left >= 0)
    return pieces


def _require_small(values: np.ndarray) -> None:
  _require(values.min(initial=0) > -LIMIT and values.max(initial=0) < LIMIT)


def _require(condition: bool) -> None:
  if not condition:
    raise ArtifactError("A stream of the artifact holds integers or laws beyond all bounds: it is damaged.")
