"""How far a tensor may be from that of a golden case: measures of distance, and the largest distance of each quantity.

**Float32 on a CPU.** The limits of the table below are those that independent implementations of the same arithmetic
were seen to keep, several times over. They hold for the hints, gates, texts and byte counts exactly.

**Another type or another device.** The limit follows from the perturbation floor F: the distance by which our own
float32 outputs move, in the measure of the table, when every input is multiplied by 1 ± 1e-7, about the last bit of a
float32; at least the distance by which they move when they themselves are multiplied by 1 + 1e-7. Arithmetic with unit
roundoff u (float32: 2⁻²⁴, bfloat16: 2⁻⁸) multiplies what it rounds by at most 1 ± u. To first order outputs move in
proportion to the inputs, so that rounding every weight once moves them by F·u/1e-7. A matrix product rounds its
weights, its inputs and its output, and its gradient the same three once more: at most 6 times as much. The limit is
6·F·u/1e-7, or that of the table if it is larger. Outputs are stored in float32, so that what storing moves them by
counts with float32's u whatever the type of the computation. (These errors are nearly independent: in bfloat16 on a CPU
most tensors were seen to keep 0.6·F·u/1e-7, and all 2·F·u/1e-7.) Where the limit exceeds 1 in a measure relative to a
norm, that arithmetic does not determine the tensor. What is exact stays exact.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np

from pgolf_jax.parity import Arrays, Case
from pgolf_jax.quantize.artifact.tensors import unbank
from pgolf_jax.quantize.make import grid_step

PERTURBATION = 1e-7
UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8}
ROUNDINGS = 6  # of a matrix product and its gradient


def coarser(*types: str) -> str:
  """Returns the type that rounds most."""
  return max(types, key=UNIT_ROUNDOFF.__getitem__)


_TIE_STEPS = 4
"""Steps by which an entry may differ after a tie: of itself one, and what the errors of earlier ones move it by."""

_ROUNDING_TIES = 0.005
"""Share of a tensor's integers that may differ because GPTQ rounded a tie the other way."""


