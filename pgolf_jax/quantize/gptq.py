"""GPTQ: round a matrix column by column and compensate each column's error in the columns that follow.

Method: Frantar et al., "GPTQ" (2022), https://arxiv.org/abs/2210.17323, with a per-row grid whose step comes from the
row's standard deviation (recipe section 4). Letters: see `pgolf_jax.quantize`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float16, Int8, Int32

from pgolf_jax.errors import UserError

NO_FACTOR = np.int8(-128)
"""In the place of an integer; no grid reaches as far."""


class Grids(NamedTuple):
  """The grids of a stack of matrices: integers −levels … levels times a step per row, a finer one in some columns."""

  step_QxM: Float16[Array, "Q M"]
  levels_Q: Float[Array, " Q"]
  fine_step_QxM: Float16[Array, "Q M"]  # of the columns marked in `is_fine_QxN`; unused where none is
  fine_levels_Q: Float[Array, " Q"]
  is_fine_QxN: Bool[Array, "Q N"]


@functools.partial(jax.jit, static_argnames=("block",))
def gptq(
  weight_QxMxN: Float[Array, "Q M N"],
  hessian_QxNxN: Float[Array, "Q N N"],
  grids: Grids,
  *,
  damping: float = 0.01,
  block: int = 128,
) -> Int8[Array, "Q M N"]:
  """Returns integers q with Ŵ = q · step for a stack of independent matrices of one shape.

  Columns are taken in order of falling Hessian diagonal. With U from `inverse_factor` of the damped Hessian, column j
  becomes q = clip(round(w/s), −r, r); its error e = (w − q·s)/U_jj is then taken out of later columns, w_k −= e·U_jk.
  Inputs that never fired (H_jj = 0) get the column 0. Where the damped Hessian has no factor all integers are
  `NO_FACTOR`.

  Args:
    weight_QxMxN: fp32 matrices that act as y = x Wᵀ.
    hessian_QxNxN: Σ xxᵀ of each matrix's inputs, fp32; its scale has no effect.
    grids: step s and levels r of each row and column.
    damping: share of the Hessian's mean diagonal that is added to its diagonal.
    block: columns whose errors are held back from the rest of the matrix until all of them are done.
  """
  grids = grids._replace(
    step_QxM=grids.step_QxM.astype(jnp.float32), fine_step_QxM=grids.fine_step_QxM.astype(jnp.float32)
  )
  return jax.vmap(functools.partial(_quantize_matrix, damping=damping, block=block))(weight_QxMxN, hessian_QxNxN, grids)


def require_factor(name: str, is_finite: bool, damping: float) -> None:
  """Raises UserError if the damped Hessian of a matrix had no finite factor."""
  if not is_finite:
    raise UserError(
      f"The Hessian of {name} has no factor with quantize.damping = {damping:g}; take more damping (the recipe has "
      "0.01) or more calibration batches."
    )


def row_step(weight_MxN: np.ndarray, clip_sigmas: float, levels: int) -> np.ndarray:
  """Returns the fp16 grid step of each row: `clip_sigmas` · (unbiased standard deviation of the row) / `levels`.

  Computed on the host, in float64: a step is stored in the artifact and must be the same on every machine.
  """
  std_M = np.std(weight_MxN, axis=-1, ddof=1, dtype=np.float64).astype(np.float32)
  step_M = np.float32(clip_sigmas) * std_M / np.float32(levels)
  return np.maximum(step_M, np.float32(1e-10)).astype(np.float16)


def inverse_factor(hessian_NxN: Float[Array, "N N"]) -> Float[Array, "N N"]:
  """Returns the upper U with UᵀU = H⁻¹, for positive definite H.

  From the reversed matrix: with J the reversal, JHJ = LLᵀ gives H = RRᵀ for the upper R = JLJ, and U = R⁻¹. That takes
  one factorisation and one triangular solve; to invert H and factor the inverse would lose digits twice.
  """
  lower_NxN = jnp.linalg.cholesky(hessian_NxN[::-1, ::-1])
  identity_NxN = jnp.eye(hessian_NxN.shape[0], dtype=hessian_NxN.dtype)
  return jax.scipy.linalg.solve_triangular(lower_NxN, identity_NxN, lower=True)[::-1, ::-1]


def column_order(hessian_NxN: Float[Array, "N N"], damping: float) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the order in which columns are taken, the `inverse_factor` in that order, and which inputs never fired.

  Columns go by falling diagonal of the damped Hessian. `damping` is the share of its mean diagonal that is added.
  """
  dead_N = jnp.diagonal(hessian_NxN) == 0
  damped_NxN = hessian_NxN + jnp.diag(dead_N.astype(hessian_NxN.dtype))
  damped_NxN += damping * jnp.mean(jnp.diagonal(damped_NxN)) * jnp.eye(len(damped_NxN), dtype=hessian_NxN.dtype)
  order_N = jnp.argsort(jnp.diagonal(damped_NxN), descending=True, stable=True)
  return order_N, inverse_factor(damped_NxN[order_N][:, order_N]), dead_N


