"""Comparison of what this installation computes with a golden case, in one or several types.

`examine` runs a case and gives its report: for every tensor its error, its limit (tolerances.py), its perturbation
floor and its error in units of the last place, in forward order, so that the first row that is not ok is where the two
part; and for logits how far the distributions themselves are from each other.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import jax
import numpy as np

from pgolf_jax.errors import UserError
from pgolf_jax.parity import Arrays, Case, Outputs
from pgolf_jax.parity.double import KINDS as DOUBLE_KINDS
from pgolf_jax.parity.double import has_double
from pgolf_jax.parity.run import run
from pgolf_jax.parity.tolerances import PERTURBATION, Floor, Pair, coarser, entrywise, tolerance_for
from pgolf_jax.runtime.log import progress

Floors = dict[str, Floor]
"""Tensor → its perturbation floor."""


class Row(NamedTuple):
  """The comparison of one tensor.

  Attributes:
    measure: of the error, in words.
    floor: the perturbation floor, in the same measure; None where it was not measured.
    ulps: the largest |ours − expected| in units of the last place of the tensor's largest value; None for integers.
    at: the first entry beyond the limit, where the measure goes by entries.
  """

  name: str
  error: float
  limit: float
  measure: str
  quantity: str
  floor: float | None = None
  ulps: float | None = None
  at: tuple[int, ...] | None = None

  @property
  def ok(self) -> bool:
    return self.error <= self.limit  # false for NaN

  @property
  def place(self) -> str:
    """The tensor, and the first of its entries that is beyond the limit."""
    return self.name if self.at is None else f"{self.name}[{', '.join(map(str, self.at))}]"


class Distributions(NamedTuple):
  """How far the next-token distributions of two sets of logits are from each other."""

  name: str
  mean_kl: float  # KL(expected ‖ ours), nats per token
  largest_kl: float
  flips: int  # tokens whose most probable continuation is another
  tokens: int


class Column(NamedTuple):
  """One type that a case was computed in."""

  dtype: str
  rows: list[Row]  # in forward order
  distributions: list[Distributions]

  @property
  def ok(self) -> bool:
    return agrees(self.rows)

  @property
  def first(self) -> Row | None:
    """The first tensor, in forward order, that is beyond its limit."""
    return next((row for row in self.rows if not row.ok), None)


class Report(NamedTuple):
  """What `examine` found."""

  case: Case
  columns: list[Column]
  floor_of: str | None  # "the reference" or "ours": which outputs the floors were measured of
  seconds: float

  @property
  def ok(self) -> bool:
    return all(column.ok for column in self.columns)


def examine(case: Case, dtype: str | None = None, ours: Outputs | None = None) -> Report:
  """Runs a case in every type that is its own and shows something, and compares.

  Args:
    dtype: the only type to compute in.
    ours: outputs that `pgolf parity run` wrote, to be compared in place of those of a run.

  Raises:
    UserError: as `run`.
  """
  if dtype == "float64" and not has_double(case.kind):
    raise UserError(
      f"{case.folder}: float64 is for cases of the kinds {' and '.join(DOUBLE_KINDS)}, on CPUs and GPUs; this is "
      f"{case.kind!r} on a {jax.default_backend()}. Leave out --dtype float64."
    )
  began = time.monotonic()
  types = [dtype] if dtype or ours is not None else types_of(case)
  cases = [dataclasses.replace(case, dtype=name) for name in types]
  single = dataclasses.replace(case, dtype="float32")
  wants_floors = case.kind not in _EXACT and (any(map(needs_floors, cases)) or (ours is None and case.kind != "e2e"))
  moved = case.floor if wants_floors else {}
  is_held = wants_floors and moved.keys() >= {name for name in case.expected if tolerance_for(case, name)}
  runs = (len(cases) if ours is None else 0) + (wants_floors and not is_held)
  with progress(f"checking {case.folder.name}", total=runs, unit="runs") as bar:

    def computed(this: Case) -> Outputs:
      bar.note(f"{type_name(this)}, weights moved" if this.perturbation else type_name(this))
      outputs = run(this)
      bar.advance()
      return outputs

    outputs = [ours] if ours is not None else list(map(computed, cases))
    floors = None
    if wants_floors:
      in_single = [o for this, o in zip(cases, outputs, strict=True) if set(this.types) == {"float32"} and ours is None]
      base = in_single[0] if in_single else case.expected if is_held else computed(single)
      if not is_held:
        moved = distances(single, computed(dataclasses.replace(single, perturbation=PERTURBATION)), base)
      floors = with_storing(single, moved, base)
  columns = [
    Column(type_name(this), check(this, given, floors), distributions(given, case.expected))
    for this, given in zip(cases, outputs, strict=True)
  ]
  floor_of = None if floors is None else "the reference" if is_held else "ours"
  return Report(case, columns, floor_of, time.monotonic() - began)


_EXACT = ("ngram", "caseops")
"""Kinds whose outputs are integers and text."""


def types_of(case: Case) -> list[str | None]:
  """The types that a case is computed in unless one is named: the reference's own (None), then others.

  Training and test-time training are left to the reference's type: they compile for a minute in each.
  """
  if case.kind not in ("forward", "optimizer"):
    return [None]
  others = [name for name in ("float32", "bfloat16") if name != coarser(*case.reference_types)]
  return [None, *others, *(["float64"] if has_double(case.kind) else [])]


def type_name(case: Case) -> str:
  """The type of a column, for people: where the model and Muon differ, the one that rounds more."""
  return "exact" if case.kind in _EXACT else coarser(*case.types)


def check(case: Case, ours: Outputs, floors: Floors | None = None) -> list[Row]:
  """Compares every output of the reference with ours, in forward order; a missing one has an infinite error.

  Args:
    floors: the perturbation floor by tensor, from which limits are derived where `needs_floors`.
  """
  if case.kind == "caseops":
    return _check_documents(ours, case.expected)
  names = sorted(case.expected, key=functools.partial(forward_order, case.kind))
  return _compare(case, ours, {name: case.expected[name] for name in names}, floors)


def needs_floors(case: Case) -> bool:
  """Whether limits depend on the floor: on an accelerator, and in other types than the reference's."""
  if case.kind in _EXACT:
    return False
  return jax.default_backend() != "cpu" or case.types != case.reference_types


