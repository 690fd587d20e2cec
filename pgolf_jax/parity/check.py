"""Comparison of outputs with a golden case: measures of distance, and how large a distance may be.

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

import dataclasses
from collections.abc import Callable
from fnmatch import fnmatchcase
from itertools import groupby
from typing import NamedTuple

import jax
import numpy as np

from pgolf_jax.parity import Arrays, Case, Outputs
from pgolf_jax.parity.run import run
from pgolf_jax.quantize.artifact.tensors import unbank
from pgolf_jax.quantize.make import grid_step

PERTURBATION = 1e-7
UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
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
  Tolerance("forward", "*/grads/*", "gradients", relative_to_gradients, 1e-4),
  Tolerance("forward", "*/logits", "logits", relative_to_norm, 1e-5),
  Tolerance("forward", "*", "loss", relative_to_norm, 1e-5),
  Tolerance("optimizer", "grad_norm/*", "norm of the gradient", relative_to_norm, 1e-5, _in_float32),
  # In bfloat16 single rounding ties decide about a whole matrix.
  Tolerance("optimizer", "params/*_bank", "Muon steps", worst_matrix_step, 5e-2, _muon, _muon_in_bfloat16),
  Tolerance("optimizer", "params/*_bank", "Muon steps", relative_to_step, 1e-3, _muon),
  Tolerance("optimizer", "params/*", "Adam steps", relative_to_step, 1e-3, _in_float32),
  Tolerance("train", "train_loss", "training loss, nats", largest_difference, 1e-3),
  Tolerance("train", "val_loss_*", "validation loss, nats", largest_difference, 1e-3),
  Tolerance("train", "val_bpb_*", "bits per byte", largest_difference, 5e-4),
  Tolerance("train", "params_ema/*", "averaged weights", relative_to_norm, 1e-3),
  Tolerance("e2e", "train_loss", "training loss, nats", largest_difference, 1e-3),
  Tolerance("e2e", "val_bpb_raw", "bits per byte", largest_difference, 5e-4),
  Tolerance("e2e", "val_bpb_ema", "bits per byte, averaged", largest_difference, 5e-4),
  # The reference drew its calibration rows and its adapters at random.
  Tolerance("e2e", "val_bpb_quantized", "bits per byte, quantised", largest_difference, 2e-3),
  Tolerance("e2e", "val_bpb_ttt", "bits per byte, adapted", higher_by, 5e-3),
  Tolerance("e2e", "val_loss_*", "validation loss", presence, 0.0),
  # Tensors without moments are stored in float16 or as int8 rows, which every implementation rounds alike.
  Tolerance("quantize", "dequantized/*", "GPTQ matrices", rounded_differently, 5e-3, _in_float32, _is_calibrated),
  Tolerance("quantize", "dequantized/*", "other tensors", share_that_differs, 0.0, _in_float32),
  Tolerance("ngram", "*", "hints", entries_that_differ, 0.0, _in_float32),
  Tolerance("ttt", "nll", "loss of a target, nats", largest_difference, 1e-3),
  Tolerance("ttt", "val_*", "loss and bits per byte", largest_difference, 1e-5),
  Tolerance("ttt", "params_after/*", "weights after the global phase", relative_to_norm, 1e-3),
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


class Row(NamedTuple):
  """One comparison."""

  name: str
  error: float
  limit: float
  measure: str
  quantity: str
  floor: float | None = None

  @property
  def ok(self) -> bool:
    return self.error <= self.limit  # false for NaN


def check(case: Case, ours: Outputs, floors: dict[str, float] | None = None) -> list[Row]:
  """Compares every output of the reference with ours; a missing one has an infinite error.

  Args:
    floors: the perturbation floor by tensor, from which limits are derived; None for float32 on a CPU.
  """
  if case.kind == "caseops":
    return _check_documents(ours, case.expected)
  return _compare(case, ours, case.expected, floors)


def needs_floors(case: Case) -> bool:
  """Whether tolerances depend on the floor: on an accelerator, and in other types than the reference's."""
  if case.kind == "caseops":
    return False
  return jax.default_backend() != "cpu" or case.types != case.reference_types


