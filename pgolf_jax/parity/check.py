"""Comparison of outputs with a golden case: every error beside its tolerance."""

import dataclasses
from itertools import groupby
from typing import NamedTuple

import jax
import numpy as np

from pgolf_jax.parity.case import Arrays, Case, Outputs
from pgolf_jax.parity.run import run
from pgolf_jax.parity.tolerance import PERTURBATION, Pair, tolerance_for


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
  """Tensor → its perturbation floor, in the measure of its tolerance; see tolerance.py."""
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
