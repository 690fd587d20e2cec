"""Averaged weights to their stored forms: which parameter takes which form, and the passes that make them.

Recipe section 4: GPTQ on the grids of the rows for large matrices, corrected by AWQ and LQER; int8 rows for gates; fp16
for the rest. Letters: see `pgolf_jax.quantize`.
"""

from collections import defaultdict
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from pgolf_jax.errors import UserError
from pgolf_jax.quantize.artifact.banks import unbank
from pgolf_jax.quantize.artifact.tensors import Grid, Half, Quantized, Rows
from pgolf_jax.quantize.calibrate import Calibration
from pgolf_jax.quantize.corrections import add_low_rank, choose_groups
from pgolf_jax.quantize.gptq import Grids, gptq, row_step
from pgolf_jax.runtime.progress import progress
from pgolf_jax.settings import QuantizeConfig

_LARGEST_HALF = 65_536  # elements; up to here a parameter stays fp16
_GATE_SIZES = range(32, 8193)  # elements of an attention gate that is stored as integers


def quantize(
  params: Mapping[str, np.ndarray], calibration: Calibration, config: QuantizeConfig
) -> dict[str, Quantized]:
  """Returns every parameter of the model in its stored form, by matrix name (banks taken apart).

  Args:
    params: fp32 parameters under their bank names.
    calibration: moments of the inputs of every large matrix.
    config: bits, clips, AWQ and LQER.

  Raises:
    UserError: a large matrix has no calibration, or a value is not finite.
  """
  matrices = {name: np.asarray(value, np.float32) for name, value in unbank(params).items()}
  for name, value in matrices.items():
    if not np.isfinite(value).all():
      raise UserError(f"{name} holds values that are not finite, so it cannot be quantised; take an earlier state.")
  large = {name: value for name, value in matrices.items() if value.size > _LARGEST_HALF}
  if missing := [name for name in large if name not in calibration.hessian or name not in calibration.act_rms]:
    raise UserError(f"There is no calibration for {', '.join(missing)}; calibrate with this model's settings.")

  grids = _grids(large, calibration, config)
  if config.lqer:
    grids = add_low_rank(large, grids, config)
  return {name: grids[name] if name in grids else _small(name, value, config) for name, value in matrices.items()}


def _grids(large: Mapping[str, np.ndarray], calibration: Calibration, config: QuantizeConfig) -> dict[str, Grid]:
  """GPTQ of all large matrices, those of one shape in one batch, with the AWQ groups on their finer grid."""
  fine_starts: dict[str, list[int]] = {}
  if config.awq:
    candidates = {name: value for name, value in large.items() if _bits(name, config) < config.awq_bits}
    fine_starts = choose_groups(
      candidates, calibration.act_rms, group=config.awq_group_size, top_k=config.awq_group_top_k
    )
  fine_levels = _levels(config.awq_bits)

  by_shape = defaultdict(list)
  for name, value in large.items():
    by_shape[value.shape].append(name)
  grids = {}
  with progress("quantising", total=len(large), unit="matrices") as bar:
    for (_, columns), names in by_shape.items():
      levels = {n: _levels(_bits(n, config)) for n in names}
      step = {n: row_step(large[n], _clip(n, config), levels[n]) for n in names}
      fine_step = {n: row_step(large[n], _clip(n, config), fine_levels) for n in names}
      is_fine_QxN = np.zeros((len(names), columns), bool)
      for row, name in zip(is_fine_QxN, names, strict=True):
        for start in fine_starts.get(name, ()):
          row[start : start + config.awq_group_size] = True
      q_QxMxN = gptq(
        jnp.stack([large[n] for n in names]),
        jnp.stack([jnp.asarray(calibration.hessian[n], jnp.float32) for n in names]),
        Grids(
          np.stack(list(step.values())),
          np.asarray(list(levels.values()), np.float32),
          np.stack(list(fine_step.values())),
          np.full(len(names), fine_levels, np.float32),
          is_fine_QxN,
        ),
        damping=config.damping,
        block=config.block_size,
      )
      for name, q_MxN in zip(names, np.asarray(q_QxMxN), strict=True):
        groups = (tuple(fine_starts[name]), config.awq_group_size, fine_step[name]) if name in fine_starts else ()
        grids[name] = Grid(q_MxN, step[name], *groups)
      bar.advance(len(names))
  return grids


def _small(name: str, value: np.ndarray, config: QuantizeConfig) -> Half | Rows:
  if not (config.gate_int8 and value.ndim == 2 and name.endswith(".attn_gate_w") and value.size in _GATE_SIZES):
    return Half(value.astype(np.float16))
  largest_M = np.maximum(np.abs(value).max(axis=1), np.float32(1e-10))
  step_M = (largest_M / np.float32(127)).astype(np.float16)
  step_Mx1 = step_M.astype(np.float32)[:, None]
  ratio = np.divide(value, step_Mx1, out=np.zeros_like(value), where=step_Mx1 > 0)
  return Rows(np.clip(np.rint(ratio), -127, 127).astype(np.int8), step_M)


def _bits(name: str, config: QuantizeConfig) -> int:
  return config.embed_bits if "tok_emb" in name else config.matrix_bits


def _clip(name: str, config: QuantizeConfig) -> float:
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
