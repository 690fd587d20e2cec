"""From averaged weights to the bytes of an artifact: calibrate, quantise, encode."""

import dataclasses
import time
from pathlib import Path

import numpy as np

from pgolf_jax.model.params import Params
from pgolf_jax.quantize.artifact import writer
from pgolf_jax.quantize.calibrate import calibrate
from pgolf_jax.quantize.fit import fit
from pgolf_jax.quantize.quantize import quantize
from pgolf_jax.settings.config import QuantizeConfig, Settings
from pgolf_jax.settings.load import to_dict


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