class Pair(NamedTuple):
  """One tensor of two sets of outputs; the sets are there because some measures need other tensors as well."""

  case: Case
  name: str
  ours: Arrays
  expected: Arrays

  def values(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns our tensor and the expected one in float64."""
    return tuple(np.asarray(outputs[self.name], np.float64) for outputs in (self.ours, self.expected))


# Measures: the first line of the docstring names the measure in tables.


def relative_to_norm(pair: Pair) -> float:
  """‖ours − expected‖ / ‖expected‖"""
  ours, expected = pair.values()
  smallest = 1e-12 * np.sqrt(max(expected.size, 1))
  return _norm(ours - expected) / max(_norm(expected), smallest)


def relative_to_gradients(pair: Pair) -> float:
  """‖ours − expected‖ / ‖expected‖, of a gradient; at least a thousandth of all together

  A gradient that is zero by mathematics (one visible key, XSA on one token) is noise in both, without a norm of its
  own to compare with.
  """
  ours, expected = pair.values()
  prefix = pair.name[: pair.name.index("/grads/") + len("/grads/")]
  norms = [_norm(np.asarray(value, np.float64)) for name, value in pair.expected.items() if name.startswith(prefix)]
  return _norm(ours - expected) / max(_norm(expected), 1e-3 * _norm(np.array(norms)), 1e-12)


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
  without harm; what then counts is the error E weighted by the Hessian H of the calibration inputs. Infinite where an
  entry is more than `_TIE_STEPS` steps of its row off, which no tie explains.
  """
  differing = share_that_differs(pair)
  if not _largest_in_steps(pair) <= _TIE_STEPS:
    return float("inf")
  if differing <= _ROUNDING_TIES or not np.all(np.isfinite(pair.ours[pair.name])):
    return differing
  matrix = pair.name.removeprefix("dequantized/")
  weight = np.asarray(unbank(pair.case.under("params/"))[matrix], np.float64)
  hessian = np.asarray(pair.case.inputs[f"hessian/{matrix}"], np.float64)
  ours, expected = (float(np.sum(((weight - v) @ hessian) * (weight - v))) for v in pair.values())
  return min(differing, ours / expected - 1)


def _largest_in_steps(pair: Pair) -> float:
  """The largest difference of an entry, in the quantiser's step of its row (recipe section 4)."""
  matrix = pair.name.removeprefix("dequantized/")
  step_M = grid_step(matrix, unbank(pair.case.under("params/"))[matrix], pair.case.settings.quantize)
  ours, expected = pair.values()
  return float(np.max(np.abs(ours - expected) / np.maximum(step_M.astype(np.float64), 1e-10)[:, None], initial=0.0))


def share_that_differs(pair: Pair) -> float:
  """share of entries that differ"""
  ours, expected = pair.values()
  return float(np.mean(~np.isclose(ours, expected, rtol=1e-6, atol=1e-9))) if ours.size else 0.0


def presence(pair: Pair) -> float:
  """must be there"""
  return 0.0


def entrywise(
  measure: Callable[[Pair], float], ours: np.ndarray, expected: np.ndarray, limit: float
) -> tuple[int, ...] | None:
  """The first entry that is beyond a limit, for measures that go by entries; None for others."""
  if measure not in (largest_difference, entries_that_differ) or expected.size < 2:
    return None
  both_nan = np.isnan(ours) & np.isnan(expected)
  within = np.abs(np.asarray(ours, np.float64) - np.asarray(expected, np.float64)) <= limit
  return tuple(int(i) for i in np.argwhere(~(within | both_nan))[0])


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


class Floor(NamedTuple):
  """The perturbation floor of a tensor, in the measure of its tolerance.

  Attributes:
    moved: how far it moves when every input is multiplied by 1 ± `PERTURBATION`; at least as far as when it is itself
      multiplied by 1 + `PERTURBATION`.
    stored: how far storing in float32 can move it. It counts where a small step is added to a large value.
  """

  moved: float
  stored: float

  @property
  def value(self) -> float:
    return max(self)


class Tolerance(NamedTuple):
  """The largest distance between tensors of one quantity."""

  kind: str
  tensors: str  # pattern of the names of tensors
  quantity: str
  measure: Callable[[Pair], float]
  limit: float
  computed_in: Callable[[Case], str] = lambda case: coarser(case.types.compute, case.reference_types.compute)
  applies: Callable[[Case, str], bool] = lambda case, name: True

  def limit_for(self, case: Case, floor: Floor | None) -> float:
    """The limit in the case's arithmetic; that of the table where no floor is given."""
    if floor is None or self.limit == 0:
      return self.limit
    computed, stored = (UNIT_ROUNDOFF[name] / PERTURBATION for name in (self.computed_in(case), "float32"))
    return max(self.limit, ROUNDINGS * floor.moved * computed, ROUNDINGS * floor.stored * stored)


def _in_float32(case: Case) -> str:
  return "float32"


def _muon(case: Case) -> str:
  return coarser(case.types.muon, case.reference_types.muon)


def _muon_in_bfloat16(case: Case, name: str) -> bool:
  return _muon(case) == "bfloat16"


def _is_calibrated(case: Case, name: str) -> bool:
  return f"hessian/{name.removeprefix('dequantized/')}" in case.inputs


def _never_loops(case: Case, name: str) -> bool:
  """Whether the reference scored without the loop, where we always have it (recipe section 8)."""
  return case.settings.model.num_loops > 0 and case.settings.train.enable_looping_at >= 1


_INTENDED = "looping on, as intended"

TOLERANCES = (
  Tolerance("forward", "*/activations/*", "activations", relative_to_norm, 1e-5),
  Tolerance("forward", "*/grads/*", "gradients", relative_to_gradients, 1e-4),
  Tolerance("forward", "*/logits", "logits", relative_to_norm, 1e-5),
  Tolerance("forward", "*", "loss", relative_to_norm, 1e-5),
  Tolerance("optimizer", "grad_norm/*", "norm of the gradient", relative_to_norm, 1e-5, _in_float32),
  # In bfloat16 single rounding ties decide about a whole matrix.
  Tolerance("optimizer", "params/*_bank", "Muon steps", worst_matrix_step, 5e-2, _muon, _muon_in_bfloat16),
  Tolerance("optimizer", "params/*_bank", "Muon steps", relative_to_step, 1e-3, _muon),
  Tolerance("optimizer", "params/*", "Adam steps", relative_to_step, 1e-3, _in_float32),
  Tolerance("train", "train_loss", "training loss, nats", largest_difference, 1e-3),
  Tolerance("train", "val_*", _INTENDED, presence, 0.0, applies=_never_loops),
  Tolerance("train", "val_loss_*", "validation loss, nats", largest_difference, 1e-3),
  Tolerance("train", "val_bpb_*", "bits per byte", largest_difference, 5e-4),
  Tolerance("train", "params_ema/*", "averaged weights", relative_to_norm, 1e-3),
  Tolerance("e2e", "train_loss", "training loss, nats", largest_difference, 1e-3),
  Tolerance("e2e", "val_bpb_raw", _INTENDED, presence, 0.0, applies=_never_loops),
  Tolerance("e2e", "val_bpb_ema", _INTENDED, presence, 0.0, applies=_never_loops),
  Tolerance("e2e", "val_bpb_raw", "bits per byte", largest_difference, 5e-4),
  Tolerance("e2e", "val_bpb_ema", "averaged bits per byte", largest_difference, 5e-4),
  # The reference drew its calibration rows and its adapters at random.
  Tolerance("e2e", "val_bpb_quantized", "quantised bits/byte", largest_difference, 2e-3),
  Tolerance("e2e", "val_bpb_ttt", "adapted bits per byte", higher_by, 5e-3),
  Tolerance("e2e", "val_loss_*", "validation loss", presence, 0.0),
  # Tensors without moments are stored in float16 or as int8 rows, which every implementation rounds alike.
  Tolerance("quantize", "dequantized/*", "GPTQ matrices", rounded_differently, 5e-3, _in_float32, _is_calibrated),
  Tolerance("quantize", "dequantized/*", "other tensors", share_that_differs, 0.0, _in_float32),
  Tolerance("ngram", "*", "hints", entries_that_differ, 0.0, _in_float32),
  Tolerance("ttt", "nll", "loss of a target, nats", largest_difference, 1e-3),
  Tolerance("ttt", "val_*", "loss and bits per byte", largest_difference, 1e-5),
  Tolerance("ttt", "params_after/*", "after global phases", relative_to_norm, 1e-3),
  Tolerance("ttt", "hint_ids", "hints", entries_that_differ, 0.0, _in_float32),
  Tolerance("ttt", "gate_mask", "hints", entries_that_differ, 0.0, _in_float32),
)
"""The first that matches a tensor counts; tensors that none matches are informative."""


def tolerance_for(case: Case, name: str) -> Tolerance | None:
  """The tolerance of a tensor of a case; None if the tensor is not compared."""
  for tolerance in TOLERANCES:
    if tolerance.kind == case.kind and fnmatchcase(name, tolerance.tensors) and tolerance.applies(case, name):
      return tolerance
  return None
