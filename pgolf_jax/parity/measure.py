"""Measures of how far an output is from the reference's.

The first line of a measure's docstring names it in tables.
"""

from typing import NamedTuple

import numpy as np

from pgolf_jax.parity.case import Arrays, Case
from pgolf_jax.quantize.artifact.banks import unbank

_ROUNDING_TIES = 0.005
"""Share of a tensor's integers that may differ because GPTQ rounded a tie the other way."""


class Pair(NamedTuple):
  """One tensor of two sets of outputs; the sets are there because some measures need other tensors as well."""

  case: Case
  name: str
  ours: Arrays
  expected: Arrays

  def values(self) -> tuple[np.ndarray, np.ndarray]:
    """Ours and the expected one in float64."""
    return tuple(np.asarray(outputs[self.name], np.float64) for outputs in (self.ours, self.expected))


def relative_to_norm(pair: Pair) -> float:
  """‖ours − expected‖ / ‖expected‖"""
  ours, expected = pair.values()
  smallest = 1e-12 * np.sqrt(max(expected.size, 1))
  return _norm(ours - expected) / max(_norm(expected), smallest)


def largest_difference(pair: Pair) -> float:
  """max |ours − expected|

  Two NaNs agree: they mark a target that neither scored.
  """
  ours, expected = pair.values()
  difference = np.where(np.isnan(ours) & np.isnan(expected), 0.0, np.abs(ours - expected))
  return float(np.max(difference, initial=0.0))


def higher_by(pair: Pair) -> float:
  """ours − expected: a lower score is no fault"""
  ours, expected = pair.values()
  return float(ours.item() - expected.item())


def entries_that_differ(pair: Pair) -> float:
  """number of entries that are not equal"""
  return float(np.sum(pair.ours[pair.name] != pair.expected[pair.name]))


def relative_to_step(pair: Pair) -> float:
  """‖our step − the reference's‖ / ‖the reference's‖"""
  ours, expected = _steps(pair)
  size = _norm(expected)
  if size == 0:
    return 0.0 if _norm(ours) == 0 else float("inf")
  return _norm(ours - expected) / size


def worst_matrix_step(pair: Pair) -> float:
  """‖our step − the reference's‖ / ‖the reference's‖, worst matrix"""
  ours, expected = _steps(pair)
  return max(_norm(a - b) / max(_norm(b), 1e-12) for a, b in zip(ours, expected, strict=True))


def rounded_differently(pair: Pair) -> float:
  """share of entries that differ, or additional tr(E H Eᵀ)

  The smaller of both: GPTQ carries the error of an early tie into later columns, so that many entries may differ
  without harm; what then counts is the error E weighted by the Hessian H of the calibration inputs.
  """
  differing = share_that_differs(pair)
  if differing <= _ROUNDING_TIES or not np.all(np.isfinite(pair.ours[pair.name])):
    return differing
  matrix = pair.name.removeprefix("dequantized/")
  weight = np.asarray(unbank(pair.case.under("params/"))[matrix], np.float64)
  hessian = np.asarray(pair.case.inputs[f"hessian/{matrix}"], np.float64)
  ours, expected = (float(np.sum(((weight - v) @ hessian) * (weight - v))) for v in pair.values())
  return min(differing, ours / expected - 1)


def share_that_differs(pair: Pair) -> float:
  """share of entries that differ"""
  ours, expected = pair.values()
  return float(np.mean(~np.isclose(ours, expected, rtol=1e-6, atol=1e-9))) if ours.size else 0.0


def presence(pair: Pair) -> float:
  """must be there"""
  return 0.0


def _steps(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
  """What step k of the optimizer added to a parameter; step 0 starts from the inputs of the case."""
  k, parameter = pair.name.removeprefix("params/").split("/", 1)
  if k == "0":
    before = (pair.case.inputs[f"params/{parameter}"],) * 2
  else:
    before = tuple(outputs[f"params/{int(k) - 1}/{parameter}"] for outputs in (pair.ours, pair.expected))
  ours, expected = (after - np.asarray(start, np.float64) for after, start in zip(pair.values(), before, strict=True))
  return ours, expected


def _norm(x: np.ndarray) -> float:
  return float(np.linalg.norm(x))
