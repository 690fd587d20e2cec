"""The `rate` quantiser: steps where the loss says, for a file that is entropy coded (docs/quantizer.md).

What a weight costs in the file is its entropy, not its bit width: log2 of its spread over its step. An error of half a
step costs loss by the curvature of `pgolf_jax.quantize.fisher`. The step of weight (i, j) is

  s_ij = c · U_jj / √d_i

with U the factor by which GPTQ repays errors, d_i the row's weight, and one c for the whole model. Each weight then
adds c²/24 to the loss, which at high rate is the least loss for the bytes (reverse waterfilling). Steps are rounded to
quarters of an octave, a class for each row and each column. Letters: see `pgolf_jax.quantize`.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from pgolf_jax.errors import UserError
from pgolf_jax.quantize.artifact.codecs.trellis import NEXT, PARITY, SEGMENT
from pgolf_jax.quantize.artifact.tensors import MAX_STEP, OCTAVE, Even, Half, LogGrid, Quantized, log_step
from pgolf_jax.quantize.fisher import Statistics
from pgolf_jax.quantize.gptq import column_order, require_factor, round_columns
from pgolf_jax.runtime.log import Progress, progress
from pgolf_jax.settings import QuantizeConfig

_LARGEST = 2**24 - 2  # of an integer: an artifact holds one more, to which a trellis may round
_NORMAL_BITS = 2.05  # of a normal value in steps of its standard deviation
_TRELLIS_BITS = 1.0  # a value; where it takes fewer, most are 0, which only half of a trellis's states can take
_MOST_RIDGE = 1.0  # of the mean diagonal
_COARSEST = 1 / 8  # step of a small parameter over its root mean square
_FLOOR = 2.0**-60  # of a curvature: that of a parameter which nothing reads


class TooFine(UserError):
  """A step that makes integers larger than an artifact can hold."""


class _Batch(NamedTuple):
  """Matrices of one shape that are rounded together, and their curvatures."""

  names: list[str]
  hessian_QxNxN: Float[Array, "Q N N"]  # on whose diagonal inputs that never fire have the mean of those that do
  fires_QxN: Bool[np.ndarray, "Q N"]  # whether an input ever does
  row_QxM: Float[np.ndarray, "Q M"]  # log2 √d_i


STAGES = (".mlp.proj.", ".mlp.fc.", ".attn.", "")
"""Parts of a parameter's name, by the stage in which it is rounded where the rest learns in between."""


class Tuner(Protocol):
  """Moves weights that are not rounded yet to where they make up for those that are; see `tuning`."""

  def divergence(self, weights: Mapping[str, np.ndarray]) -> float:
    """Returns how far a model is from the one without errors."""

  def tune(
    self, weights: Mapping[str, np.ndarray], error: Mapping[str, float], *, steps: int, stage: int
  ) -> Mapping[str, np.ndarray]:
    """Returns the weights after tuning those whose errors are given."""


