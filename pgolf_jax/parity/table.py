"""What `pgolf parity check` says: tables for people, at 80 columns or fewer, and the same as JSON."""

import os
import platform
import shutil
import sys
import textwrap
from collections import defaultdict

import jax

from pgolf_jax.parity.check import Column, Distributions, Report, Row
from pgolf_jax.runtime.memory import cores
from pgolf_jax.runtime.versions import installed

_WIDEST = 80
_NAMED = 6
"""Tensors beyond their limits that are named; `--tensors` lists all."""


def environment() -> dict:
  """Returns what decides last bits: versions, the device, and flags."""
  packages = ("pgolf_jax", "jax", "jaxlib", "numpy", "optax", "flax")
  device = jax.devices()[0]
  return {
    "versions": {
      "python": platform.python_version(),
      **{name: installed(name) or "not installed" for name in packages},
    },
    "device": {
      "platform": device.platform,
      "kind": device.device_kind,
      "count": jax.device_count(),
      "cores": cores(),
      "system": f"{platform.system()} {platform.machine()}",
      "runtime": getattr(device.client, "platform_version", "").splitlines()[0:1],
    },
    "flags": {
      "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
      "matmul_precision": {"float32": "highest", "bfloat16": "default", "float64": "highest"},
      "threads": os.environ.get("PJRT_NPROC", "one per core"),
    },
  }


def environment_text(found: dict) -> str:
  """Returns `environment` in a few lines."""
  device, flags = found["device"], found["flags"]
  kind = "" if device["kind"] == device["platform"] else f" ({device['kind']})"
  return "\n".join(
    [
      _folded(", ".join(f"{name} {version}" for name, version in found["versions"].items())),
      _folded(
        f"1 of {device['count']} devices: {device['platform']}{kind}, {device['system']}, {device['cores']} cores"
      ),
      _folded(
        f"XLA_FLAGS {flags['XLA_FLAGS'] or 'none'}; XLA's threads {flags['threads']}; products of float32 at the "
        "highest precision, of bfloat16 at the default"
      ),
    ]
  )


def text(report: Report, *, tensors: bool = False) -> str:
  """Returns a report as a table: one row per quantity, with its worst tensor, and what does not agree.

  Args:
    tensors: one row per tensor.
  """
  case, columns = report.case, report.columns
  count = len(columns[0].rows)
  types = ", ".join(column.dtype for column in columns)
  title = f"{case.folder.resolve().name}: {case.kind}, {count} tensors, {types}, {report.seconds:.1f} s"
  if report.floor_of:
    title += f"; the floor is {report.floor_of if report.floor_of == 'ours' else 'the reference’s'}"
  parts = [_folded(title), _table(report, tensors=tensors)]
  parts += [_folded(line, 2) for column in columns for line in map(_distribution_line(column), column.distributions)]
  parts += [_outcome(column) for column in columns]
  return "\n".join(part for part in parts if part)


def _width() -> int:
  return min(_WIDEST, shutil.get_terminal_size((_WIDEST, 24)).columns) if sys.stdout.isatty() else _WIDEST


def _folded(line: str, indent: int = 0) -> str:
  return textwrap.fill(
    line, _width(), initial_indent=" " * indent, subsequent_indent=" " * (indent + 2), break_on_hyphens=False
  )


def _table(report: Report, *, tensors: bool) -> str:
  """Rows of numbers, a column for each type; below a quantity its worst tensor in the first type that is not ok."""
  columns, groups = report.columns, defaultdict(list)
  for rows in zip(*(column.rows for column in columns), strict=True):
    groups[rows[0].name if tensors else rows[0].quantity].append(list(rows))
  wide = 24 + 8 + 16 * len(columns)
  if wide > _width():
    return "\n".join(_stacked(name, group, report) for name, group in groups.items())
  above = "".join(f"{column.dtype:>16}" for column in columns)
  names = f"{'':<5}{'tensor' if tensors else 'quantity':<19}{'floor':>8}" + f"{'error':>8}{'limit':>8}" * len(columns)
  lines = [f"{'':<32}{above}", names]
  for name, group in groups.items():
    worst = [max(rows, key=badness) for rows in zip(*group, strict=True)]
    floor = max((row.floor for row in worst if row.floor is not None), default=None)
    numbers = _number(floor) + "".join(_number(row.error) + _number(row.limit) for row in worst)
    verdict = "ok" if all(row.ok for row in worst) else "FAIL"
    if len(name) > 18:
      lines.append(f"{'':<5}{name}")
      name = ""
    lines.append(f"{verdict:<5}{name:<19}{numbers}")
    lines += _worst_lines(worst, report, tensors)
  return "\n".join(lines)


