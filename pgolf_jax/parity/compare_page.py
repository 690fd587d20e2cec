"""What a comparison of two runs looks like: a table, JSON, and a figure."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from pgolf_jax.errors import UserError
from pgolf_jax.parity.compare import BLOCKS, Comparison, Curves, Documents, mean_of_series
from pgolf_jax.report.statistics import Ratio
from pgolf_jax.runtime.files import replacing, write_text

_FIGURES = {
  "steps": ("steps", ",.0f"),
  "parameters": ("parameters", ",.0f"),
  "train_seconds": ("training, s", ",.1f"),
  "tokens_per_second": ("tokens/s", ",.0f"),
  "step_ms": ("time per step, ms", ",.1f"),
  "evaluation_seconds": ("test-time training, s", ",.1f"),
  "artifact_bytes": ("artifact, bytes", ",.0f"),
  "code_bytes": ("code, bytes", ",.0f"),
  "total_bytes": ("artifact and code, bytes", ",.0f"),
  "peak_memory_mib": ("peak memory, MiB", ",.0f"),
}
_ROWS = 12  # of the losses by step


def table(comparison: Comparison, *, every_setting: bool = False) -> str:
  """Returns the comparison as text.

  Args:
    every_setting: list all settings that differ, not the first twenty.
  """
  c = comparison
  parts = [f"A  {c.a.name} ({c.a.kind})\nB  {c.b.name} ({c.b.kind})"]
  if c.noise is not None:
    parts[0] += f"\nN  {c.noise.name} ({c.noise.kind}), a second run of A's settings"
  parts += [_stages(c), _figures(c), _settings(c, every_setting)]
  if c.curves is not None:
    parts += [_losses(c), "\n".join(verdict(c))]
  if c.documents is not None:
    parts.append("\n".join(_documents(c.documents)))
  return "\n\n".join(part for part in parts if part)


def verdict(comparison: Comparison) -> list[str]:
  """Returns sentences on where the losses part and by how much they differ."""
  curves = comparison.curves
  said = []
  if curves.first_difference is None:
    said.append(f"The losses are equal at all {len(curves.step)} common steps, as far as they are printed.")
  else:
    said.append(f"The losses first differ by more than is printed at step {curves.first_difference:,}.")
  source = "step-to-step noise" if comparison.noise is None else "step-to-step noise and the noise run"
  if curves.floor is None:
    said.append(f"{len(curves.step)} common steps are too few to tell a difference from noise; at least 8 are needed.")
  elif curves.parted is None:
    at = int(np.argmax(np.abs(curves.mean) / np.maximum(curves.floor, 1e-300)))
    said.append(
      f"They do not part beyond the noise floor: at most {_signed(curves.mean[at])} ({_over(curves)} step "
      f"{curves.step[at]:,}), where noise explains {curves.floor[at]:.2g} ({source})."
    )
  else:
    at = int(np.searchsorted(curves.step, curves.parted))
    said.append(
      f"They part beyond the noise floor at step {curves.parted:,}: {_signed(curves.mean[at])} ({_over(curves)} that "
      f"step), where noise explains {curves.floor[at]:.2g} ({source})."
    )
  if curves.floor is not None and len(curves.step) < 50:
    said.append("Few steps are common to both; a script prints more with TRAIN_LOG_EVERY=10.")
  for name, difference_N in comparison.loss_differences.items():
    unit = " blocks" if len(difference_N) >= 2 * BLOCKS else ""
    said.append(f"Mean difference of the loss, {name}: {_tested(mean_of_series(difference_N), unit)}.")
  return said


def _over(curves: Curves) -> str:
  return f"mean of {curves.window} steps to" if curves.window > 1 else "at"


def _signed(value: float) -> str:
  return f"{value:+.2g}"


def _tested(mean: Ratio, unit: str = "") -> str:
  if mean.error is None:
    return f"{mean.value:+.5f} (one pair)"
  p = "p < 0.0001" if mean.p < 1e-4 else f"p = {mean.p:.2g}"
  return f"{mean.value:+.5f} ± {mean.error:.5f} (n = {mean.count}{unit}, {p})"


def _stages(c: Comparison) -> str:
  sides = [c.a, c.b] + ([] if c.noise is None else [c.noise])
  names = list(dict.fromkeys(name for side in sides for name in side.record.stages))
  head = ["bits per byte", "A", "B", "B − A"] + ([] if c.noise is None else ["N − A"])
  rows = []
  for name in names:
    bpb = [side.record.stages[name].bpb if name in side.record.stages else None for side in sides]
    apart = [None if None in (x, bpb[0]) else x - bpb[0] for x in bpb[1:]]
    rows.append([name, *(_cell(x, ".5f") for x in bpb[:2]), *(_cell(x, "+.5f") for x in apart)])
  return _aligned(head, rows) if rows else ""


def _figures(c: Comparison) -> str:
  rows = []
  for name, (words, form) in _FIGURES.items():
    a, b = figure(c, "a", name), figure(c, "b", name)
    if a is not None or b is not None:
      ratio = f"{b / a:.3f}" if a and b is not None else ""
      rows.append([words, _cell(a, form), _cell(b, form), ratio])
  return _aligned(["", "A", "B", "B / A"], rows) if rows else ""


def figure(c: Comparison, side: str, name: str) -> float | None:
  """Returns a number of the figures' table for side "a" or "b"; None if it is not told."""
  record = getattr(c, side).record
  if name != "step_ms":
    return record.figures.get(name)
  steps = [step for step in sorted(record.seconds) if step >= 5]  # the first ones wait for nothing, or for compiling
  if len(steps) < 2:
    return None
  return 1000 * (record.seconds[steps[-1]] - record.seconds[steps[0]]) / (steps[-1] - steps[0])


