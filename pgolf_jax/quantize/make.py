"""From averaged weights to the bytes of an artifact: calibrate, quantise, encode.

With `quantize.method` "gptq" as in recipe section 4: GPTQ on the grids of the rows for large matrices, corrected by AWQ
and LQER; int8 rows for gates; fp16 for the rest. With "rate" as in `rate`. Letters: see `pgolf_jax.quantize`.
"""

import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pgolf_jax.errors import UserError
from pgolf_jax.model.params import Params
from pgolf_jax.quantize import fisher, rate
from pgolf_jax.quantize.artifact import writer
from pgolf_jax.quantize.artifact.tensors import Grid, Half, Quantized, Rows, multiplies, unbank
from pgolf_jax.quantize.calibrate import Calibration, calibrate, calibration_rows
from pgolf_jax.quantize.corrections import add_low_rank, choose_groups
from pgolf_jax.quantize.gptq import NO_FACTOR, Grids, gptq, require_factor, row_step
from pgolf_jax.quantize.provenance import origin_of, tokenizer_to_embed
from pgolf_jax.quantize.tuning import Tuner
from pgolf_jax.runtime.log import progress
from pgolf_jax.settings import QuantizeConfig, Settings
from pgolf_jax.settings.load import to_dict

_GATE_SIZES = range(32, 8193)  # elements of an attention gate that is stored as integers


def quantize(
  params: Mapping[str, np.ndarray], calibration: Calibration, config: QuantizeConfig
) -> dict[str, Quantized]:
  """Returns every parameter in the form that the recipe stores, by matrix name (banks taken apart).

  Args:
    params: fp32 parameters under their bank names.
    calibration: moments of the inputs of every large matrix.
    config: bits, clips, AWQ and LQER.

  Raises:
    UserError: a large matrix has no calibration, or a value is not finite.
  """
  matrices = _matrices(params)
  large = {name: value for name, value in matrices.items() if multiplies(name) and value.size > config.fp16_up_to}
  if missing := [name for name in large if name not in calibration.hessian or name not in calibration.act_rms]:
    raise UserError(f"There is no calibration for {', '.join(missing)}; calibrate with this model's settings.")

  grids = _grids(large, calibration, config)
  if config.lqer:
    grids = add_low_rank(large, grids, config)
  return {name: grids[name] if name in grids else _small(name, value, config) for name, value in matrices.items()}


