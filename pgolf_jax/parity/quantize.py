"""Quantised weights of the golden cases, read back from the bytes of an artifact."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pgolf_jax.model.params import Params
from pgolf_jax.quantize import stage
from pgolf_jax.quantize.artifact import format
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
  tensors = quantize(params, hessian, act_rms, settings.quantize)
  data = format.write({}, tensors, settings.quantize.codec)
  return {f"dequantized/{name}": tensor.dequantize() for name, tensor in format.read(data).tensors.items()}


def artifact_params(settings: Settings, params: Params, data: Path) -> Params:
  """Quantises parameters, calibrated on the training shards in `data`, and returns what the artifact stores of them."""
  return format.dequantize(stage.make(settings, params, data).data)[1]
