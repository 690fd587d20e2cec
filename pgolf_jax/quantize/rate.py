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
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from pgolf_jax.errors import UserError
from pgolf_jax.quantize.artifact.codecs.integers import NEXT, PARITY, SEGMENT
from pgolf_jax.quantize.artifact.tensors import OCTAVE, Even, Half, LogGrid, Quantized, log_step
from pgolf_jax.quantize.fisher import Statistics
from pgolf_jax.quantize.gptq import column_order, round_columns
from pgolf_jax.runtime.log import progress
from pgolf_jax.settings import QuantizeConfig

_LARGEST = 2**24 - 1  # of an integer, which fp32 holds exactly
_NORMAL_BITS = 2.05  # of a normal value in steps of its standard deviation
_TRELLIS_BITS = 1.5  # a value; where it takes fewer, most are 0, which only half of a trellis's states can take
_FLOOR = 2.0**-60  # of a curvature: that of a parameter which nothing reads


class _Batch(NamedTuple):
  """The matrices of one shape, ready to be rounded at any c."""

  names: list[str]
  work_QxNxM: Float[Array, "Q N M"]  # transposed, columns in their order
  factor_QxNxN: Float[Array, "Q N N"]
  order_QxN: Int[Array, "Q N"]
  row_QxM: Float[np.ndarray, "Q M"]  # −½ log2 d_i
  column_QxN: Int[np.ndarray, "Q N"]  # classes, in the order of the matrix
  bits_QxN: Float[np.ndarray, "Q N"]  # about what a value of the column takes at c = 1


class Solver:
  """A model's weights and curvatures; `solve` rounds them at a step."""

  def __init__(self, weights: Mapping[str, np.ndarray], statistics: Statistics, config: QuantizeConfig):
    """Takes fp32 matrices and other parameters by name (`unbank`), and factors every curvature once.

    Raises:
      UserError: the statistics are another model's.
    """
    if missing := [n for n in weights if n not in statistics.matrices and n not in statistics.small]:
      raise UserError(f"There is no curvature of {missing[0]}; measure it with this model's settings.")
    self._weights, self._small = weights, statistics.small
    self._block, self._trellis = config.block_size, config.trellis
    by_shape = defaultdict(list)
    for name in statistics.matrices:
      by_shape[weights[name].shape].append(name)
    self._batches = []
    for names in by_shape.values():
      curvatures = [statistics.matrices[n] for n in names]
      hessian_QxNxN = np.stack([c.hessian_NxN for c in curvatures])
      work, factor, order = _prepare(
        np.stack([weights[n] for n in names]), hessian_QxNxN.astype(np.float32), config.damping
      )
      pivot_QxN = np.diagonal(np.asarray(factor, np.float64), axis1=1, axis2=2)
      column_QxN = np.empty(pivot_QxN.shape, np.int32)
      np.put_along_axis(column_QxN, np.asarray(order), _classes(np.log2(pivot_QxN)), axis=1)
      row_QxM = np.stack([-0.5 * np.log2(np.maximum(c.row_M, _FLOOR)) for c in curvatures])
      in_steps_QxMxN = np.stack([weights[n] for n in names]) * np.exp2(-row_QxM)[..., None]
      spread_QxN = np.log2(np.maximum(np.sqrt(np.mean(in_steps_QxMxN**2, axis=1)), 1e-30)) - column_QxN / OCTAVE
      self._batches.append(_Batch(names, work, factor, order, row_QxM, column_QxN, spread_QxN + _NORMAL_BITS))

  def solve(self, step: float) -> dict[str, Quantized]:
    """Returns every parameter in its stored form, with c = `step`."""
    log2_step = math.log2(step)
    rounded: dict[str, Quantized] = {}
    with progress("quantising", total=len(self._weights), unit="parameters") as bar:
      for batch in self._batches:
        row_QxM = _classes(log2_step + batch.row_QxM)
        order_QxN = np.asarray(batch.order_QxN)
        trellis_QxN = (batch.bits_QxN - log2_step > _TRELLIS_BITS) & self._trellis
        column_QxN, ordered_QxN = (
          np.take_along_axis(values, order_QxN, axis=1) for values in (batch.column_QxN, trellis_QxN)
        )
        q_QxMxN = _round(
          *batch[1:4],
          row_QxM,
          column_QxN,
          ordered_QxN,
          block=self._block,
          trellis=self._trellis,
        )
        of_each = zip(batch.names, np.asarray(q_QxMxN), row_QxM, batch.column_QxN, trellis_QxN, strict=True)
        for name, q_MxN, row_M, column_N, trellis_N in of_each:
          rounded[name] = LogGrid(q_MxN, row_M, column_N, trellis_N if trellis_N.any() else None)
        bar.advance(len(batch.names))
      for name in self._weights.keys() - rounded.keys():
        rounded[name] = _even(self._weights[name], log2_step - 0.5 * math.log2(max(self._small[name], _FLOOR)))
    return {name: rounded[name] for name in self._weights}


