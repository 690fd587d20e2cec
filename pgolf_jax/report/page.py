"""The report's page: what its headline says, which figures it holds, and its files."""

import datetime
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup, escape

from pgolf_jax.audit.verdict import rules
from pgolf_jax.errors import UserError, checks_summary
from pgolf_jax.report import PAGE, compare, documents, figures, statistics, style
from pgolf_jax.report.compare import Comparison
from pgolf_jax.report.gather import Absent, RunData, gather
from pgolf_jax.report.style import FULL, HALF, Plot
from pgolf_jax.run_folder import RunFolder
from pgolf_jax.runtime.files import write_text
from pgolf_jax.runtime.log import progress
from pgolf_jax.settings import Settings
from pgolf_jax.settings.load import differences

MOST_BYTES = 2_000_000
"""Of the page."""

_SECTIONS = (
  ("Score", (figures.stages, figures.sizes)),
  ("Training", (figures.loss, figures.schedule, figures.throughput)),
  ("Documents", (documents.gain, documents.length, documents.position, documents.hints)),
  ("Time", (figures.times,)),
)


class Shown(NamedTuple):
  """A figure in the page: the plot, and its SVG at each width."""

  plot: Plot
  svgs: list[Markup]


def write(runs: Mapping[str, RunFolder], out: Path, *, html: bool, png: bool) -> list[Path]:
  """Writes the page, the PNGs and report.json of runs by name into a folder; returns their paths, the page first."""
  with progress("report", unit="figures") as bar:
    data = [gather(run, name) for name, run in runs.items()]
    sections, left_out = plots(data)
    written = []
    try:
      out.mkdir(parents=True, exist_ok=True)
      if html:
        write_text(out / PAGE, render(data, sections, left_out, bar.advance))
        numbers = json.dumps(_numbers(data, sections, left_out), indent=1, default=float)
        write_text(out / "report.json", numbers + "\n")
        written += [out / PAGE, out / "report.json"]
      for plot in (plot for _, members in sections for plot in members if png):
        style.png(plot, out / f"{plot.name}.png")
        written.append(out / f"{plot.name}.png")
        bar.advance()
    except OSError as error:
      where = error.filename or out
      raise UserError(f"{where} cannot be written ({error.strerror}); name another folder with --out.") from error
  return written


def plots(runs: Sequence[RunData]) -> tuple[list[tuple[str, list[Plot]]], list[tuple[str, str]]]:
  """Returns the figures that these runs have, by section, and (titles, reason) of those that are left out."""
  sections, left_out = [], {}
  known = f"{runs[0].name}: " if len(runs) == 1 else ""  # of a single run it goes without saying
  wanted = (("Runs", (compare.seeds, compare.paired)), *_SECTIONS) if len(runs) > 1 else _SECTIONS
  for title, functions in wanted:
    members = []
    for function in functions:
      try:
        members.append(function(runs))
      except Absent as reason:
        left_out.setdefault(_sentence(str(reason).removeprefix(known)), []).append(function.title)
    if members:
      sections.append((title, members))
  return sections, [("; ".join(titles), reason) for reason, titles in left_out.items()]


