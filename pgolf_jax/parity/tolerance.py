"""How far an output may be from the reference's.

**Float32 on a CPU.** The limits of the table below are those that independent implementations of the same arithmetic
were seen to keep, several times over. They hold for the hints, gates, texts and byte counts exactly.

**Another type or another device.** The limit follows from the perturbation floor F: the distance by which our own
float32 outputs move, in the measure of the table, when every input is multiplied by 1 ± 1e-7, about the last bit of a
float32; at least the distance by which they move when they themselves are multiplied by 1 + 1e-7. Arithmetic with unit
roundoff u (float32: 2⁻²⁴, bfloat16: 2⁻⁸) multiplies what it rounds by at most 1 ± u. To first order outputs move in
proportion to the inputs, so that rounding every weight once moves them by F·u/1e-7. A matrix product rounds its
weights, its inputs and its output, and its gradient the same three once more: at most 6 times as much. The limit is
6·F·u/1e-7, or that of the table if it is larger. (These errors are nearly independent: in bfloat16 on a CPU most
tensors were seen to keep 0.6·F·u/1e-7, and all 2·F·u/1e-7.) Where the limit exceeds 1 in a measure relative to a norm,
that arithmetic does not determine the tensor. What is exact stays exact.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import NamedTuple

from pgolf_jax.parity import measure
from pgolf_jax.parity.case import Case
from pgolf_jax.parity.measure import Pair

PERTURBATION = 1e-7
UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
ROUNDINGS = 6  # of a matrix product and its gradient


def coarser(*types: str) -> str:
  """The type that rounds most."""
  return max(types, key=UNIT_ROUNDOFF.__getitem__)


class Tolerance(NamedTuple):
  """The largest distance between tensors of one quantity."""

  kind: str
  tensors: str  # pattern of the names of tensors
  quantity: str
  measure: Callable[[Pair], float]
  limit: float
  computed_in: Callable[[Case], str] = lambda case: coarser(case.types.compute, case.reference_types.compute)
  applies: Callable[[Case, str], bool] = lambda case, name: True

  def limit_for(self, case: Case, floor: float | None) -> float:
    """The limit in the case's arithmetic; `floor` is None for float32 on a CPU."""
    if floor is None or self.limit == 0:
      return self.limit
    return max(self.limit, ROUNDINGS * floor * UNIT_ROUNDOFF[self.computed_in(case)] / PERTURBATION)


def _in_float32(case: Case) -> str:
  return "float32"


def _muon(case: Case) -> str:
  return coarser(case.types.muon, case.reference_types.muon)


def _muon_in_bfloat16(case: Case, name: str) -> bool:
  return _muon(case) == "bfloat16"


def _is_calibrated(case: Case, name: str) -> bool:
  return f"hessian/{name.removeprefix('dequantized/')}" in case.inputs


TOLERANCES = (
  Tolerance("forward", "*/grads/*", "gradients", measure.relative_to_norm, 1e-4),
  Tolerance("forward", "*/logits", "logits", measure.relative_to_norm, 1e-5),
  Tolerance("forward", "*", "loss", measure.relative_to_norm, 1e-5),
  Tolerance("optimizer", "grad_norm/*", "norm of the gradient", measure.relative_to_norm, 1e-5, _in_float32),
  # In bfloat16 single rounding ties decide about a whole matrix.
  Tolerance("optimizer", "params/*_bank", "Muon steps", measure.worst_matrix_step, 5e-2, _muon, _muon_in_bfloat16),
  Tolerance("optimizer", "params/*_bank", "Muon steps", measure.relative_to_step, 1e-3, _muon),
  Tolerance("optimizer", "params/*", "Adam steps", measure.relative_to_step, 1e-3, _in_float32),
  Tolerance("train", "train_loss", "training loss, nats", measure.largest_difference, 1e-3),
  Tolerance("train", "val_loss_*", "validation loss, nats", measure.largest_difference, 1e-3),
  Tolerance("train", "val_bpb_*", "bits per byte", measure.largest_difference, 5e-4),
  Tolerance("train", "params_ema/*", "averaged weights", measure.relative_to_norm, 1e-3),
  Tolerance("e2e", "train_loss", "training loss, nats", measure.largest_difference, 1e-3),
  Tolerance("e2e", "val_bpb_raw", "bits per byte", measure.largest_difference, 5e-4),
  Tolerance("e2e", "val_bpb_ema", "bits per byte, averaged", measure.largest_difference, 5e-4),
  # The reference drew its calibration rows and its adapters at random.
  Tolerance("e2e", "val_bpb_quantized", "bits per byte, quantised", measure.largest_difference, 2e-3),
  Tolerance("e2e", "val_bpb_ttt", "bits per byte, adapted", measure.higher_by, 5e-3),
  Tolerance("e2e", "val_loss_*", "validation loss", measure.presence, 0.0),
  # Tensors without moments are stored in float16 or as int8 rows, which every implementation rounds alike.
  Tolerance(
    "quantize", "dequantized/*", "GPTQ matrices", measure.rounded_differently, 5e-3, _in_float32, _is_calibrated
  ),
  Tolerance("quantize", "dequantized/*", "other tensors", measure.share_that_differs, 0.0, _in_float32),
  Tolerance("ngram", "*", "hints", measure.entries_that_differ, 0.0, _in_float32),
  Tolerance("ttt", "nll", "loss of a target, nats", measure.largest_difference, 1e-3),
  Tolerance("ttt", "val_*", "loss and bits per byte", measure.largest_difference, 1e-5),
  Tolerance("ttt", "params_after/*", "weights after the global phase", measure.relative_to_norm, 1e-3),
  Tolerance("ttt", "hint_ids", "hints", measure.entries_that_differ, 0.0, _in_float32),
  Tolerance("ttt", "gate_mask", "hints", measure.entries_that_differ, 0.0, _in_float32),
)
"""The first that matches a tensor counts; tensors that none matches are informative."""


def tolerance_for(case: Case, name: str) -> Tolerance | None:
  """The tolerance of a tensor of a case; None if the tensor is not compared."""
  for tolerance in TOLERANCES:
    if tolerance.kind == case.kind and fnmatchcase(name, tolerance.tensors) and tolerance.applies(case, name):
      return tolerance
  return None