class Solver:
  """A model's weights and curvatures; `solve` rounds them at a step."""

  def __init__(self, weights: Mapping[str, np.ndarray], statistics: Statistics, config: QuantizeConfig):
    """Takes fp32 matrices and other parameters by name (`unbank`).

    Raises:
      UserError: the statistics are another model's.
    """
    if missing := [n for n in weights if n not in statistics.matrices and n not in statistics.small]:
      raise UserError(f"There is no curvature of {missing[0]}; measure it with this model's settings.")
    self._weights, self._small, self._config = weights, statistics.small, config
    together = defaultdict(list)
    for name in statistics.matrices:
      together[_stage(name), weights[name].shape].append(name)
    self._batches = []
    for names in together.values():
      hessian_QxNxN = np.stack([statistics.matrices[n].hessian_NxN for n in names]).astype(np.float32)
      diagonal_QxN = np.diagonal(hessian_QxNxN, axis1=1, axis2=2).copy()
      fires_QxN = diagonal_QxN != 0
      # Damping and ridge are shares of the mean diagonal, which inputs that never fire must not change.
      mean_Q = diagonal_QxN.sum(axis=1) / np.maximum(fires_QxN.sum(axis=1), 1)
      matrix, column = np.nonzero(~fires_QxN)
      hessian_QxNxN[matrix, column, column] = mean_Q[matrix]
      row_QxM = 0.5 * np.log2(np.maximum([statistics.matrices[n].row_M for n in names], _FLOOR))
      self._batches.append(_Batch(names, jnp.asarray(hessian_QxNxN), fires_QxN, row_QxM))

  def solve(self, step: float, tuner: Tuner | None = None, *, tune_steps: int = 0) -> dict[str, Quantized]:
    """Returns every parameter in its stored form, with c = `step`.

    With `tune_steps`, `STAGES` are rounded one after another, and after each the tuner is given what all parameters are
    then and the root mean square of what rounding will do to those that are still free. The stage that costs most
    comes first, as most weights are left to make up for it.

    Raises:
      TooFine: integers would be larger than an artifact can hold.
    """
    with progress("quantising", total=len(self._weights), unit="parameters") as bar:
      rounded = self._rounded(self._weights, range(len(STAGES)), step, bar)
    return self._in_stages(step, rounded, tuner, tune_steps) if tune_steps else rounded

  def _in_stages(
    self, step: float, rounded: dict[str, Quantized], tuner: Tuner, tune_steps: int
  ) -> dict[str, Quantized]:
    """The same with tuning, given what all parameters round to as they are."""
    values = {name: stored.dequantize() for name, stored in rounded.items()}
    error = {name: _rms(value - self._weights[name]) for name, value in values.items()}
    names = [[name for name in values if _stage(name) == stage] for stage in range(len(STAGES))]
    cost = [tuner.divergence({**self._weights, **{name: values[name] for name in part}}) for part in names]
    weights = dict(self._weights)
    for place, stage in enumerate(sorted(range(len(STAGES)), key=lambda stage: -cost[stage])):
      if place > 0:
        with progress("quantising", total=len(names[stage]), unit="parameters") as bar:
          rounded |= self._rounded(weights, [stage], step, bar)
      for name in names[stage]:
        weights[name] = rounded[name].dequantize()
        del error[name]
      if names[stage] and error:
        weights = dict(tuner.tune(weights, error, steps=tune_steps, stage=place))
    return rounded

  def _rounded(
    self, weights: Mapping[str, np.ndarray], stages: Collection[int], step: float, bar: Progress
  ) -> dict[str, Quantized]:
    """The parameters of some stages in their stored form."""
    log2_step = math.log2(step)
    rounded: dict[str, Quantized] = {}
    for batch in self._batches:
      if _stage(batch.names[0]) in stages:
        rounded |= self._solve_batch(weights, batch, log2_step)
        bar.advance(len(batch.names))
    names = [name for name in weights if _stage(name) in stages]
    for name in names:
      if name not in rounded:
        rounded[name] = _even(weights[name], log2_step - 0.5 * math.log2(max(self._small[name], _FLOOR)))
    return {name: rounded[name] for name in names}

  def _solve_batch(self, weights: Mapping[str, np.ndarray], batch: _Batch, log2_step: float) -> dict[str, LogGrid]:
    weight_QxMxN = np.stack([weights[n] for n in batch.names])
    # log2 of a row's root mean square.
    spread_QxM = 0.5 * np.log2(np.maximum(np.mean(np.square(weight_QxMxN, dtype=np.float64), axis=2), _FLOOR))
    # The error of a weight may be larger than the weight. A ridge of c²/12 over what the weights' own size is worth, as
    # a Wiener filter has it, then keeps the columns that follow from repaying it.
    worth_Q = 2 * np.mean(batch.row_QxM + spread_QxM, axis=1)
    ridge_Q = np.minimum(batch.fires_QxN.sum(axis=1) / 12 * np.exp2(2 * log2_step - worth_Q), _MOST_RIDGE)
    damping_Q = (self._config.damping + ridge_Q).astype(np.float32)
    weight_QxMxN = np.where(batch.fires_QxN[:, None], weight_QxMxN, 0)
    work_QxNxM, factor_QxNxN, order_QxN = _prepare(weight_QxMxN, batch.hessian_QxNxN, damping_Q)
    for name, factor_NxN in zip(batch.names, np.asarray(factor_QxNxN), strict=True):
      require_factor(name, np.isfinite(factor_NxN).all(), self._config.damping)
    pivot_QxN = np.log2(np.diagonal(np.asarray(factor_QxNxN, np.float64), axis1=1, axis2=2))
    row_QxM, column_QxN = (np.clip(_classes(x), -MAX_STEP, MAX_STEP) for x in (log2_step - batch.row_QxM, pivot_QxN))
    trellis = np.zeros(row_QxM.shape, bool), np.zeros(column_QxN.shape, bool)
    if self._config.trellis:
      trellis = _under_trellis(batch.row_QxM + spread_QxM - log2_step + _NORMAL_BITS, pivot_QxN)
    classes, has_trellis = (row_QxM, column_QxN), trellis[1].any()
    work = work_QxNxM, factor_QxNxN, order_QxN
    q_QxMxN = _round(*work, classes, trellis if has_trellis else None, block=self._config.block_size)
    q_QxMxN = np.asarray(q_QxMxN)
    if np.abs(q_QxMxN).max() >= _LARGEST:
      raise TooFine(
        f"With quantize.step = {2**log2_step:g} integers of {batch.names[0]} are larger than the {_LARGEST:,} that an "
        "artifact can hold; take a larger step."
      )
    back_QxN = np.argsort(np.asarray(order_QxN), axis=1)
    column_QxN, trellis_QxN = (np.take_along_axis(x, back_QxN, axis=1) for x in (column_QxN, trellis[1]))
    each = zip(batch.names, q_QxMxN, row_QxM, column_QxN, trellis_QxN, trellis[0], strict=True)
    return {
      name: LogGrid(q_MxN, row_M, column_N, *((trellis_N, trellis_M) if trellis_N.any() else ()))
      for name, q_MxN, row_M, column_N, trellis_N, trellis_M in each
    }


