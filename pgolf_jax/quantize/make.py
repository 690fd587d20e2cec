"""From averaged weights to the bytes of an artifact: calibrate, quantise, encode, with clips that fill the budget."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pgolf_jax.errors import UserError
from pgolf_jax.model.params import Params
from pgolf_jax.quantize.artifact import writer
from pgolf_jax.quantize.calibrate import calibrate
from pgolf_jax.quantize.quantize import quantize
from pgolf_jax.settings import QuantizeConfig, Settings
from pgolf_jax.settings.load import to_dict

_CLIPS = ("matrix_clip_sigmas", "attn_clip_sigmas", "mlp_clip_sigmas", "embed_clip_sigmas")
_CLOSE = 0.0005  # share of the budget that may stay unused
_TRIES = 8
_LEAST, _MOST = 0.2, 8.0  # multiplier of the clips


@dataclasses.dataclass(frozen=True)
class Made:
  """An artifact and how it was made."""

  data: bytes
  config: QuantizeConfig  # with the clips that were used
  seconds: dict[str, float]  # by step: calibrate, quantize, encode


def make(settings: Settings, params: Params, data: Path, *, world: int = 1, fit_bytes: int | None = None) -> Made:
  """Returns the artifact of these weights.

  Args:
    settings: of the model, the calibration and the quantiser; they travel in the artifact.
    params: the averaged weights, fp32.
    data: folder with the training shards.
    world: ranks of the run; see `calibrate`.
    fit_bytes: searches one multiplier of all clips such that the artifact takes as many bytes as possible up to this.

  Raises:
    UserError: no multiplier within reason makes it fit, or as `calibrate` and `quantize`.
  """
  params = {name: np.asarray(value, np.float32) for name, value in params.items()}
  began = time.perf_counter()
  calibration = calibrate(settings, params, data, world=world)
  seconds = {"calibrate": time.perf_counter() - began, "quantize": 0.0, "encode": 0.0}

  def attempt(config: QuantizeConfig) -> bytes:
    began = time.perf_counter()
    tensors = quantize(params, calibration, config)
    quantized = time.perf_counter()
    data = writer.write(portable(dataclasses.replace(settings, quantize=config)), tensors, config.codec)
    seconds["quantize"] += quantized - began
    seconds["encode"] += time.perf_counter() - quantized
    return data

  if fit_bytes is None:
    return Made(attempt(settings.quantize), settings.quantize, seconds)
  config, artifact = fit(settings.quantize, attempt, fit_bytes, sum(value.size for value in params.values()))
  return Made(artifact, config, seconds)


def portable(settings: Settings) -> dict:
  """Returns the settings that travel in an artifact: all but the paths of the machine that made it."""
  config = to_dict(settings)
  config["data"] = {k: v for k, v in config["data"].items() if k not in ("path", "tokenizer")}
  return config


def scaled(config: QuantizeConfig, multiplier: float) -> QuantizeConfig:
  """Returns the config with every clip multiplied: the larger, the coarser the grids and the fewer the bytes."""
  return dataclasses.replace(config, **{name: round(getattr(config, name) * multiplier, 4) for name in _CLIPS})


def fit(
  config: QuantizeConfig, attempt: Callable[[QuantizeConfig], bytes], budget: int, parameters: int
) -> tuple[QuantizeConfig, bytes]:
  """Finds the finest grids whose artifact has at most `budget` bytes, by one multiplier of all clips.

  Halving a grid's step costs every value one bit: bytes ≈ b − parameters/8 · log2(multiplier). Each attempt corrects b;
  once one attempt is too large and another is not, the next lies between them.

  Args:
    config: with the clips that multiplier 1 stands for.
    attempt: makes the artifact of a config.
    budget: bytes.
    parameters: of the model.

  Returns:
    The config with its clips, and the artifact's bytes.

  Raises:
    UserError: even the coarsest grids are too large.
  """
  low, high = _LEAST, _MOST  # the multiplier sought lies between them
  multiplier, best = 1.0, None
  for _ in range(_TRIES):
    tried = scaled(config, multiplier)
    data = attempt(tried)
    if len(data) <= budget:
      if best is None or len(data) > len(best[1]):
        best = tried, data
      if len(data) >= budget * (1 - _CLOSE) or multiplier <= _LEAST:
        break
      high = min(high, multiplier)
    else:
      if multiplier >= _MOST:
        break
      low = max(low, multiplier)
    aim = budget * (1 - _CLOSE / 2)
    guess = multiplier * 2 ** ((len(data) - aim) * 8 / parameters)
    bracketed = low > _LEAST and high < _MOST
    multiplier = guess if low < guess < high else math.sqrt(low * high) if bracketed else min(max(guess, low), high)
  if best is None:
    raise UserError(
      f"No clip up to {_MOST:g} times the configured ones brings the artifact below {budget:,} bytes "
      f"(the last try took {len(data):,}); lower quantize.matrix_bits or train a smaller model."
    )
  return best
