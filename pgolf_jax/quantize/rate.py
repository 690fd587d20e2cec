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
from jaxtyping import Array, Float, Int, Int32

from pgolf_jax.errors import UserError
from pgolf_jax.quantize.artifact.tensors import OCTAVE, Even, Half, LogGrid, Quantized, log_step
from pgolf_jax.quantize.fisher import Statistics
from pgolf_jax.quantize.gptq import column_order, round_columns
from pgolf_jax.runtime.log import progress
from pgolf_jax.settings import QuantizeConfig

_LARGEST = 2**24 - 1  # of an integer, which fp32 holds exactly
_FLOOR = 2.0**-60  # of a curvature: that of a parameter which nothing reads


class _Batch(NamedTuple):
  """The matrices of one shape, ready to be rounded at any c."""

  names: list[str]
  work_QxNxM: Float[Array, "Q N M"]  # transposed, columns in their order
  factor_QxNxN: Float[Array, "Q N N"]
  order_QxN: Int[Array, "Q N"]
  row_QxM: Float[np.ndarray, "Q M"]  # −½ log2 d_i
  column_QxN: Int[np.ndarray, "Q N"]  # classes, in the order of the matrix


class Solver:
  """A model's weights and curvatures; `solve` rounds them at a step."""

  def __init__(self, weights: Mapping[str, np.ndarray], statistics: Statistics, config: QuantizeConfig):
    """Takes fp32 matrices and other parameters by name (`unbank`), and factors every curvature once.

    Raises:
      UserError: the statistics are another model's.
    """
    if missing := [n for n in weights if n not in statistics.matrices and n not in statistics.small]:
      raise UserError(f"There is no curvature of {missing[0]}; measure it with this model's settings.")
    self._weights, self._small, self._block = weights, statistics.small, config.block_size
    by_shape = defaultdict(list)
    for name in statistics.matrices:
      by_shape[weights[name].shape].append(name)
    self._batches = []
    for names in by_shape.values():
      curvatures = [statistics.matrices[n] for n in names]
      hessian_QxNxN = np.stack([c.hessian_NxN / max(np.trace(c.hessian_NxN), 1e-300) for c in curvatures])
      work, factor, order = _prepare(
        np.stack([weights[n] for n in names]), hessian_QxNxN.astype(np.float32), config.damping
      )
      pivot_QxN = np.diagonal(np.asarray(factor, np.float64), axis1=1, axis2=2)
      column_QxN = np.empty(pivot_QxN.shape, np.int32)
      np.put_along_axis(column_QxN, np.asarray(order), _classes(np.log2(pivot_QxN)), axis=1)
      row_QxM = np.stack([-0.5 * np.log2(np.maximum(c.row_M * np.trace(c.hessian_NxN), _FLOOR)) for c in curvatures])
      self._batches.append(_Batch(names, work, factor, order, row_QxM, column_QxN))

  def solve(self, step: float) -> dict[str, Quantized]:
    """Returns every parameter in its stored form, with c = `step`."""
    log2_step = math.log2(step)
    rounded: dict[str, Quantized] = {}
    with progress("quantising", total=len(self._weights), unit="parameters") as bar:
      for batch in self._batches:
        row_QxM = _classes(log2_step + batch.row_QxM)
        column_QxN = np.take_along_axis(batch.column_QxN, np.asarray(batch.order_QxN), axis=1)
        q_QxMxN = _round(batch.work_QxNxM, batch.factor_QxNxN, batch.order_QxN, row_QxM, column_QxN, block=self._block)
        for name, q_MxN, row_M, column_N in zip(
          batch.names, np.asarray(q_QxMxN), row_QxM, batch.column_QxN, strict=True
        ):
          rounded[name] = LogGrid(q_MxN, row_M, column_N)
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


@functools.partial(jax.jit, static_argnames=("block",))
def _round(
  work_QxNxM: Float[Array, "Q N M"],
  factor_QxNxN: Float[Array, "Q N N"],
  order_QxN: Int[Array, "Q N"],
  row_QxM: Int[Array, "Q M"],
  column_QxN: Int[Array, "Q N"],
  *,
  block: int,
) -> Int32[Array, "Q M N"]:
  """Returns integers on steps 2^((row + column) / OCTAVE); columns are given in the order in which they are taken."""

  def round_matrix(work_NxM, factor_NxN, order_N, row_M, column_N):
    column_N = jnp.pad(column_N, (0, -len(column_N) % block))

    def round_column(j, column_M):
      step_M = jnp.exp2((row_M + column_N[j]) / OCTAVE)
      q_M = jnp.clip(jnp.round(column_M / step_M), -_LARGEST, _LARGEST)
      return q_M, q_M * step_M

    return round_columns(work_NxM, factor_NxN, round_column, block=block)[jnp.argsort(order_N)].T

  return jax.vmap(round_matrix)(work_QxNxM, factor_QxNxN, order_QxN, row_QxM, column_QxN)