def _settings(c: Comparison, every: bool) -> str:
  if not c.settings_in_common:
    return ""
  if not c.settings:
    return f"All {c.settings_in_common} settings that both tell are the same."
  shown = c.settings if every else c.settings[:20]
  rows = [[name, _clip(a), _clip(b)] for name, a, b in shown]
  more = f"\n… and {len(c.settings) - len(shown)} more: --every-setting" if len(shown) < len(c.settings) else ""
  head = [f"settings: {len(c.settings)} of {c.settings_in_common} differ", "A", "B"]
  return _aligned(head, rows) + more


def _losses(c: Comparison) -> str:
  curves = c.curves
  picked = np.unique(np.linspace(0, len(curves.step) - 1, min(_ROWS, len(curves.step))).astype(int))
  seconds = [side.record.seconds for side in (c.a, c.b)]
  rows = [
    [
      f"{curves.step[i]:,}", f"{curves.a[i]:.4f}", f"{curves.b[i]:.4f}", f"{curves.difference[i]:+.2e}",
      "" if curves.floor is None else f"{curves.floor[i]:.1e}",
      *(_cell(s.get(int(curves.step[i])), ",.1f") for s in seconds),
    ]
    for i in picked
  ]  # fmt: skip
  return _aligned(["step", "loss A", "loss B", "B − A", "floor", "s A", "s B"], rows)


def _documents(d: Documents) -> list[str]:
  said = [
    f"After test-time training, {len(d.bpb_a):,} {d.what} that both scored: B is lower on {d.better:,} of them.",
    f"Mean difference of their bits per byte, each counted once: {_tested(d.each)}.",
  ]
  if d.by_bytes is not None:
    said.append(f"Difference of the bits per byte of all their text: {_tested(d.by_bytes)}.")
  if d.what == "batches":
    said.append("(A log names the batches of its first rank alone; these are the ones that both logs name.)")
  return said


def _cell(value: float | None, form: str) -> str:
  return "" if value is None else format(value, form)


def _clip(text: str) -> str:
  return text if len(text) <= 32 else f"{text[:31]}…"


def _aligned(head: list[str], rows: list[list[str]]) -> str:
  """Columns, the first to the left, the others to the right."""
  widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
  lines = []
  for row in [head, *rows]:
    cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
    lines.append("  ".join(cells).rstrip())
  return "\n".join(lines)


def as_json(c: Comparison) -> dict[str, Any]:
  """Returns the whole comparison as JSON values; what is not finite or not told is null."""
  sides = {name: getattr(c, name) for name in ("a", "b", "noise")}
  value: dict[str, Any] = {
    name: None
    if side is None
    else {
      "name": side.name,
      "kind": side.kind,
      "stages": {stage: score._asdict() for stage, score in side.record.stages.items()},
      "figures": side.record.figures | ({} if name == "noise" else {"step_ms": figure(c, name, "step_ms")}),
    }
    for name, side in sides.items()
  }
  value["settings"] = {name: {"a": a, "b": b} for name, a, b in c.settings}
  value["settings_in_common"] = c.settings_in_common
  if c.curves is not None:
    value["losses"] = {
      name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in c.curves._asdict().items()
    } | {"paired": {name: mean_of_series(x)._asdict() for name, x in c.loss_differences.items()}}
  if (d := c.documents) is not None:
    by_bytes = None if d.by_bytes is None else d.by_bytes._asdict()
    value["documents"] = {"what": d.what, "each": d.each._asdict(), "by_bytes": by_bytes, "b_is_lower_on": d.better}
  return _without_infinities(value)


