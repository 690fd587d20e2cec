"""Quantised weights of the golden cases, read back from the bytes of an artifact."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pgolf_jax.model.params import Params
from pgolf_jax.quantize.artifact import read, writer
from pgolf_jax.quantize.calibrate import Calibration
from pgolf_jax.quantize.make import make
from pgolf_jax.quantize.quantize import quantize
from pgolf_jax.settings.config import Settings
from pgolf_jax.settings.load import from_env


def quantize_case(
  environ: Mapping[str, str],
  params: Mapping[str, np.ndarray],
  hessian: Mapping[str, np.ndarray],
  act_rms: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
  """Returns `dequantized/{matrix}` of every parameter.

  Args:
    environ: settings under their environment names.
    params: fp32 parameters under their bank names.
    hessian: Hessian of the inputs, by matrix name.
    act_rms: root mean square of each input, by matrix name.
  """
  settings = from_env(environ)
  tensors = quantize(params, Calibration(hessian, act_rms), settings.quantize)
  data = writer.write({}, tensors, settings.quantize.codec)
  return {f"dequantized/{name}": tensor.dequantize() for name, tensor in read(data).tensors.items()}


def artifact_params(settings: Settings, params: Params, data: Path) -> Params:
  """Quantises parameters, calibrated on the training shards in `data`, and returns what the artifact stores of them."""
  return read(make(settings, params, data).data).params()
