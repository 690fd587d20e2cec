"""Averaged weights to integers: which parameter is stored how, and the passes that do it (recipe section 4)."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from pgolf_jax.errors import UserError
from pgolf_jax.quantize import awq, lqer
from pgolf_jax.quantize.artifact.names import unbank
from pgolf_jax.quantize.artifact.tensors import Grid, Half, Quantized, Rows
from pgolf_jax.quantize.gptq import gptq, row_scale
from pgolf_jax.runtime.progress import progress
from pgolf_jax.settings.config import QuantizeConfig

SMALL = 65_536  # elements; up to here a parameter stays fp16
_GATE_SIZES = range(32, 8193)  # elements of an attention gate that is stored as integers


def quantize(
  params: Mapping[str, np.ndarray],
  hessian: Mapping[str, np.ndarray],
  act_rms: Mapping[str, np.ndarray],
  config: QuantizeConfig,
) -> dict[str, Quantized]:
  """Every parameter of the model in its stored form, by matrix name (banks taken apart).

  Args:
    params: fp32 parameters under their bank names.
    hessian: [N, N] mean Σ xxᵀ of each large matrix's inputs, by matrix name.
    act_rms: [N] root mean square of each of its inputs.
    config: bits, clips, AWQ and LQER.

  Raises:
    UserError: a large matrix has no calibration, or a value is not finite.
  """
  matrices = {name: np.asarray(value, np.float32) for name, value in unbank(params).items()}
  for name, value in matrices.items():
    if not np.isfinite(value).all():
      raise UserError(f"{name} holds values that are not finite, so it cannot be quantised; take an earlier state.")
  large = {name: value for name, value in matrices.items() if value.size > SMALL}
  if missing := [name for name in large if name not in hessian or name not in act_rms]:
    raise UserError(f"There is no calibration for {', '.join(missing)}; calibrate with this model's settings.")

  grids = _grids(large, hessian, act_rms, config)
  if config.lqer:
    _correct(large, grids, config)
  return {name: grids[name] if name in grids else _small(name, value, config) for name, value in matrices.items()}


def bits_of(name: str, config: QuantizeConfig) -> int:
  return config.embed_bits if "tok_emb" in name else config.matrix_bits


def clip_of(name: str, config: QuantizeConfig) -> float:
  """Standard deviations of a row that its grid spans on either side."""
  for part, clip in (
    ("tok_emb", config.embed_clip_sigmas),
    (".mlp.", config.mlp_clip_sigmas),
    (".attn.", config.attn_clip_sigmas),
  ):
    if part in name:
      return clip
  return config.matrix_clip_sigmas


def _levels(bits: int) -> int:
  return 2 ** (bits - 1) - 1


def _small(name: str, value: np.ndarray, config: QuantizeConfig) -> Half | Rows:
  if not (config.gate_int8 and value.ndim == 2 and name.endswith(".attn_gate_w") and value.size in _GATE_SIZES):
    return Half(value.astype(np.float16))
  largest_M = np.maximum(np.abs(value).max(axis=1), np.float32(1e-10))
  scale_M = (largest_M / np.float32(127)).astype(np.float16)
  step_Mx1 = scale_M.astype(np.float32)[:, None]
  ratio = np.divide(value, step_Mx1, out=np.zeros_like(value), where=step_Mx1 > 0)
  return Rows(np.clip(np.rint(ratio), -127, 127).astype(np.int8), scale_M)


def _grids(
  large: Mapping[str, np.ndarray],
  hessian: Mapping[str, np.ndarray],
  act_rms: Mapping[str, np.ndarray],
  config: QuantizeConfig,
) -> dict[str, Grid]:
  """GPTQ of all large matrices, those of one shape in one batch, with the AWQ groups on their finer grid."""
  wide: dict[str, list[int]] = {}
  if config.awq:
    candidates = {name: value for name, value in large.items() if bits_of(name, config) < config.awq_bits}
    wide = awq.choose_groups(candidates, act_rms, group=config.awq_group_size, top_k=config.awq_group_top_k)
  wide_levels = _levels(config.awq_bits)

  by_shape = defaultdict(list)
  for name, value in large.items():
    by_shape[value.shape].append(name)
  grids = {}
  with progress("quantising", total=len(large), unit="matrices") as bar:
    for (_, columns), names in by_shape.items():
      scale = {n: row_scale(large[n], clip_of(n, config), _levels(bits_of(n, config))) for n in names}
      wide_scale = {n: row_scale(large[n], clip_of(n, config), wide_levels) for n in names}
      is_wide_BxN = np.zeros((len(names), columns), bool)
      for row, name in zip(is_wide_BxN, names, strict=True):
        for start in wide.get(name, ()):
          row[start : start + config.awq_group_size] = True
      q_BxMxN = gptq(
        jnp.stack([large[n] for n in names]),
        jnp.stack([jnp.asarray(hessian[n], jnp.float32) for n in names]),
        np.stack(list(scale.values())),
        np.stack(list(wide_scale.values())),
        is_wide_BxN,
        np.asarray([_levels(bits_of(n, config)) for n in names], np.float32),
        np.full(len(names), wide_levels, np.float32),
        damping=config.damping,
        block=config.block_size,
      )
      for name, q_MxN in zip(names, np.asarray(q_BxMxN), strict=True):
        groups = (tuple(wide[name]), config.awq_group_size, wide_scale[name]) if name in wide else ()
        grids[name] = Grid(q_MxN, scale[name], *groups)
      bar.advance(len(names))
  return grids


def _correct(large: Mapping[str, np.ndarray], grids: dict[str, Grid], config: QuantizeConfig) -> None:
  """Adds the low-rank correction to the `lqer_top_k` grids with the largest error, or the largest gain."""
  part = {"all": "", "attn": ".attn.", "mlp": ".mlp.", "embed": "tok_emb"}[config.lqer_scope]
  errors = {n: large[n] - grid.dequantize() for n, grid in grids.items() if part in n}
  norms = {n: float(np.linalg.norm(e.astype(np.float64))) for n, e in errors.items()}

  def fitted(name: str):
    return lqer.fit(
      errors[name],
      rank=config.lqer_rank,
      asymmetric=config.lqer_asym,
      group=config.lqer_asym_group,
      bits=config.lqer_factor_bits,
    )

  if config.lqer_gain_select:
    fits = {n: fitted(n) for n in errors}
    merit = {n: norms[n] - float(np.linalg.norm(errors[n] - fit.dequantize())) for n, fit in fits.items()}
  else:
    fits, merit = {}, norms
  best = sorted((n for n in merit if merit[n] > 0), key=lambda n: -merit[n])[: config.lqer_top_k]
  for name in best:
    grids[name] = dataclasses.replace(grids[name], low_rank=fits.get(name) or fitted(name))
