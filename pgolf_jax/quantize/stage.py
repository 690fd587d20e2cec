"""From averaged weights to an artifact's bytes: calibrate, quantise, encode; or search clips that fill the budget."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from pgolf_jax.data.shards import list_shards
from pgolf_jax.errors import UserError
from pgolf_jax.model.params import Params
from pgolf_jax.quantize.artifact import format
from pgolf_jax.quantize.calibrate import Calibration, calibrate, draw_rows, row_count
from pgolf_jax.quantize.quantize import quantize
from pgolf_jax.settings.config import QuantizeConfig, Settings
from pgolf_jax.settings.load import to_dict

_CLIPS = ("matrix_clip_sigmas", "attn_clip_sigmas", "mlp_clip_sigmas", "embed_clip_sigmas")
_CLOSE = 0.0005  # share of the budget that may stay unused
_TRIES = 8
_MULTIPLIERS = (0.2, 8.0)  # of the clips, that `fit` tries


@dataclasses.dataclass(frozen=True)
class Made:
  """An artifact and how it came about."""

  data: bytes
  config: QuantizeConfig  # with the clips that were used
  seconds: dict[str, float]  # by step: calibrate, quantize, encode


def portable(settings: Settings) -> dict:
  """The settings that travel in an artifact: all but the paths of the machine that made it."""
  config = to_dict(settings)
  config["data"] = {k: v for k, v in config["data"].items() if k not in ("path", "tokenizer")}
  return config


def calibration(settings: Settings, params: Params, data: Path, world: int) -> Calibration:
  """The moments that the settings ask for, over rows of the training shards in `data`.

  Args:
    world: ranks of the run. With `calibration_scope` "rank0", only the shards that rank 0 would draw from are used,
      and only its number of rows.
  """
  q = settings.quantize
  shards = list_shards(data, "train")
  if q.calibration_scope == "rank0":
    shards = shards[::world]
  rows_RxT = draw_rows(shards, seq_len=settings.train.seq_len, count=row_count(settings, world), seed=settings.seed)
  return calibrate(
    settings.model,
    params,
    rows_RxT,
    batches=q.calibration_batches,
    respect_documents=q.calibration_respect_documents,
    dtype=jnp.dtype(settings.train.compute_dtype),
  )


def make(settings: Settings, params: Params, data: Path, *, world: int = 1, fit_bytes: int | None = None) -> Made:
  """The artifact of these weights.

  Args:
    params: the averaged weights, fp32.
    data: folder with the training shards.
    world: see `calibration`.
    fit_bytes: search one multiplier of all clips such that the artifact takes as many bytes as possible up to this.

  Raises:
    UserError: no multiplier within reason makes it fit, or as `quantize`.
  """
  params = {name: np.asarray(value, np.float32) for name, value in params.items()}
  began = time.perf_counter()
  moments = calibration(settings, params, data, world)
  seconds = {"calibrate": time.perf_counter() - began, "quantize": 0.0, "encode": 0.0}

  def attempt(config: QuantizeConfig) -> bytes:
    began = time.perf_counter()
    tensors = quantize(params, moments.hessian, moments.act_rms, config)
    done = time.perf_counter()
    found = format.write(portable(dataclasses.replace(settings, quantize=config)), tensors, config.codec)
    seconds["quantize"] += done - began
    seconds["encode"] += time.perf_counter() - done
    return found

  if fit_bytes is None:
    return Made(attempt(settings.quantize), settings.quantize, seconds)
  config, found = fit(settings.quantize, attempt, fit_bytes, sum(value.size for value in params.values()))
  return Made(found, config, seconds)


def scaled(config: QuantizeConfig, multiplier: float) -> QuantizeConfig:
  """The config with every clip multiplied: the larger, the coarser the grids and the fewer the bytes."""
  return dataclasses.replace(config, **{name: round(getattr(config, name) * multiplier, 4) for name in _CLIPS})


def fit(
  config: QuantizeConfig, attempt: Callable[[QuantizeConfig], bytes], budget: int, parameters: int
) -> tuple[QuantizeConfig, bytes]:
  """The finest grids whose artifact has at most `budget` bytes, by one multiplier of all clips.

  Halving a grid's step costs every value one bit: bytes ≈ b − parameters/8 · log2(multiplier). Each try corrects b;
  once there is one on either side, the next lies between them.

  Returns:
    The config with its clips, and the artifact's bytes.

  Raises:
    UserError: even the coarsest grids are too large.
  """
  low, high = _MULTIPLIERS  # too many bytes at low, few enough at high, as far as is known
  multiplier, best = 1.0, None
  for _ in range(_TRIES):
    tried = scaled(config, multiplier)
    data = attempt(tried)
    if len(data) <= budget:
      if best is None or len(data) > len(best[1]):
        best = tried, data
      if len(data) >= budget * (1 - _CLOSE) or multiplier <= _MULTIPLIERS[0]:
        break
      high = min(high, multiplier)
    else:
      if multiplier >= _MULTIPLIERS[1]:
        break
      low = max(low, multiplier)
    aim = budget * (1 - _CLOSE / 2)
    guess = multiplier * 2 ** ((len(data) - aim) * 8 / parameters)
    bracketed = low > _MULTIPLIERS[0] and high < _MULTIPLIERS[1]
    multiplier = guess if low < guess < high else math.sqrt(low * high) if bracketed else min(max(guess, low), high)
  if best is None:
    raise UserError(
      f"No clip up to {_MULTIPLIERS[1]:g} times the configured ones brings the artifact below {budget:,} bytes "
      f"(the last try took {len(data):,}); lower quantize.matrix_bits or train a smaller model."
    )
  return best