def distances(case: Case, moved: Arrays, base: Arrays) -> dict[str, float]:
  """Tensor → how far it moved, in the measure of its tolerance.

  At least as far as it would if it were itself multiplied by 1 + `PERTURBATION`.

  Args:
    moved: outputs from the inputs that `perturbed` gives.
    base: outputs from the inputs as they are.
  """
  base = {name: value for name, value in base.items() if name in case.expected}
  scaled = {
    name: value * (1 + PERTURBATION) if np.issubdtype(value.dtype, np.floating) else value
    for name, value in base.items()
  }
  by_inputs, by_itself = (_compare(case, outputs, base, None) for outputs in (moved, scaled))
  return {a.name: max(abs(a.error), abs(b.error)) for a, b in zip(by_inputs, by_itself, strict=True)}


def with_storing(case: Case, moved: dict[str, float], base: Arrays) -> Floors:
  """Floors from how far tensors moved, and from what storing them in float32 moves them by.

  Args:
    moved: as `distances` returns them, of our outputs or of the reference's.
    base: outputs from the inputs as they are.
  """
  if case.kind != "optimizer":
    return {name: Floor(distance, 0.0) for name, distance in moved.items()}
  # The steps of an optimizer are differences: at worst the parameters before and after are rounded in opposite ways.
  half = {k: (-1) ** k * PERTURBATION / 2 for k in range(len(case.about["steps"]))}
  stored = {name: value * (1 + half[int(name.split("/")[1])]) for name, value in base.items() if name in case.expected}
  rows = _compare(case, stored, {name: base[name] for name in stored}, None)
  return {row.name: Floor(moved.get(row.name, 0.0), abs(row.error)) for row in rows}


def agrees(rows: Sequence[Row]) -> bool:
  """Whether there is something to compare and all of it is within tolerance."""
  return bool(rows) and all(row.ok for row in rows)


def distributions(ours: Outputs, expected: Outputs) -> list[Distributions]:
  """How far apart the distributions of every tensor of logits are; softmax in float64."""
  found = []
  for name in sorted(expected) if isinstance(expected, dict) else ():
    if not name.endswith("logits") or name not in ours or ours[name].shape != expected[name].shape:
      continue
    p, q = (_log_softmax(np.asarray(outputs[name], np.float64)) for outputs in (expected, ours))
    kl_T = np.sum(np.exp(p) * (p - q), axis=-1)
    flips = int(np.sum(p.argmax(axis=-1) != q.argmax(axis=-1)))
    found.append(Distributions(name, float(kl_T.mean()), float(kl_T.max()), flips, len(kl_T)))
  return found


def _log_softmax(z_TxV: np.ndarray) -> np.ndarray:
  z_TxV = z_TxV - z_TxV.max(axis=-1, keepdims=True)
  return z_TxV - np.log(np.exp(z_TxV).sum(axis=-1, keepdims=True))