def _stage(name: str) -> int:
  return next(stage for stage, part in enumerate(STAGES) if part in name)


def _rms(x: np.ndarray) -> float:
  return math.sqrt(float(np.mean(np.square(x, dtype=np.float64)))) if x.size else 0.0


def _under_trellis(bits_QxM: np.ndarray, pivot_QxN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns which rows and which columns of each matrix are under a trellis: those of many bits.

  Args:
    bits_QxM: of a value of each row in a column of pivot 1.
    pivot_QxN: log2 of the columns' pivots.
  """
  mean_Qx1 = pivot_QxN.mean(axis=1, keepdims=True)
  trellis_QxM = bits_QxM - mean_Qx1 > _TRELLIS_BITS
  rows_Qx1 = trellis_QxM.sum(axis=1, keepdims=True)
  bits_Qx1 = (bits_QxM * trellis_QxM).sum(axis=1, keepdims=True) / np.maximum(rows_Qx1, 1)
  return trellis_QxM, (rows_Qx1 >= SEGMENT) & (bits_Qx1 - pivot_QxN > _TRELLIS_BITS)


def _classes(log2_step: np.ndarray) -> np.ndarray:
  return np.rint(OCTAVE * log2_step).astype(np.int32)


def _even(value: np.ndarray, log2_step: float) -> Even | Half:
  """A small parameter on one step, or in fp16 where that takes no more bits."""
  # A curvature says nothing of errors as large as the values: a softcap of 30 must not become 0.
  spread = _rms(value)
  if spread > 0:
    log2_step = min(log2_step, math.log2(_COARSEST * spread))
  step = int(np.clip(_classes(np.asarray(log2_step)), -MAX_STEP, MAX_STEP))
  q = np.rint(value / log_step(np.array([step]))[0])
  if np.abs(q).max(initial=0) >= 2**15:
    return Half(value.astype(np.float16))
  return Even(q.astype(np.int32), step)


@jax.jit
def _prepare(weight_QxMxN, hessian_QxNxN, damping_Q):
  """The transposed matrices with columns in order, U, and the order."""

  def prepare(weight_MxN, hessian_NxN, damping):
    order_N, factor_NxN, _ = column_order(hessian_NxN, damping)
    return weight_MxN.T[order_N], factor_NxN, order_N

  return jax.vmap(prepare)(weight_QxMxN, hessian_QxNxN, damping_Q)


@functools.partial(jax.jit, static_argnames="block")
def _round(
  work_QxNxM: Float[Array, "Q N M"],
  factor_QxNxN: Float[Array, "Q N N"],
  order_QxN: Int[Array, "Q N"],
  classes: tuple[Int[Array, "Q M"], Int[Array, "Q N"]],
  trellis: tuple[Bool[Array, "Q M"], Bool[Array, "Q N"]] | None,
  *,
  block: int,
) -> Int32[Array, "Q M N"]:
  """Returns integers on steps 2^((row + column) / OCTAVE); columns are given in the order in which they are taken.

  Args:
    classes: of rows and columns.
    trellis: which rows and columns are under a trellis; None if nothing is.
  """

  def round_matrix(work_NxM, factor_NxN, order_N, classes, trellis):
    row_M, column_N = classes
    padding = (0, -len(column_N) % block)
    column_N = jnp.pad(column_N, padding)
    if trellis is not None:
      trellis_M, trellis_N = trellis[0], jnp.pad(trellis[1], padding)
      # Rows under a trellis come first; what is done to one row depends on no other.
      row_order_M, rows = jnp.argsort(~trellis_M), trellis_M.sum()
      work_NxM, row_M = work_NxM[:, row_order_M], row_M[row_order_M]
      takes_part_M = jnp.arange(len(row_M)) < rows

    def round_column(j, column_M):
      step_M = jnp.exp2((row_M + column_N[j]) / OCTAVE)
      ratio_M = jnp.clip(column_M / step_M, -_LARGEST, _LARGEST)
      value_M = jnp.round(ratio_M)
      if trellis is not None:
        value_M = jnp.where(trellis_N[j] & takes_part_M, on_trellis(ratio_M, rows), value_M)
      return jnp.floor(value_M), value_M * step_M

    q_NxM = round_columns(work_NxM, factor_NxN, round_column, block=block)[jnp.argsort(order_N)]
    return (q_NxM if trellis is None else q_NxM[:, jnp.argsort(row_order_M)]).T

  return jax.vmap(round_matrix)(work_QxNxM, factor_QxNxN, order_QxN, classes, trellis)


def on_trellis(ratio_M: Float[Array, " M"], rows: int | Int[Array, ""]) -> Float[Array, " M"]:
  """Returns the values nearest to a column, in units of its steps, of those that a trellis can take: whole or halves.

  Each segment of rows is one path through the states, found by Viterbi's algorithm: the sum of squared errors is the
  least possible. See `trellis.parities`.

  Args:
    rows: how many of the first rows take part; what the others get has no meaning.
  """
  ratio_SxT = jnp.pad(ratio_M, (0, -len(ratio_M) % SEGMENT)).reshape(-1, SEGMENT)

  def nearest(ratio_S: jax.Array) -> jax.Array:
    """[S, state, bit]: the nearest value with the state's parity whose integer has this lowest bit."""
    offset = 0.5 * PARITY[:, None] + np.arange(2)
    return 2 * jnp.round((ratio_S[:, None, None] - offset) / 2) + offset

  def forward(cost_SxK, inputs):
    ratio_S, is_row_S = inputs
    error_SxKxB = jnp.square(ratio_S[:, None, None] - nearest(ratio_S)) * is_row_S[:, None, None]
    cost_SxKxB = cost_SxK[..., None] + error_SxKxB
    # Two ways lead into each state.
    arriving_SxKx2 = cost_SxKxB.reshape(len(ratio_S), -1)[:, _ARRIVING]
    return arriving_SxKx2.min(-1), jnp.argmin(arriving_SxKx2, -1).astype(jnp.int8)

  def backward(state_S, inputs):
    ratio_S, choice_SxK = inputs
    segment = jnp.arange(len(state_S))
    state_S, bit_S = jnp.divmod(jnp.asarray(_ARRIVING)[state_S, choice_SxK[segment, state_S]], 2)
    return state_S, nearest(ratio_S)[segment, state_S, bit_S]

  start_SxK = jnp.full((len(ratio_SxT), len(PARITY)), jnp.inf).at[:, 0].set(0.0)
  is_row_TxS = (jnp.arange(ratio_SxT.size) < rows).astype(ratio_M.dtype).reshape(ratio_SxT.shape).T
  cost_SxK, choice_TxSxK = jax.lax.scan(forward, start_SxK, (ratio_SxT.T, is_row_TxS))
  inputs = ratio_SxT.T, choice_TxSxK
  value_TxS = jax.lax.scan(backward, jnp.argmin(cost_SxK, -1), inputs, reverse=True)[1]
  return value_TxS.T.reshape(-1)[: len(ratio_M)]


# [state, 2]: the two pairs of state before and lowest bit, as 2 · state + bit, that lead into a state.
_ARRIVING = np.stack([np.flatnonzero(NEXT.reshape(-1) == state) for state in range(len(PARITY))])
