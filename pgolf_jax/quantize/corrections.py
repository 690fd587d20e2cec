"""Corrections of the matrices that lose most when they are quantised: finer grids (AWQ) and low-rank factors (LQER).

AWQ-lite gives a finer grid to the few groups of input columns that matter most to the model's outputs. Salience as in
Lin et al., "AWQ" (2023), https://arxiv.org/abs/2306.00978, without its rescaling: activation size times weight size.

LQER adds a low-rank product to the matrices with the largest error. Zhang et al., "LQER" (2024),
https://arxiv.org/abs/2402.02446, with both factors quantised too.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from pgolf_jax.quantize.artifact.tensors import Grid, LowRank
from pgolf_jax.settings import QuantizeConfig


def choose_groups(
  weights: Mapping[str, np.ndarray], act_rms: Mapping[str, np.ndarray], *, group: int, top_k: int
) -> dict[str, list[int]]:
  """Returns the first columns of the `top_k` most salient groups over all matrices, by matrix name.

  Args:
    weights: the candidates; of two groups of equal salience, the one in the earlier matrix wins.
    act_rms: [N] root mean square of each matrix's inputs.
    group: columns of a group.
    top_k: groups to choose.
  """
  scored = [
    (-score, order, index * group, name)
    for order, (name, weight_MxN) in enumerate(weights.items())
    for index, score in enumerate(_group_salience(weight_MxN, act_rms[name], group))
  ]
  chosen: dict[str, list[int]] = {}
  for _, _, start, name in sorted(scored)[:top_k]:
    chosen.setdefault(name, []).append(start)
  return {name: sorted(starts) for name, starts in chosen.items()}


def add_low_rank(
  weights: Mapping[str, np.ndarray], grids: Mapping[str, Grid], config: QuantizeConfig
) -> dict[str, Grid]:
  """Returns the grids, `lqer_top_k` of them with a low-rank correction.

  Corrected are the matrices within `lqer_scope` with the largest error, or with `lqer_gain_select` those whose error a
  correction lowers most.
  """
  part = {"all": "", "attn": ".attn.", "mlp": ".mlp.", "embed": "tok_emb"}[config.lqer_scope]
  errors = {name: weights[name] - grid.dequantize() for name, grid in grids.items() if part in name}
  merit = {name: _norm(error) for name, error in errors.items()}
  factors = {}
  if config.lqer_gain_select:
    factors = {name: fit_low_rank(error, config) for name, error in errors.items()}
    merit = {name: merit[name] - _norm(errors[name] - factors[name].dequantize()) for name in errors}
  best = sorted((name for name in merit if merit[name] > 0), key=lambda name: -merit[name])[: config.lqer_top_k]
  factors = {name: factors.get(name) or fit_low_rank(errors[name], config) for name in best}
  return dict(grids) | {name: dataclasses.replace(grids[name], low_rank=factors[name]) for name in best}


def fit_low_rank(error_MxN: np.ndarray, config: QuantizeConfig) -> LowRank:
  """Returns the leading singular directions of the error, E ≈ (U_r S_r)(V_rᵀ) = A·B, with both factors quantised.

  With `lqer_asym`, where B's size is a multiple of `lqer_asym_group`: A in 2 bits and B in 4, on lopsided grids.
  Otherwise both symmetric in b = `lqer_factor_bits` bits, with a step max/(2^(b−1) − 1) per row.
  """
  u_MxK, s_K, vt_KxN = np.linalg.svd(error_MxN.astype(np.float32), full_matrices=False)
  rank = min(config.lqer_rank, len(s_K))
  a_MxR = u_MxK[:, :rank] * s_K[:rank]
  b_RxN = np.ascontiguousarray(vt_KxN[:rank])
  if config.lqer_asym and b_RxN.size % config.lqer_asym_group == 0:
    return _lopsided_factors(a_MxR, b_RxN, config.lqer_asym_group)
  levels = 2 ** (config.lqer_factor_bits - 1) - 1
  a_step_M = _steps(np.abs(a_MxR).max(axis=1), levels)
  b_step_R = _steps(np.abs(b_RxN).max(axis=1), levels)
  a = _on_grid(a_MxR, a_step_M[:, None], -levels, levels)
  return LowRank(a, a_step_M, _on_grid(b_RxN, b_step_R[:, None], -levels, levels), b_step_R)


def _group_salience(weight_MxN: np.ndarray, act_rms_N: np.ndarray, group: int) -> np.ndarray:
  """Σ over each `group` neighbouring columns, from column 0, of rms_j · mean|W_·j|; left-over columns are in none."""
  salience_N = act_rms_N.astype(np.float64) * np.mean(np.abs(weight_MxN), axis=0, dtype=np.float64)
  groups = len(salience_N) // group
  return salience_N[: groups * group].reshape(groups, group).sum(axis=1)


def _norm(error_MxN: np.ndarray) -> float:
  return float(np.linalg.norm(error_MxN.astype(np.float64)))


def _lopsided_factors(a_MxR: np.ndarray, b_RxN: np.ndarray, group: int) -> LowRank:
  """A in 2 bits with one step max|A|/1.5, values −2 … 1; B in 4 bits, a step max/7.5 per group, values −8 … 7.

  These grids reach further down than up. A singular pair may change its sign, so each takes the sign that rounds
  better, which also makes the integers independent of the sign convention of the machine's LAPACK.
  """
  a_step = _steps(np.abs(a_MxR).max(keepdims=True)[0], 1.5)
  b_step = _steps(np.abs(b_RxN).reshape(-1, group).max(axis=1), 7.5)

  def rounded(sign: float) -> tuple[LowRank, np.ndarray]:
    a = _on_grid(sign * a_MxR, a_step, -2, 1)
    b = _on_grid(sign * b_RxN.reshape(-1, group), b_step[:, None], -8, 7).reshape(b_RxN.shape)
    factors = LowRank(a, a_step, b, b_step)
    a_error_R = np.sum((sign * a_MxR - factors.a()) ** 2, axis=0, dtype=np.float64)
    b_error_R = np.sum((sign * b_RxN - factors.b()) ** 2, axis=1, dtype=np.float64)
    # Rows of B have norm 1: to first order this is the error of the pair's product.
    return factors, a_error_R + b_error_R * np.sum(a_MxR**2, axis=0, dtype=np.float64)

  (plus, plus_error_R), (minus, minus_error_R) = rounded(1.0), rounded(-1.0)
  keep_R = plus_error_R <= minus_error_R
  a_MxR = np.where(keep_R, plus.a_MxR, minus.a_MxR)
  return LowRank(a_MxR, a_step, np.where(keep_R[:, None], plus.b_RxN, minus.b_RxN), b_step)


def _steps(magnitude: np.ndarray, levels: float) -> np.ndarray:
  return (np.maximum(magnitude, np.float32(1e-10)) / np.float32(levels)).astype(np.float16)


def _on_grid(values: np.ndarray, steps: np.ndarray, low: int, high: int) -> np.ndarray:
  """Nearest integers in low … high; 0 where the step is 0 (a factor too small for fp16)."""
  steps = steps.astype(np.float32)
  ratio = np.divide(values, steps, out=np.zeros_like(values), where=steps > 0)
  return np.clip(np.rint(ratio), low, high).astype(np.int8)
