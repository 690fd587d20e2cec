"""GPTQ: round a matrix column by column, each column's error repaid by the columns that follow (recipe section 4).

Method: Frantar et al., "GPTQ" (2022), https://arxiv.org/abs/2210.17323, with a per-row grid whose step comes from the
row's standard deviation. Shape letters: B matrices of one shape, M outputs (rows), N inputs (columns).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float16, Int8


def row_scale(weight_MxN: np.ndarray, clip_sigmas: float, levels: int) -> np.ndarray:
  """fp16 grid step of each row: `clip_sigmas` · (unbiased standard deviation of the row) / `levels`.

  On the host, with float64 inside: every machine gets the same steps, and a step is stored in the artifact.
  """
  std_M = np.std(weight_MxN, axis=-1, ddof=1, dtype=np.float64).astype(np.float32)
  step_M = np.float32(clip_sigmas) * std_M / np.float32(levels)
  return np.maximum(step_M, np.float32(1e-10)).astype(np.float16)


def inverse_factor(hessian_NxN: Float[Array, "N N"]) -> Float[Array, "N N"]:
  """Upper U with UᵀU = H⁻¹, for positive definite H.

  From the reversed matrix: with J the reversal, JHJ = LLᵀ gives H = RRᵀ for the upper R = JLJ, and U = R⁻¹. One
  factorisation and one triangular solve, where inverting H and factoring the inverse would lose digits twice.
  """
  lower_NxN = jnp.linalg.cholesky(hessian_NxN[::-1, ::-1])
  identity_NxN = jnp.eye(hessian_NxN.shape[0], dtype=hessian_NxN.dtype)
  return jax.scipy.linalg.solve_triangular(lower_NxN, identity_NxN, lower=True)[::-1, ::-1]


def _quantize_matrix(weight_MxN, hessian_NxN, scale_M, wide_scale_M, is_wide_N, levels, wide_levels, *, damping, block):
  """One matrix; see `gptq`. Works on transposes, so that a column of the matrix is a row in memory."""
  columns = weight_MxN.shape[1]
  dead_N = jnp.diagonal(hessian_NxN) == 0
  damped_NxN = hessian_NxN + jnp.diag(dead_N.astype(hessian_NxN.dtype))
  damped_NxN += damping * jnp.mean(jnp.diagonal(damped_NxN)) * jnp.eye(columns, dtype=hessian_NxN.dtype)
  order_N = jnp.argsort(jnp.diagonal(damped_NxN), descending=True, stable=True)
  factor_NxN = inverse_factor(damped_NxN[order_N][:, order_N])
  work_NxM = jnp.where(dead_N[:, None], 0.0, weight_MxN.T)[order_N]
  is_wide_N = is_wide_N[order_N]

  # Padding columns: zeros that nothing is coupled to.
  padded = -columns % block
  factor_NxN = jnp.pad(factor_NxN, ((0, padded), (0, padded)))
  factor_NxN += jnp.diag((jnp.arange(columns + padded) >= columns).astype(factor_NxN.dtype))
  work_NxM = jnp.pad(work_NxM, ((0, padded), (0, 0)))
  is_wide_N = jnp.pad(is_wide_N, (0, padded))

  def quantize_block(index, carry):
    work_NxM, q_NxM = carry
    start = index * block
    factor_KxN = jax.lax.dynamic_slice_in_dim(factor_NxN, start, block)
    factor_KxK = jax.lax.dynamic_slice_in_dim(factor_KxN, start, block, axis=1)
    wide_K = jax.lax.dynamic_slice_in_dim(is_wide_N, start, block)

    def quantize_column(j, carry):
      work_KxM, q_KxM, error_KxM = carry
      column_M = work_KxM[j]
      step_M = jnp.where(wide_K[j], wide_scale_M, scale_M)
      bound = jnp.where(wide_K[j], wide_levels, levels)
      # A row of zeros has step 0: its integers are 0, not 0/0.
      ratio_M = jnp.where(step_M > 0, column_M / step_M, 0.0)
      q_M = jnp.clip(jnp.round(ratio_M), -bound, bound)
      error_M = (column_M - q_M * step_M) / factor_KxK[j, j]
      # Columns before j are left alone: the factor is zero below its diagonal.
      work_KxM = work_KxM - factor_KxK[j][:, None] * error_M
      return work_KxM, q_KxM.at[j].set(q_M.astype(jnp.int8)), error_KxM.at[j].set(error_M)

    work_KxM = jax.lax.dynamic_slice_in_dim(work_NxM, start, block)
    start_carry = work_KxM, jnp.zeros(work_KxM.shape, jnp.int8), jnp.zeros_like(work_KxM)
    _, q_KxM, error_KxM = jax.lax.fori_loop(0, block, quantize_column, start_carry)
    later_N = jnp.arange(columns + padded) >= start + block
    repaid_NxM = jnp.matmul(jnp.where(later_N, factor_KxN, 0.0).T, error_KxM, precision=jax.lax.Precision.HIGHEST)
    return work_NxM - repaid_NxM, jax.lax.dynamic_update_slice_in_dim(q_NxM, q_KxM, start, axis=0)

  blocks = (columns + padded) // block
  start_carry = work_NxM, jnp.zeros(work_NxM.shape, jnp.int8)
  _, q_NxM = jax.lax.fori_loop(0, blocks, quantize_block, start_carry)
  return q_NxM[jnp.argsort(order_N)].T


@functools.partial(jax.jit, static_argnames=("block",))
def gptq(
  weight_BxMxN: Float[Array, "B M N"],
  hessian_BxNxN: Float[Array, "B N N"],
  scale_BxM: Float16[Array, "B M"],
  wide_scale_BxM: Float16[Array, "B M"],
  is_wide_BxN: Bool[Array, "B N"],
  levels_B: Float[Array, " B"],
  wide_levels_B: Float[Array, " B"],
  *,
  damping: float = 0.01,
  block: int = 128,
) -> Int8[Array, "B M N"]:
  """Integers q with Ŵ = q · step for a stack of independent matrices of one shape.

  Columns are taken in order of falling Hessian diagonal. With U from `inverse_factor` of the damped Hessian, column j
  becomes q = clip(round(w/s), −r, r); its error e = (w − q·s)/U_jj is then taken out of later columns, w_k −= e·U_jk.
  Inputs that never fired (H_jj = 0) get the column 0.

  Args:
    weight_BxMxN: fp32 matrices that act as y = x Wᵀ.
    hessian_BxNxN: Σ xxᵀ of each matrix's inputs, fp32; only its shape, not its scale, matters.
    scale_BxM: step s of each row.
    wide_scale_BxM: step of the columns marked in `is_wide_BxN` (the AWQ group); unused where none is marked.
    is_wide_BxN: the columns with the finer grid.
    levels_B: r of the ordinary columns.
    wide_levels_B: r of the marked columns.
    damping: share of the Hessian's mean diagonal that is added to its diagonal.
    block: columns whose errors are held back from the rest of the matrix until all of them are done.
  """
  return jax.vmap(functools.partial(_quantize_matrix, damping=damping, block=block))(
    weight_BxMxN,
    hessian_BxNxN,
    scale_BxM.astype(jnp.float32),
    wide_scale_BxM.astype(jnp.float32),
    is_wide_BxN,
    levels_B,
    wide_levels_B,
  )