def _without_infinities(value):
  if isinstance(value, dict):
    return {k: _without_infinities(v) for k, v in value.items()}
  if isinstance(value, list):
    return [_without_infinities(v) for v in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def write(c: Comparison, folder: Path) -> list[str]:
  """Writes compare.txt, compare.json and, where matplotlib is installed, compare.png; returns sentences about it."""
  folder.mkdir(parents=True, exist_ok=True)
  write_text(folder / "compare.txt", table(c, every_setting=True) + "\n")
  write_text(folder / "compare.json", json.dumps(as_json(c), allow_nan=False) + "\n")
  try:
    draw(c, folder / "compare.png")
  except UserError as missing:
    return [f"{folder}: compare.txt, compare.json", str(missing)]
  return [f"{folder}: compare.txt, compare.json, compare.png"]


_A, _B, _INK, _SOFT = "#1f5fbf", "#c4540a", "#1d232b", "#9aa5b1"


def draw(c: Comparison, path: Path) -> None:
  """Draws losses, their difference with the noise floor, scores by stage and by document, as far as there are any.

  Raises:
    UserError: matplotlib is not installed.
  """
  try:
    from matplotlib.figure import Figure
  except ImportError:
    raise UserError("No figure is drawn, since matplotlib is not installed; pip install 'pgolf_jax[report]'.") from None
  stages = [name for name in c.a.record.stages if name in c.b.record.stages]
  panels = [
    (_draw_losses, c.curves),
    (_draw_difference, c.curves),
    (_draw_stages, stages),
    (_draw_documents, c.documents),
  ]
  panels = [draw_panel for draw_panel, there in panels if there]
  rows = (len(panels) + 1) // 2
  figure = Figure(figsize=(11 if len(panels) > 1 else 5.5, 3.7 * rows + 0.7), layout="constrained", dpi=150)
  figure.suptitle(f"A  {c.a.name}      B  {c.b.name}", fontsize=10, color=_INK)
  for place, draw_panel in enumerate(panels, 1):
    axes = figure.add_subplot(rows, min(len(panels), 2), place)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e2e5e9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    draw_panel(axes, c)
  with replacing(path) as partial:
    figure.savefig(partial, format="png")


def _draw_losses(axes, c: Comparison) -> None:
  for side, color, name in ((c.a, _A, "A"), (c.b, _B, "B")):
    steps = sorted(side.record.losses)
    losses = [side.record.losses[step] for step in steps]
    marker = "o" if len(steps) < 60 else None
    axes.plot(steps, losses, color=color, linewidth=1.1, alpha=0.85, label=name, marker=marker, markersize=3)
  axes.set(xscale="log", yscale="log", xlabel="step", ylabel="nats per token")
  axes.xaxis.set_major_formatter("{x:,.0f}")
  for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
    set_formatter("{x:g}")
  axes.tick_params(which="minor", labelsize=8)
  axes.set_title("Training loss", fontsize=10, loc="left")
  axes.legend(frameon=False, fontsize=9)


def _draw_difference(axes, c: Comparison) -> None:
  curves = c.curves
  axes.plot(curves.step, curves.difference, ".", color=_SOFT, markersize=3, label="B − A")
  if curves.window > 1:
    axes.plot(curves.step, curves.mean, color=_INK, linewidth=1.2, label=f"mean of {curves.window} steps")
  if curves.floor is not None:
    label = "noise floor"
    axes.fill_between(curves.step, -curves.floor, curves.floor, color=_A, alpha=0.12, linewidth=0, label=label)
    reach = 2 * max(np.median(curves.floor), np.quantile(np.abs(curves.difference), 0.98), 1e-9)
    axes.set_ylim(-reach, reach)
  if curves.parted is not None:
    axes.axvline(curves.parted, color=_B, linewidth=1, linestyle="--", label=f"they part: step {curves.parted:,}")
  axes.axhline(0, color=_INK, linewidth=0.6)
  axes.set(xlabel="step", ylabel="nats per token")
  axes.set_title("Difference of the training loss", fontsize=10, loc="left")
  axes.legend(frameon=False, fontsize=8)


def _draw_stages(axes, c: Comparison) -> None:
  stages = [name for name in c.a.record.stages if name in c.b.record.stages]
  place = np.arange(len(stages))
  for side, color, shift, name in ((c.a, _A, -0.09, "A"), (c.b, _B, 0.09, "B")):
    bpb = [side.record.stages[stage].bpb for stage in stages]
    axes.plot(place + shift, bpb, "o", color=color, label=name, markersize=6)
    for x, y in zip(place + shift, bpb, strict=True):
      ha, dx = ("right", -6) if shift < 0 else ("left", 6)
      axes.annotate(f"{y:.4f}", (x, y), (dx, 0), textcoords="offset points", ha=ha, va="center", fontsize=8)
  axes.set_xticks(place, [stage.replace(" ", "\n", 1) for stage in stages])
  axes.set_xlim(-0.7, len(stages) - 0.3)
  axes.margins(y=0.15)
  axes.set_ylabel("bits per byte")
  axes.set_title("Score by stage", fontsize=10, loc="left")
  axes.legend(frameon=False, fontsize=9)


def _draw_documents(axes, c: Comparison) -> None:
  d = c.documents
  axes.plot(d.bpb_a, d.bpb_b - d.bpb_a, ".", color=_INK, markersize=4, alpha=0.6)
  axes.axhline(0, color=_INK, linewidth=0.6)
  axes.axhline(d.each.value, color=_B, linewidth=1.2, label=f"mean {d.each.value:+.4f}")
  axes.set(xlabel="bits per byte of A", ylabel="B − A")
  axes.set_title(
    f"After test-time training, by {d.what[:-2] if d.what == 'batches' else d.what[:-1]}", fontsize=10, loc="left"
  )
  axes.legend(frameon=False, fontsize=9)
