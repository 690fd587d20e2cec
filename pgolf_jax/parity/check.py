"""How far outputs are from a golden case's, and how far they may be.

The limits are what independent implementations of the same arithmetic in float32 on a CPU were seen to keep, several
times over.
"""

import dataclasses

import numpy as np

from pgolf_jax.parity.case import Arrays, Case


@dataclasses.dataclass(frozen=True)
class Row:
  """One comparison."""

  name: str
  error: float
  limit: float
  measure: str

  @property
  def ok(self) -> bool:
    return self.error <= self.limit  # false for NaN


def check(case: Case, ours: Arrays, expected: Arrays | None = None) -> list[Row]:
  """Every tensor of the expected file against ours; a missing one has an infinite error."""
  expected = case.expected if expected is None else expected
  compare = {
    "forward": _forward,
    "optimizer": _optimizer,
    "train": _train,
    "e2e": _e2e,
    "quantize": _quantize,
    "ngram": _exact,
    "ttt": _ttt,
  }[case.kind]
  rows: list[Row] = []
  for name, wanted in expected.items():
    if name in ours and ours[name].shape == wanted.shape:
      if (row := compare(case, name, ours, expected)) is not None:
        rows.append(row)
    elif _must_be_there(case, name):
      rows.append(Row(name, float("inf"), 0.0, "missing" if name not in ours else f"shape {ours[name].shape}"))
  return rows


def _must_be_there(case: Case, name: str) -> bool:
  # What is stored inside an artifact is our own affair, and the e2e weights are inputs of its later parts.
  return not name.startswith(
    ("quantized/", "params_dequantized/", "params_ema/") if case.kind == "e2e" else "quantized/"
  )


def _norm(x) -> float:
  return float(np.linalg.norm(np.asarray(x, np.float64)))


def _relative(name: str, ours, wanted, limit: float) -> Row:
  floor = 1e-12 * np.sqrt(max(wanted.size, 1))
  return Row(name, _norm(np.asarray(ours, np.float64) - wanted) / max(_norm(wanted), floor), limit, "of the norm")


def _absolute(name: str, ours, wanted, limit: float) -> Row:
  ours = np.asarray(ours, np.float64)
  # A target that neither scored (VAL_DOC_FRACTION) is NaN on both sides.
  difference = np.where(np.isnan(ours) & np.isnan(wanted), 0.0, np.abs(ours - wanted))
  return Row(name, float(np.max(difference, initial=0.0)), limit, "largest difference")


def _exact(case: Case, name: str, ours: Arrays, expected: Arrays) -> Row:
  return Row(name, float(np.sum(ours[name] != expected[name])), 0.0, "entries that differ")


def _forward(case: Case, name: str, ours: Arrays, expected: Arrays) -> Row:
  return _relative(name, ours[name], expected[name], 1e-4 if "/grads/" in name else 1e-5)


def _optimizer(case: Case, name: str, ours: Arrays, expected: Arrays) -> Row | None:
  if name.startswith("grad_norm/"):
    return _relative(name, ours[name], expected[name], 1e-5)
  k, parameter = name.removeprefix("params/").split("/", 1)
  before = (
    (case.inputs[f"params/{parameter}"],) * 2
    if k == "0"
    else tuple(source[f"params/{int(k) - 1}/{parameter}"] for source in (ours, expected))
  )
  ours_step, wanted_step = (
    np.asarray(source[name], np.float64) - start for source, start in zip((ours, expected), before, strict=True)
  )
  size = _norm(wanted_step)
  if size == 0:
    return Row(name, _norm(ours_step), 0.0, "step where none is due")
  short = case.about.get("muon_dtype") == "bfloat16" and parameter.endswith("_bank")
  if not short:
    return Row(name, _norm(ours_step - wanted_step) / size, 1e-3, "of the step's norm")
  # In bfloat16 single rounding ties decide; each matrix of the stack is judged.
  errors = [_norm(a - b) / max(_norm(b), 1e-12) for a, b in zip(ours_step, wanted_step, strict=True)]
  return Row(name, max(errors), 5e-2, "of the step's norm, worst matrix")