def render(
  runs: Sequence[RunData],
  sections: list[tuple[str, list[Plot]]],
  left_out: list[tuple[str, str]],
  drawn: Callable[[], None] = lambda: None,
) -> str:
  """Returns the page's HTML; `drawn` is called after each figure."""
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("pgolf_jax.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )  # fmt: skip
  environment.filters |= {
    "score": _score,
    "p": _p_value,
    "seconds": style.duration,
    "cell": _cell,
    "signed": style.signed,
    "code": _with_code,
  }
  compared, left_out = None, list(left_out)
  if len(runs) > 1:
    try:
      compared = compare.compare(runs)
    except Absent as reason:
      left_out.insert(0, ("Comparison", _sentence(str(reason))))
  left_out += [(f"{run.name}, {stage}", why) for run in runs for stage, why in run.lacking.items()]
  if missing := [run.name for run in runs if not run.checks]:
    whose = f"{', '.join(missing)}: " if len(runs) > 1 else ""
    left_out.append(("Audit", f"{whose}not audited; `pgolf audit RUN` or the last stage of `pgolf run` does it."))
  shown = []
  for title, members in sections:
    shown.append((title, []))
    for plot in members:
      widths = (FULL, HALF) if plot.is_full else (HALF,)
      shown[-1][1].append(Shown(plot, [Markup(style.svg(plot, width)) for width in widths]))
      drawn()
  return environment.get_template("page.html.j2").render(
    css=Markup(_text("page.css")),
    script=Markup(_text("page.js")),
    title=_title(runs),
    score=headline(runs, compared),
    verdict=verdict_of(runs),
    lead=lead(runs),
    facts=facts(runs),
    runs=runs,
    sections=shown,
    compared=compared,
    required=rules().required,
    reference=statistics.REFERENCE,
    rule_words={"nats": statistics.RULE_NATS, "p": statistics.RULE_P, "later": statistics.LATER_RULE_P},
    stale=[f"{run.name}: {sentence}" for run in runs for sentence in run.stale],
    left_out=left_out,
    settings=_settings(runs),
    origin=_origin(runs),
    written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    columns=_stages_of(runs),
  )


def _text(name: str) -> str:
  return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _title(runs: Sequence[RunData]) -> str:
  return runs[0].name if len(runs) == 1 else ", ".join(run.name for run in runs[:4]) + (" …" if len(runs) > 4 else "")


class Headline(NamedTuple):
  """The score at the top."""

  value: str
  spread: str
  unit: str
  what: str


def headline(runs: Sequence[RunData], compared: Comparison | None) -> Headline:
  """Returns the best score that there is; of a set, its mean and deviation."""
  words = {"ttt": "after test-time training", "artifact": "of the artifact", "plain": "of the averaged weights"}
  if compared is not None:
    best = min(compared.summaries, key=lambda summary: summary.mean)
    group = compared.groups[compared.summaries.index(best)]
    spread = "" if best.deviation is None else f"± {best.deviation:.4f}"
    of = f"mean of {best.count} seeds, " if best.count > 1 else ""
    which = f"{group.label}: " if len(compared.groups) > 1 else ""
    return Headline(f"{best.mean:.4f}", spread, "bits per byte", f"{which}{of}{words[compared.stage]}")
  scored = [run for run in runs if run.final_stage]
  if scored and len(runs) == 1:
    stage = scored[0].final_stage
    return Headline(f"{scored[0].results[stage]['bpb']:.4f}", "", "bits per byte", words[stage])
  trained = [run for run in runs if run.curves is not None]
  if trained and len(runs) == 1:
    curves = trained[0].curves
    return Headline(
      f"{curves.loss[-1]:.3f}",
      "",
      "nats per token",
      f"training loss at step {int(curves.step[-1]):,}, nothing scored yet",
    )
  return Headline("—", "", "", "nothing to compare yet" if len(runs) > 1 else "nothing is trained yet")


class VerdictWords(NamedTuple):
  """The audit's verdict in a few words; `state` is its class in the page."""

  state: str
  word: str
  text: str


def verdict_of(runs: Sequence[RunData]) -> VerdictWords:
  """Returns what the audits of all runs amount to."""
  reached = [run.verdict for run in runs]
  if broken := [f"{run.name}: {name}" for run in runs if run.verdict for name in run.verdict.broken]:
    more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
    return VerdictWords("broken", "Broken", f"the audit found rules broken: {', '.join(broken[:3])}{more}")
  if any(run.stale for run in runs):
    return VerdictWords(
      "stale", "Outdated", "files changed after they were scored; `pgolf run` does those stages again"
    )
  if all(one is None for one in reached):
    return VerdictWords("none", "Not audited", "nothing is proved about the score yet")
  if any(one is None for one in reached):
    return VerdictWords(
      "unproved", "Not proved", f"{sum(one is None for one in reached)} of {len(runs)} runs are not audited"
    )
  if unproved := list({name: None for one in reached for name in one.unproved}):
    more = f" and {len(unproved) - 3} more" if len(unproved) > 3 else ""
    return VerdictWords("unproved", "Not proved", f"the audit could not prove {', '.join(unproved[:3])}{more}")
  summary = checks_summary([check for run in runs for check in run.checks])
  return VerdictWords("legal", "Legal", f"{summary}; everything that the rules require is proved")


def lead(runs: Sequence[RunData]) -> str:
  """Returns a sentence on what was run."""
  run = runs[0]
  train = run.results.get("train", {})
  model = run.settings.model
  parts = [
    f"A GPT of {train['parameters']:,} parameters" if "parameters" in train else f"A GPT of width {model.model_dim}"
  ]
  parts[0] += f" in {model.num_layers} layers"
  if source := train.get("converted_from"):
    parts.append(f"converted from {source}")
  elif train:
    devices = f"{run.devices or 1} × {run.device}" if run.device else f"{run.devices or 1} devices"
    parts.append(f"trained {train['steps']:,} steps in {style.duration(train['seconds'])} on {devices}")
  elif run.curves is not None:
    cap, step = run.settings.train.max_wallclock_seconds, int(run.curves.step[-1])
    done = (
      f"{style.duration(run.curves.seconds[-1])} of {style.duration(cap)}"
      if cap
      else f"of {run.settings.train.iterations:,}"
    )
    parts.append(f"in training, at step {step:,}{', ' if cap else ' '}{done}")
  if ttt := run.results.get("ttt"):
    parts.append(f"scored in {ttt['order']} order")
  first = ", ".join(parts) + "."
  if len(runs) > 1:
    configs = len(compare.grouped(runs))
    first = (
      f"{len(runs)} runs of {'one config' if configs == 1 else f'{configs} configs'}. The first: "
      + first[0].lower()
      + first[1:]
    )
  return first


class Fact(NamedTuple):
  """A key figure: what it is, its value, a note, and the share of a budget that it uses, if it has one."""

  label: str
  value: str
  note: str
  share: float | None = None


def facts(runs: Sequence[RunData]) -> list[Fact]:
  """Returns the strip of key figures; of several runs, their means."""

  def mean(stage: str, name: str) -> float | None:
    values = [run.results[stage][name] for run in runs if name in run.results.get(stage, {})]
    return sum(values) / len(values) if values else None

  found, limits = [], rules()
  if size := mean("artifact", "artifact_bytes"):
    total = size + (mean("artifact", "code_bytes") or 0)
    share = total / limits.submission_bytes
    found.append(
      Fact("artifact and code", style.short(total, "B"), f"{100 * share:.1f} % of {limits.submission_bytes:,}", share)
    )
  memory = [run.curves.peak_memory_bytes for run in runs if run.curves is not None]
  if memory and not all(np.isnan(column).all() for column in memory):
    most = max(float(np.nanmax(column)) for column in memory if not np.isnan(column).all())
    found.append(Fact("peak memory", f"{most / 2**30:.3g} GiB", "of a device in training"))
  if seconds := mean("train", "seconds"):
    found.append(Fact("training", style.duration(seconds), f"{mean('train', 'steps'):,.0f} steps", None))
  if rate := mean("train", "tokens_per_second"):
    found.append(
      Fact(
        "throughput",
        f"{rate:,.0f} tok/s" if rate < 1e5 else style.short(rate, "tok/s"),
        f"{style.short(mean('train', 'tokens'))} tokens seen",
      )
    )
  if seconds := mean("ttt", "seconds"):
    share = seconds / limits.evaluation_seconds
    found.append(
      Fact("evaluation", style.duration(seconds), f"{100 * share:.0f} % of {limits.evaluation_seconds:.0f} s", share)
    )
  if (gap := figures.gap(runs, "artifact", "ttt")) is not None:
    found.append(Fact("test-time training", style.signed(gap), "bits per byte against the artifact"))
  if loss := mean("ttt", "loss") or mean("artifact", "loss") or mean("plain", "loss"):
    found.append(Fact("validation loss", f"{loss:.4f}", "nats per token"))
  return found


def _stages_of(runs: Sequence[RunData]) -> list[str]:
  return [stage for stage in ("plain", "artifact", "ttt") if any(stage in run.results for run in runs)]


def _settings(runs: Sequence[RunData]) -> list[tuple[str, str, list[str]]]:
  """Returns (name, the record's value, each run's value) of settings that differ from the record's or between runs."""
  changed = {name: None for run in runs for name in differences(run.settings, Settings())}
  each = [differences(run.settings, Settings()) for run in runs]
  rows = []
  for name in changed:
    record = next(values[name][1] for values in each if name in values)
    rows.append((name, record, [values.get(name, (record,))[0] for values in each]))
  return rows


def _origin(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
  """Returns name → each run's value of what ties the figures to files."""

  def made(run: RunData, stage: str, part: str, name: str) -> str:
    return str(run.results.get(stage, {}).get(part, {}).get(name, "—"))

  return [
    ("run folder", [str(run.path) for run in runs]),
    ("seed", [str(run.settings.seed) for run in runs]),
    (
      "devices",
      [f"{run.devices or '?'} × {run.device}" if run.device else "—" for run in runs],
    ),
    ("settings, SHA-256", [made(run, "train", "made_from", "config") for run in runs]),
    ("data manifest, SHA-256", [made(run, "train", "made_from", "manifest.json") for run in runs]),
    ("artifact, SHA-256", [made(run, "artifact", "made", "artifact.pgolf") for run in runs]),
  ]


def _numbers(runs: Sequence[RunData], sections, left_out) -> dict:
  """Returns what report.json holds: results, and the numbers of every figure."""
  numbers = {plot.name: {"title": plot.title, "caption": plot.caption, "head": plot.table.head, "rows": plot.table.rows}
             for _, members in sections for plot in members}  # fmt: skip
  kept = [{"run": run.name, "path": str(run.path), "seed": run.settings.seed, "device": run.device, "stale": run.stale,
           "results": {stage: {k: v for k, v in result.items() if k not in ("made", "made_from")}
                       for stage, result in run.results.items()}} for run in runs]  # fmt: skip
  return {"runs": kept, "figures": numbers, "left_out": dict(left_out)}


def _sentence(text: str) -> str:
  return text if text.endswith((".", "!", "?")) else text + "."


def _score(value: float | None, digits: int = 5) -> str:
  return "—" if value is None else f"{value:.{digits}f}"


def _p_value(value: float | None) -> str:
  if value is None or math.isnan(value):
    return "—"
  return f"{value:.1e}" if value < 0.001 else f"{value:.3f}"


def _cell(value) -> str:
  """Returns a value of a table as people read it."""
  if value is None or (isinstance(value, float) and math.isnan(value)):
    return "—"
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, int):
    return f"{value:,}"
  return (
    f"{value:,.5g}"
    if isinstance(value, float) and abs(value) >= 1000
    else f"{value:.5g}"
    if isinstance(value, float)
    else str(value)
  )


def _with_code(text: str) -> Markup:
  """Returns a sentence with what stands between backticks as code."""
  parts = [escape(part) for part in text.split("`")]
  return Markup("").join(Markup("<code>{}</code>").format(part) if k % 2 else part for k, part in enumerate(parts))