def _stacked(name: str, group: list[list[Row]], report: Report) -> str:
  """A quantity on a narrow screen: a line for each type."""
  lines = [_folded(name)]
  for column, rows in zip(report.columns, zip(*group, strict=True), strict=True):
    row = max(rows, key=badness)
    floor = "" if row.floor is None else f", floor {row.floor:.1e}"
    verdict = "ok" if row.ok else "FAIL"
    lines.append(_folded(f"{verdict} {column.dtype}: {row.error:.1e} of {row.limit:.1e}{floor}; {row.place}", 2))
  return "\n".join(lines)


def _worst_lines(worst: list[Row], report: Report, tensors: bool) -> list[str]:
  """Below a quantity: the errors in units of the last place, and the tensors that the numbers are of."""
  lines = []
  if any(row.ulps is not None for row in worst):
    lines.append(
      f"{'':<5}{'  in the last place':<27}" + "".join(f"{_short(row.ulps):>8}{'':>8}" for row in worst).rstrip()
    )
  if not tensors:
    names = [f"  {worst[0].place}"]
    names += [
      f"{c.dtype} {row.place}" for c, row in zip(report.columns, worst, strict=True) if row.name != worst[0].name
    ]
    lines.append(_folded("; ".join(names), 5))
  return lines


def _number(x: float | None) -> str:
  if x is None:
    return f"{'':>8}"
  return f"{'0' if x == 0 else f'{x:.1e}':>8}"


def _short(x: float | None) -> str:
  if x is None:
    return ""
  return f"{x:.1f}" if x < 9.95 else f"{x:.0f}" if x < 99_999 else f"{x:.0e}"


def _distribution_line(column: Column):
  def line(d: Distributions) -> str:
    return (
      f"{d.name}, {column.dtype}: KL per token {d.mean_kl:.1e} nats in the mean, {d.largest_kl:.1e} at most; "
      f"{d.flips} of {d.tokens} top-1 tokens flip ({d.flips / max(d.tokens, 1):.1%})"
    )

  return line


def _outcome(column: Column) -> str:
  """One sentence where all agrees; otherwise where the two part, and what else does not agree."""
  failed = [row for row in column.rows if not row.ok]
  if not column.rows:
    return _folded(f"{column.dtype}: the case holds nothing that can be compared.")
  if not failed:
    return _folded(f"{column.dtype}: all {len(column.rows)} agree; nothing diverges.")
  first, worst = failed[0], sorted(failed, key=badness, reverse=True)
  lines = [
    f"{column.dtype}: {len(failed)} of {len(column.rows)} do not agree.",
    f"First to diverge, in forward order: {_said(first)}.",
  ]
  lines += [_said(row) for row in worst[:_NAMED] if row is not first]
  if len(failed) > _NAMED:
    lines.append(f"… {len(failed) - _NAMED} more; --tensors lists all.")
  return "\n".join(_folded(line, 2 * (i > 0)) for i, line in enumerate(lines))


def _said(row: Row) -> str:
  if row.error == float("inf") and row.limit == 0:
    return f"{row.place}: {row.measure}"
  times = f", {row.error / row.limit:.1e} times the limit" if row.limit else ""
  return f"{row.place}: error {row.error:.2e}{times} ({row.quantity})"


def badness(row: Row) -> tuple[bool, float]:
  """A key that sorts rows by how near they come to their limits, those beyond them last."""
  return not row.ok, row.error / row.limit if row.limit else row.error


def as_json(reports: list[Report], found: dict) -> dict:
  """Returns reports and `environment` as plain values; a number that is not finite is a string."""
  return {**found, "agree": all(report.ok for report in reports), "cases": [_case_json(report) for report in reports]}


def _case_json(report: Report) -> dict:
  case = report.case
  return {
    "case": case.folder.resolve().name,
    "kind": case.kind,
    "agrees": report.ok,
    "seconds": round(report.seconds, 3),
    "floor_of": report.floor_of,
    "columns": {
      column.dtype: {
        "agrees": column.ok,
        "first_to_diverge": column.first.place if column.first else None,
        "distributions": [d._asdict() for d in column.distributions],
        "tensors": [
          {key: _plain(value) for key, value in {**row._asdict(), "ok": row.ok}.items()} for row in column.rows
        ],
      }
      for column in report.columns
    },
  }


def _plain(value):
  if isinstance(value, float) and value not in (float("inf"), float("-inf")) and value == value:
    return float(value)
  return str(value) if isinstance(value, float) else list(value) if isinstance(value, tuple) else value