def _train(case: Case, name: str, ours: Arrays, expected: Arrays) -> Row:
  if name.startswith("params_ema/"):
    return _relative(name, ours[name], expected[name], 1e-3)
  return _absolute(name, ours[name], expected[name], 5e-4 if "bpb" in name else 1e-3)


def _e2e(case: Case, name: str, ours: Arrays, expected: Arrays) -> Row | None:
  # Calibration rows and adapters are random in the reference, so that its later scores agree only closely.
  limits = {"train_loss": 1e-3, "raw": 5e-4, "ema": 5e-4, "quantized": 2e-3, "ttt": 5e-3}
  kind = name.split("_")[-1] if name != "train_loss" else name
  if kind not in limits or name.startswith(("val_loss", "params")):
    return None
  if kind == "ttt":
    return Row(name, float(ours[name][0] - expected[name][0]), limits[kind], "higher by")
  return _absolute(name, ours[name], expected[name], limits[kind])


def _quantize(case: Case, name: str, ours: Arrays, expected: Arrays) -> Row | None:
  if not name.startswith("dequantized/"):
    return None
  matrix = name.removeprefix("dequantized/")
  differing = float(np.mean(~np.isclose(ours[name], expected[name], rtol=1e-6, atol=1e-9)))
  hessian = case.inputs.get(f"hessian/{matrix}")
  if hessian is None or differing <= 0.005:
    return Row(name, differing, 0.005 if hessian is not None else 0.0, "share of entries that differ")
  # GPTQ rounds: an early tie moves later columns, so what counts is the error on the inputs, tr(E H Eᵀ).
  weight = _matrix(case.params(), matrix)
  damage = [float(np.sum((e @ hessian) * e)) for e in (weight - ours[name], weight - expected[name])]
  return Row(name, damage[0] / damage[1] - 1, 0.005, "more error on the inputs")


def _matrix(params: Arrays, name: str) -> np.ndarray:
  from pgolf_jax.quantize.artifact.banks import unbank

  return np.asarray(unbank(params)[name], np.float64)


def _ttt(case: Case, name: str, ours: Arrays, expected: Arrays) -> Row:
  if name in ("hint_ids", "gate_mask"):
    return _exact(case, name, ours, expected)
  if name.startswith("params_after/"):
    return _relative(name, ours[name], expected[name], 1e-3)
  return _absolute(name, ours[name], expected[name], {"nll": 1e-3, "val_loss": 1e-5, "val_bpb": 1e-5}[name])


def check_caseops(ours: list[dict], expected: list[dict]) -> list[Row]:
  """Documents that differ, by field."""
  rows = [Row("documents", abs(len(ours) - len(expected)), 0, "missing or too many")]
  for field in expected[0] if expected else ():
    differing = sum(a.get(field) != b[field] for a, b in zip(ours, expected, strict=False))
    rows.append(Row(field, differing, 0, "documents that differ"))
  return rows


def table(rows: list[Row], *, everything: bool = False) -> str:
  """Worst first; without `everything` at most ten rows that pass."""
  ranked = sorted(rows, key=lambda r: (r.ok, -(r.error / r.limit if r.limit else r.error)))
  failed = sum(not r.ok for r in rows)
  shown = ranked if everything else ranked[: failed + 10]
  lines = [f"{'':<6}{'error':>12}{'limit':>10}  tensor"]
  lines += [f"{'ok' if r.ok else 'FAIL':<6}{r.error:>12.3g}{r.limit:>10.3g}  {r.name} ({r.measure})" for r in shown]
  if len(shown) < len(rows):
    lines.append(f"      … and {len(rows) - len(shown)} more that agree better")
  return "\n".join([*lines, f"{len(rows) - failed} agree, {failed} do not"])