def measure_floors(case: Case) -> dict[str, float]:
  """Tensor → its perturbation floor, in the measure of its tolerance; see `TOLERANCES`."""
  exact = dataclasses.replace(case, dtype="float32")
  base, moved = run(exact), run(dataclasses.replace(exact, perturbation=PERTURBATION))
  scaled = {
    name: value * (1 + PERTURBATION) if np.issubdtype(value.dtype, np.floating) else value
    for name, value in base.items()
  }
  by_inputs, by_itself = (_compare(exact, outputs, base, None) for outputs in (moved, scaled))
  return {a.name: max(abs(a.error), abs(b.error)) for a, b in zip(by_inputs, by_itself, strict=True)}


def table(rows: list[Row], *, everything: bool = False) -> str:
  """One line per quantity: its worst tensor; and one line per tensor that does not agree.

  Args:
    everything: one line per tensor.
  """
  floors = any(row.floor is not None for row in rows)
  lines = [f"{'':<6}{'error':>11}{'tolerance':>11}{'floor' if floors else '':>11}  quantity"]
  for _, group in groupby(sorted(rows, key=lambda row: row.quantity), key=lambda row: row.quantity):
    ranked = sorted(group, key=_badness, reverse=True)
    failed = [row for row in ranked if not row.ok]
    shown = ranked if everything else failed or ranked[:1]
    lines += [_line(row) + ("" if everything or len(ranked) == 1 else f"; {len(ranked)} tensors") for row in shown]
  failed = sum(not row.ok for row in rows)
  return "\n".join([*lines, f"{len(rows) - failed} agree, {failed} do not"])


def agrees(rows: list[Row]) -> bool:
  """Whether there is something to compare and all of it is within tolerance."""
  return bool(rows) and all(row.ok for row in rows)


def arithmetic(case: Case) -> str:
  """The type and the device that compute a case, for people."""
  device = jax.devices()[0]
  kind = "" if device.device_kind == device.platform else f" ({device.device_kind})"
  return f"{' and '.join(sorted(set(case.types)))} on {device.platform}{kind}"


def _compare(case: Case, ours: Arrays, expected: Arrays, floors: dict[str, float] | None) -> list[Row]:
  rows: list[Row] = []
  for name, wanted in expected.items():
    tolerance = tolerance_for(case, name)
    if tolerance is None:
      continue
    words = (tolerance.measure.__doc__ or "").partition("\n")[0]
    if name not in ours or ours[name].shape != wanted.shape:
      fault = "missing" if name not in ours else f"has the shape {ours[name].shape}, not {wanted.shape}"
      rows.append(Row(name, float("inf"), 0.0, fault, tolerance.quantity))
      continue
    floor = None if floors is None else floors[name]
    error = tolerance.measure(Pair(case, name, ours, expected))
    rows.append(Row(name, error, tolerance.limit_for(case, floor), words, tolerance.quantity, floor))
  return rows


def _check_documents(ours: list[dict], expected: list[dict]) -> list[Row]:
  """The number of documents that differ, by field."""
  rows = [Row("documents", abs(len(ours) - len(expected)), 0, "missing or too many", "documents")]
  for field in expected[0] if expected else ():
    differing = sum(a.get(field) != b[field] for a, b in zip(ours, expected, strict=False))
    rows.append(Row(field, differing, 0, "documents that differ", field))
  return rows


def _badness(row: Row) -> tuple[bool, float]:
  return not row.ok, row.error / row.limit if row.limit else row.error


def _line(row: Row) -> str:
  floor = "" if row.floor is None else f"{row.floor:.3g}"
  verdict = "ok" if row.ok else "FAIL"
  return f"{verdict:<6}{row.error:>11.3g}{row.limit:>11.3g}{floor:>11}  {row.quantity}: {row.name}, {row.measure}"