def _matrices(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Every parameter in fp32, banks taken apart. Raises UserError if a value is not finite."""
  matrices = {name: np.asarray(value, np.float32) for name, value in unbank(params).items()}
  for name, value in matrices.items():
    if not np.isfinite(value).all():
      raise UserError(f"{name} holds values that are not finite, so it cannot be quantised; take an earlier state.")
  return matrices


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
      step = {n: grid_step(n, large[n], config) for n in names}
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
        require_factor(name, (q_MxN != NO_FACTOR).all(), config.damping)
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


def grid_step(name: str, weight_MxN: np.ndarray, config: QuantizeConfig) -> np.ndarray:
  """Returns the step of each row of a large matrix, in fp16."""
  return row_step(weight_MxN, _clip(name, config), _levels(_bits(name, config)))


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


_CLOSE = 0.0005  # share of the budget that may stay unused
_TRIES = 12
_DIGITS = 1e-4  # octaves within which multipliers are the same, as their products have six digits
_NEAR = 1.0  # octaves: as near to a step that is too fine the search ends


class _Scale(NamedTuple):
  """How a method trades bytes for loss: one multiplier of some of its settings; the larger, the fewer the bytes."""

  names: tuple[str, ...]
  least: float
  most: float


SCALES = {
  "gptq": _Scale(("matrix_clip_sigmas", "attn_clip_sigmas", "mlp_clip_sigmas", "embed_clip_sigmas"), 0.2, 8.0),
  "rate": _Scale(("step",), 2.0**-10, 2.0**14),  # finer ones take bytes and give nothing
}
"""By `quantize.method`: clips, or the step that all others are multiples of."""


@dataclasses.dataclass(frozen=True)
class Made:
  """An artifact and how it was made."""

  data: bytes
  config: QuantizeConfig  # with the clips or the step that were used
  seconds: dict[str, float]  # by step: calibrate, quantize, encode


def make(settings: Settings, params: Params, data: Path, *, world: int = 1, fit_bytes: int | None = None) -> Made:
  """Returns the artifact of these weights.

  Args:
    settings: of the model, the calibration and the quantiser; they travel in the artifact.
    params: the averaged weights, fp32.
    data: folder with the training shards and the tokenizer.
    world: ranks of the run; see `calibrate`.
    fit_bytes: searches one multiplier of all clips, or of the step, such that the artifact takes as many bytes as
      possible up to this.

  Raises:
    UserError: no multiplier within reason makes it fit, or as `calibrate` and `quantize`.
  """
  maker = Maker(settings, params, data, world=world)
  if fit_bytes is None:
    return Made(maker.artifact(settings.quantize), settings.quantize, maker.seconds)
  config, artifact = maker.fit(settings.quantize, fit_bytes)
  return Made(artifact, config, maker.seconds)


class Maker:
  """Makes artifacts of the same weights under several configs of one method, for all of which it calibrates once.

  Args:
    settings, params, data, world: as in `make`; of `settings.quantize` the method and the calibration.

  Attributes:
    seconds: by step, of all artifacts so far.

  Raises:
    UserError: as `calibrate` and `quantize`.
  """

  def __init__(self, settings: Settings, params: Params, data: Path, *, world: int = 1):
    params = {name: np.asarray(value, np.float32) for name, value in params.items()}
    self._settings, self._parameters = settings, sum(value.size for value in params.values())
    began = time.perf_counter()
    self._rounded = _rounder(settings, params, data, world)
    self.seconds = {"calibrate": time.perf_counter() - began, "quantize": 0.0, "encode": 0.0}
    self._carried = origin_of(settings, data), tokenizer_to_embed(settings, data)

  def artifact(self, config: QuantizeConfig) -> bytes:
    """Returns the artifact under a config of the method."""
    began = time.perf_counter()
    tensors = self._rounded(config)
    quantized = time.perf_counter()
    settings = portable(dataclasses.replace(self._settings, quantize=config))
    with progress("encoding the artifact"):
      data = writer.write(settings, tensors, config.codec, *self._carried)
    self.seconds["quantize"] += quantized - began
    self.seconds["encode"] += time.perf_counter() - quantized
    return data

  def fit(self, config: QuantizeConfig, budget: int) -> tuple[QuantizeConfig, bytes]:
    """Returns what `fit` finds for these weights.

    Tuning takes long and hardly changes the bytes, so that the step is first sought without.
    """
    start = 1.0
    if config.tune_steps and config.method == "rate":
      untuned, _ = self.fit(dataclasses.replace(config, tune_steps=0), budget)
      start = untuned.step / config.step
    return fit(config, self.artifact, budget, self._parameters, start=start)


def _rounder(
  settings: Settings, params: Mapping[str, np.ndarray], data: Path, world: int
) -> Callable[[QuantizeConfig], dict[str, Quantized]]:
  """Calibrates, and returns what makes stored forms of the parameters under a config of the same method."""
  if settings.quantize.method == "gptq":
    calibration = calibrate(settings, params, data, world=world)
    return lambda config: quantize(params, calibration, config)
  weights, tuner = _matrices(params), Tuner(settings, params, data)
  rows_BxT1 = calibration_rows(settings, data, world=world, length=settings.train.seq_len + 1)
  solver = rate.Solver(weights, fisher.measure(settings, params, rows_BxT1), settings.quantize)
  return lambda config: solver.solve(config.step, tuner, tune_steps=config.tune_steps)


def portable(settings: Settings) -> dict:
  """Returns the settings that travel in an artifact: all but the paths of the machine that made it."""
  config = to_dict(settings)
  config["data"] = {k: v for k, v in config["data"].items() if k not in ("path", "tokenizer")}
  return config


def scaled(config: QuantizeConfig, multiplier: float) -> QuantizeConfig:
  """Returns the config with every clip, or the step, multiplied: the larger, the coarser and the fewer the bytes."""
  values = {name: getattr(config, name) * multiplier for name in SCALES[config.method].names}
  return dataclasses.replace(config, **{name: float(f"{value:.6g}") for name, value in values.items()})


def fit(
  config: QuantizeConfig,
  attempt: Callable[[QuantizeConfig], bytes],
  budget: int,
  parameters: int,
  *,
  start: float = 1.0,
) -> tuple[QuantizeConfig, bytes]:
  """Finds the finest grids whose artifact has at most `budget` bytes, by one multiplier of all clips or of the step.

  Doubling a grid's step saves a bit of every value that is quantised, so that bytes are nearly a straight line over
  log2(multiplier). Its slope is at first that of `parameters` values, and then that between the last two attempts. Once
  one attempt is too large and another is not, the next lies between them.

  Args:
    config: with the clips or the step that multiplier 1 stands for.
    attempt: makes the artifact of a config; may raise `rate.TooFine`.
    budget: bytes.
    parameters: of the model.
    start: the first multiplier.

  Returns:
    The config with its clips or step, and the artifact's bytes.

  Raises:
    UserError: even the coarsest grids are too large.
  """
  names, least, most = SCALES[config.method]
  least, most, octave = (math.log2(multiplier) for multiplier in (least, most, start))
  finest, low, high = least + _DIGITS, -math.inf, math.inf  # what is sought lies between low and high
  aim, saved = budget * (1 - _CLOSE / 2), parameters / 8  # bytes, and bytes an octave
  best, before = None, None
  for tries_left in reversed(range(_TRIES)):
    tried = scaled(config, 2**octave)
    try:
      size = len(data := attempt(tried))
    except rate.TooFine:
      if not tries_left:
        raise
      low, finest = octave, octave + _NEAR
      if high <= finest:
        break
      octave, before = (octave + min(high, most)) / 2, None
      continue
    if size <= budget:
      if best is None or size > len(best[1]):
        best = tried, data
      high = min(high, octave)
      if size >= budget * (1 - _CLOSE) or high <= finest:
        break
    elif octave >= most:
      break
    else:
      low = max(low, octave)
    if before is not None:
      # Between attempts that are near to each other the bytes of single streams make any slope.
      slope = (before[1] - size) / (octave - before[0])
      saved = min(max(slope, saved / 4), parameters / 8)
    before = octave, size
    octave = min(max(octave + (size - aim) / saved, least), most)
    if math.isfinite(high - low) and not low < octave < high:
      octave = (low + high) / 2
    if best is None and tries_left == 1:
      octave = most
  if best is None:
    raise UserError(
      f"No {' or '.join(names)} up to {2**most:g} times the configured brings the artifact below {budget:,} bytes (the "
      f"last try took {size:,}); train a smaller model."
    )
  return best