def _classes(log2_step: np.ndarray) -> np.ndarray:
  return np.rint(OCTAVE * log2_step).astype(np.int32)


def _even(value: np.ndarray, log2_step: float) -> Even | Half:
  """A small parameter on one step, or in fp16 where that takes no more bits."""
  step = int(_classes(np.asarray(log2_step)))
  largest = float(np.abs(value).max(initial=0)) / float(log_step(np.asarray(step)))
  if largest >= 2**15:
    return Half(value.astype(np.float16))
  return Even(np.rint(value / log_step(np.asarray(step))).astype(np.int32), step)


@jax.jit
def _prepare(weight_QxMxN, hessian_QxNxN, damping):
  """The transposed matrices with columns in order, U, and the order."""

  def prepare(weight_MxN, hessian_NxN):
    order_N, factor_NxN, dead_N = column_order(hessian_NxN, damping)
    return jnp.where(dead_N[:, None], 0.0, weight_MxN.T)[order_N], factor_NxN, order_N

  return jax.vmap(prepare)(weight_QxMxN, hessian_QxNxN)


@functools.partial(jax.jit, static_argnames=("block", "trellis"))
def _round(
  work_QxNxM: Float[Array, "Q N M"],
  factor_QxNxN: Float[Array, "Q N N"],
  order_QxN: Int[Array, "Q N"],
  row_QxM: Int[Array, "Q M"],
  column_QxN: Int[Array, "Q N"],
  trellis_QxN: Bool[Array, "Q N"],
  *,
  block: int,
  trellis: bool,
) -> Int32[Array, "Q M N"]:
  """Returns integers on steps 2^((row + column) / OCTAVE); columns are given in the order in which they are taken.

  Args:
    trellis_QxN: columns under a trellis.
    trellis: whether there are any.
  """

  def round_matrix(work_NxM, factor_NxN, order_N, row_M, column_N, trellis_N):
    padding = (0, -len(column_N) % block)
    column_N, trellis_N = jnp.pad(column_N, padding), jnp.pad(trellis_N, padding)

    def round_column(j, column_M):
      step_M = jnp.exp2((row_M + column_N[j]) / OCTAVE)
      ratio_M = jnp.clip(column_M / step_M, -_LARGEST, _LARGEST)
      value_M = jnp.round(ratio_M)
      if trellis:
        value_M = jnp.where(trellis_N[j], on_trellis(ratio_M), value_M)
      return jnp.floor(value_M), value_M * step_M

    return round_columns(work_NxM, factor_NxN, round_column, block=block)[jnp.argsort(order_N)].T

  return jax.vmap(round_matrix)(work_QxNxM, factor_QxNxN, order_QxN, row_QxM, column_QxN, trellis_QxN)


def on_trellis(ratio_M: Float[Array, " M"]) -> Float[Array, " M"]:
  """Returns the values nearest to a column, in units of its steps, of those that a trellis can take: whole or halves.

  Each segment of rows is one path through the states, found by Viterbi's algorithm: the sum of squared errors is the
  least possible. See `artifact.tensors.parities`.
  """
  rows = len(ratio_M)
  ratio_SxT = jnp.pad(ratio_M, (0, -rows % SEGMENT)).reshape(-1, SEGMENT)

  def nearest(ratio_S: jax.Array) -> jax.Array:
    """[S, state, bit]: the nearest value with the state's parity whose integer has this lowest bit."""
    offset = 0.5 * PARITY[:, None] + np.arange(2)
    return 2 * jnp.round((ratio_S[:, None, None] - offset) / 2) + offset

  def forward(cost_SxK, ratio_S):
    cost_SxKxB = cost_SxK[..., None] + jnp.square(ratio_S[:, None, None] - nearest(ratio_S))
    # Two ways lead into each state.
    arriving_SxKx2 = cost_SxKxB.reshape(len(ratio_S), -1)[:, _ARRIVING]
    return arriving_SxKx2.min(-1), jnp.argmin(arriving_SxKx2, -1).astype(jnp.int8)

  def backward(state_S, inputs):
    ratio_S, choice_SxK = inputs
    segment = jnp.arange(len(state_S))
    state_S, bit_S = jnp.divmod(jnp.asarray(_ARRIVING)[state_S, choice_SxK[segment, state_S]], 2)
    return state_S, nearest(ratio_S)[segment, state_S, bit_S]

  start_SxK = jnp.full((len(ratio_SxT), len(PARITY)), jnp.inf).at[:, 0].set(0.0)
  cost_SxK, choice_TxSxK = jax.lax.scan(forward, start_SxK, ratio_SxT.T)
  inputs = ratio_SxT.T, choice_TxSxK
  value_TxS = jax.lax.scan(backward, jnp.argmin(cost_SxK, -1), inputs, reverse=True)[1]
  return value_TxS.T.reshape(-1)[:rows]


# [state, 2]: the two pairs of state before and lowest bit, as 2 · state + bit, that lead into a state.
_ARRIVING = np.stack([np.flatnonzero(NEXT.reshape(-1) == state) for state in range(len(PARITY))])