def round_columns(
  work_NxM: Float[Array, "N M"],
  factor_NxN: Float[Array, "N N"],
  round_column: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
  *,
  block: int,
) -> Int32[Array, "N M"]:
  """Returns the integers of a transposed matrix, column by column, each with the errors of those before it repaid.

  Args:
    work_NxM: the columns, one to a row of memory, in the order in which they are taken.
    factor_NxN: U of that order.
    round_column: (index of a column, its values [M]) → its integers and the values that they stand for, [M] each. It is
      also called for columns of zeros from N to the next multiple of `block`.
    block: columns whose errors are held back from the rest of the matrix until all of them are done.
  """
  columns = len(work_NxM)
  # Padding columns: zeros that nothing is coupled to.
  padded = -columns % block
  factor_NxN = jnp.pad(factor_NxN, ((0, padded), (0, padded)))
  factor_NxN += jnp.diag((jnp.arange(columns + padded) >= columns).astype(factor_NxN.dtype))
  work_NxM = jnp.pad(work_NxM, ((0, padded), (0, 0)))

  def round_block(index, carry):
    work_NxM, q_NxM = carry
    start = index * block
    factor_JxN = jax.lax.dynamic_slice_in_dim(factor_NxN, start, block)
    factor_JxJ = jax.lax.dynamic_slice_in_dim(factor_JxN, start, block, axis=1)

    def round_one(j, carry):
      work_JxM, q_JxM, error_JxM = carry
      column_M = work_JxM[j]
      q_M, value_M = round_column(start + j, column_M)
      error_M = (column_M - value_M) / factor_JxJ[j, j]
      # Columns before j stay as they are: the factor is zero below its diagonal.
      work_JxM = work_JxM - factor_JxJ[j][:, None] * error_M
      return work_JxM, q_JxM.at[j].set(q_M.astype(jnp.int32)), error_JxM.at[j].set(error_M)

    work_JxM = jax.lax.dynamic_slice_in_dim(work_NxM, start, block)
    start_carry = work_JxM, jnp.zeros(work_JxM.shape, jnp.int32), jnp.zeros_like(work_JxM)
    _, q_JxM, error_JxM = jax.lax.fori_loop(0, block, round_one, start_carry)
    later_N = jnp.arange(columns + padded) >= start + block
    repaid_NxM = jnp.matmul(jnp.where(later_N, factor_JxN, 0.0).T, error_JxM, precision=jax.lax.Precision.HIGHEST)
    return work_NxM - repaid_NxM, jax.lax.dynamic_update_slice_in_dim(q_NxM, q_JxM, start, axis=0)

  blocks = (columns + padded) // block
  start_carry = work_NxM, jnp.zeros(work_NxM.shape, jnp.int32)
  return jax.lax.fori_loop(0, blocks, round_block, start_carry)[1][:columns]


def _quantize_matrix(weight_MxN, hessian_NxN, grids: Grids, *, damping, block):
  """`gptq` of one matrix, on transposes: a column of the matrix is then a row in memory."""
  step_M, levels, fine_step_M, fine_levels, is_fine_N = grids
  order_N, factor_NxN, dead_N = column_order(hessian_NxN, damping)
  is_fine_N = jnp.pad(is_fine_N[order_N], (0, -len(order_N) % block))

  def round_column(j, column_M):
    column_step_M = jnp.where(is_fine_N[j], fine_step_M, step_M)
    bound = jnp.where(is_fine_N[j], fine_levels, levels)
    # A row of zeros has step 0: its integers are 0, not 0/0.
    ratio_M = jnp.where(column_step_M > 0, column_M / column_step_M, 0.0)
    q_M = jnp.clip(jnp.round(ratio_M), -bound, bound)
    return q_M, q_M * column_step_M

  work_NxM = jnp.where(dead_N[:, None], 0.0, weight_MxN.T)[order_N]
  q_NxM = round_columns(work_NxM, factor_NxN, round_column, block=block)
  q_MxN = q_NxM[jnp.argsort(order_N)].T.astype(jnp.int8)
  return jnp.where(jnp.isfinite(factor_NxN).all(), q_MxN, NO_FACTOR)
