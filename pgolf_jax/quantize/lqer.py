"""LQER: a low-rank correction of the matrices with the largest quantisation error (recipe section 4).

Zhang et al., "LQER" (2024), https://arxiv.org/abs/2402.02446, with both factors quantised too. M outputs, N inputs,
R rank.
"""

import numpy as np

from pgolf_jax.quantize.artifact.tensors import LowRank


def _steps(magnitude: np.ndarray, levels: float) -> np.ndarray:
  return (np.maximum(magnitude, np.float32(1e-10)) / np.float32(levels)).astype(np.float16)


def _on_grid(values: np.ndarray, steps: np.ndarray, low: int, high: int) -> np.ndarray:
  """Nearest integers in low … high; 0 where the step is 0 (a factor too small for fp16)."""
  steps = steps.astype(np.float32)
  ratio = np.divide(values, steps, out=np.zeros_like(values), where=steps > 0)
  return np.clip(np.rint(ratio), low, high).astype(np.int8)


def _lopsided_factors(a_MxR: np.ndarray, b_RxN: np.ndarray, group: int) -> LowRank:
  """A in 2 bits with one step max|A|/1.5, values −2 … 1; B in 4 bits, a step max/7.5 per group, values −8 … 7.

  These grids reach further down than up and a singular pair may change its sign, so each takes the sign that rounds
  better. That also makes the integers independent of the sign convention of the machine's LAPACK.
  """
  a_scale = _steps(np.abs(a_MxR).max(keepdims=True)[0], 1.5)
  b_scale = _steps(np.abs(b_RxN).reshape(-1, group).max(axis=1), 7.5)

  def rounded(sign: float) -> tuple[LowRank, np.ndarray]:
    a = _on_grid(sign * a_MxR, a_scale, -2, 1)
    b = _on_grid(sign * b_RxN.reshape(-1, group), b_scale[:, None], -8, 7).reshape(b_RxN.shape)
    factors = LowRank(a, a_scale, b, b_scale)
    a_error_R = np.sum((sign * a_MxR - factors.a()) ** 2, axis=0, dtype=np.float64)
    b_error_R = np.sum((sign * b_RxN - factors.b()) ** 2, axis=1, dtype=np.float64)
    # Rows of B have norm 1: to first order this is the error of the pair's product.
    return factors, a_error_R + b_error_R * np.sum(a_MxR**2, axis=0, dtype=np.float64)

  (plus, plus_error_R), (minus, minus_error_R) = rounded(1.0), rounded(-1.0)
  keep_R = plus_error_R <= minus_error_R
  a_MxR = np.where(keep_R, plus.a_MxR, minus.a_MxR)
  return LowRank(a_MxR, a_scale, np.where(keep_R[:, None], plus.b_RxN, minus.b_RxN), b_scale)


def fit(error_MxN: np.ndarray, *, rank: int, asymmetric: bool, group: int, bits: int) -> LowRank:
  """The `rank` largest singular directions of the error, E ≈ (U_r S_r)(V_rᵀ) = A·B, with both factors quantised.

  Asymmetric, where B's size is a multiple of `group`: A in 2 bits and B in 4, on lopsided grids. Otherwise both
  symmetric in `bits` bits, with a step max/(2^(bits−1) − 1) per row.
  """
  u_MxK, s_K, vt_KxN = np.linalg.svd(error_MxN.astype(np.float32), full_matrices=False)
  rank = min(rank, len(s_K))
  a_MxR = u_MxK[:, :rank] * s_K[:rank]
  b_RxN = np.ascontiguousarray(vt_KxN[:rank])
  if asymmetric and b_RxN.size % group == 0:
    return _lopsided_factors(a_MxR, b_RxN, group)
  levels = 2 ** (bits - 1) - 1
  a_scale = _steps(np.abs(a_MxR).max(axis=1), levels)
  b_scale = _steps(np.abs(b_RxN).max(axis=1), levels)
  a = _on_grid(a_MxR, a_scale[:, None], -levels, levels)
  return LowRank(a, a_scale, _on_grid(b_RxN, b_scale[:, None], -levels, levels), b_scale)