_ORDER = {
  "forward": ("*/activations/*", "*/logits", "*/loss", "*/grads/*"),
  "optimizer": ("grad_norm/*", "*_bank", "*"),
  "train": ("train_loss", "*_raw", "params_ema/*", "*_ema"),
  "e2e": ("train_loss", "*_raw", "params_ema/*", "*_ema", "*_quantized", "*_ttt"),
  "ngram": ("gate_mask", "hint_ids", "boost"),
  "ttt": ("gate_mask", "hint_ids", "nll", "val_*", "params_after/*"),
}
"""Kind → patterns of tensors in the order in which they are computed."""

_WITHIN_A_LAYER = ("q", "k", "v", "attend", "attn", "mlp", "x", "lane0", "lane1")


def forward_order(kind: str, name: str) -> tuple:
  """A key that sorts the tensors of a case by when they are computed; gradients run from the loss backwards."""
  stage = next((i for i, pattern in enumerate(_ORDER.get(kind, ())) if fnmatchcase(name, pattern)), 0)
  parts = name.split("/")
  if kind == "forward":  # the pass without the loop, then that with it
    return parts[0], stage, *_place_in_pass(parts[1], parts[-1])
  if kind == "optimizer":  # one step after the other
    return int(parts[1]) if parts[1].isdigit() else 0, stage, _numbers(name)
  return stage, _numbers(name)


def _place_in_pass(what: str, name: str) -> tuple:
  if what == "activations":
    if name in ("embedding", "hidden"):
      return (-1 if name == "embedding" else 10_000, 0, "")
    position, _, _, tensor = [*name.split("."), "", "", ""][:4]
    within = _WITHIN_A_LAYER.index(tensor) if tensor in _WITHIN_A_LAYER else len(_WITHIN_A_LAYER)
    return int(position) if position.isdigit() else 9_999, within, name
  layer = int(name.split(".")[1]) if name.startswith("blocks.") else -1
  return -layer, int(name in ("smear_gate.weight", "smear_lambda")) + 2 * (name == "tok_emb.weight"), name


def _numbers(name: str) -> tuple:
  """The parts of a name, with its numbers by their size."""
  return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.replace("/", ".").split("."))


def _compare(case: Case, ours: Arrays, expected: Arrays, floors: Floors | None) -> list[Row]:
  rows: list[Row] = []
  derived = floors is not None and needs_floors(case)
  for name, wanted in expected.items():
    tolerance = tolerance_for(case, name)
    if tolerance is None:
      continue
    words = (tolerance.measure.__doc__ or "").partition("\n")[0]
    if name not in ours or ours[name].shape != wanted.shape:
      fault = "missing" if name not in ours else f"has the shape {ours[name].shape}, not {wanted.shape}"
      rows.append(Row(name, float("inf"), 0.0, fault, tolerance.quantity))
      continue
    floor = None if floors is None else floors.get(name)
    error = tolerance.measure(Pair(case, name, ours, expected))
    limit = tolerance.limit_for(case, floor if derived else None)
    beyond = None if error <= limit else entrywise(tolerance.measure, ours[name], wanted, limit)
    # Parameters are stored in float32, whatever their steps are computed in.
    dtype = "float32" if case.kind == "optimizer" else tolerance.computed_in(case)
    ulps = _units_in_last_place(ours[name], wanted, dtype)
    shown = None if floor is None else floor.value
    rows.append(Row(name, error, limit, words, tolerance.quantity, shown, ulps, beyond))
  return rows


def _units_in_last_place(ours: np.ndarray, expected: np.ndarray, dtype: str) -> float | None:
  if not np.issubdtype(expected.dtype, np.floating) or not expected.size:
    return None
  largest = float(np.max(np.abs(expected), initial=0.0, where=np.isfinite(expected)))
  difference = np.abs(np.asarray(ours, np.float64) - np.asarray(expected, np.float64))
  both_nan = np.isnan(ours) & np.isnan(expected)
  unit = 2.0 ** (np.floor(np.log2(largest)) - {"float32": 23, "bfloat16": 7}[dtype]) if largest > 0 else 2.0**-149
  return float(np.max(np.where(both_nan, 0.0, difference)) / unit)


def _check_documents(ours: list[dict], expected: list[dict]) -> list[Row]:
  """The number of documents that differ, by field."""
  rows = [Row("documents", abs(len(ours) - len(expected)), 0, "missing or too many", "documents")]
  for field in expected[0] if expected else ():
    differing = [i for i, (a, b) in enumerate(zip(ours, expected, strict=False)) if a.get(field) != b[field]]
    first = (differing[0],) if differing else None
    rows.append(Row(field, len(differing), 0, "documents that differ", field, at=first))
  return rows
