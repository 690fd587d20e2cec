"""The golden `quantize` case: from the recipe's settings and moments to dequantised weights under the case's names."""

from collections.abc import Mapping

import numpy as np

from pgolf_jax.quantize.artifact import read, writer
from pgolf_jax.quantize.calibrate import Calibration
from pgolf_jax.quantize.quantize import quantize
from pgolf_jax.settings.load import from_env


def quantize_case(
  environ: Mapping[str, str],
  params: Mapping[str, np.ndarray],
  hessian: Mapping[str, np.ndarray],
  act_rms: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
  """`dequantized/{matrix}` of every parameter, out of the artifact's bytes.

  Args:
    environ: settings under their environment names.
    params: fp32 parameters under their bank names.
    hessian, act_rms: calibration by matrix name.
  """
  settings = from_env(environ)
  tensors = quantize(params, Calibration(hessian, act_rms), settings.quantize)
  data = writer.write({}, tensors, settings.quantize.codec)
  return {f"dequantized/{name}": tensor.dequantize() for name, tensor in read(data).tensors.items()}
