"""Several runs side by side: sets of seeds, their differences, and the rules of the field applied to them."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.ticker import PercentFormatter

from pgolf_jax.report import statistics, style
from pgolf_jax.report.documents import in_order_of
from pgolf_jax.report.gather import Absent, RunData
from pgolf_jax.report.statistics import REFERENCE, Difference, Rules, Summary
from pgolf_jax.report.style import FULL, INK, MUTED, SERIES, SOFT, Plot, Table, canvas, figure
from pgolf_jax.settings.load import differences

Runs = Sequence[RunData]
STAGES = ("ttt", "artifact", "plain")
"""Stages with a score, the last first."""


class Group(NamedTuple):
  """Runs of one config, which differ in their seed."""

  label: str
  runs: list[RunData]

  def values(self, stage: str, figure: str) -> list[float]:
    """Returns a figure of a stage, one a run."""
    return [run.results[stage][figure] for run in self.runs]


class Pair(NamedTuple):
  """One run or group against a baseline; differences are the second less the first, so that negative is better.

  Attributes:
    bpb: over all bytes.
    documents: the same stage's, paired, document by document, in bits per byte; None without scores of the same ones.
    seeds: paired over the seeds that both groups have; None for fewer than two.
    welch: of the runs' bits per byte; its p is None where a group has one run.
    rules: of a new record; None where a group has one run.
  """

  baseline: str
  challenger: str
  bpb: float
  documents: Difference | None
  seeds: Difference | None
  welch: Difference | None
  rules: Rules | None


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What several runs say together.

  Attributes:
    stage: the last one that every run has completed.
    groups: in the order in which the runs were named.
    summaries: of the stage's bits per byte, one a group.
    pairs: against the first group, or, of one group's runs, against its first run.
    published: against the published reference; None where another validation set is scored.
    notes: what could not be compared, and why.
  """

  stage: str
  groups: list[Group]
  summaries: list[Summary]
  pairs: list[Pair]
  published: Pair | None
  notes: list[str]


def grouped(runs: Runs) -> list[Group]:
  """Returns the runs by config, in the order in which they were named; a label says what sets a config apart."""
  by_config: dict[str, list[RunData]] = {}
  for run in runs:
    by_config.setdefault(run.config, []).append(run)
  sets = list(by_config.values())
  if len(sets) == 1:
    return [Group(f"{len(runs)} seeds" if len(runs) > 1 else runs[0].name, sets[0])]
  labels = [_label(members, sets) for members in sets]
  return [Group(label, members) for label, members in zip(labels, sets, strict=True)]


def _label(members: list[RunData], sets: list[list[RunData]]) -> str:
  """Returns the settings in which a group differs from the first one, or of the first, from the second."""
  other = sets[1] if members is sets[0] else sets[0]
  named = [
    (name, value) for name, (value, _) in differences(members[0].settings, other[0].settings).items() if name != "seed"
  ]
  if not named or len(named) > 2:
    return members[0].name if len(members) == 1 else f"{members[0].name} and {len(members) - 1} more"
  return ", ".join(f"{name}={value}" for name, value in named)


def strokes(runs: Runs) -> list[tuple[str, str | None]]:
  """Returns each run's colour and name in a legend: runs of one config share both where there are several configs."""
  configs = list(dict.fromkeys(run.config for run in runs))
  if len(configs) in (1, len(runs)):
    return [(SERIES[number % len(SERIES)], run.name) for number, run in enumerate(runs)]
  labels = {group.runs[0].name: group.label for group in grouped(runs)}
  return [(SERIES[configs.index(run.config) % len(SERIES)], labels.get(run.name)) for run in runs]


def compare(runs: Runs) -> Comparison:
  """Compares runs at the last stage that all of them have completed.

  Raises:
    Absent: they have no scored stage in common, or scored different validation texts.
  """
  stage = next((stage for stage in STAGES if all(stage in run.results for run in runs)), None)
  if stage is None:
    raise Absent("the runs have no scored stage in common yet.")
  sets = {(run.results[stage]["targets"], run.results[stage]["bytes"]) for run in runs}
  if len(sets) > 1:
    raise Absent("the runs scored different validation texts, so that their scores cannot be compared.")
  groups, notes = grouped(runs), []
  singles = [Group(run.name, [run]) for run in runs]
  ordered = groups if len(groups) > 1 else singles
  pairs = [_pair(ordered[0], other, stage, notes) for other in ordered[1:]]
  published = None
  if sets != {(REFERENCE.targets, REFERENCE.text_bytes)}:
    targets, text_bytes = sets.pop()
    notes.append(
      f"The published figures are not drawn: they are of the official validation set of {REFERENCE.text_bytes:,} "
      f"bytes, and these runs scored another text of {text_bytes:,} bytes ({targets:,} tokens)."
    )
  elif stage == "ttt":
    published = against_published(groups[-1])
  summaries = [statistics.summary(group.values(stage, "bpb")) for group in groups]
  return Comparison(stage, groups, summaries, pairs, published, notes)


def against_published(group: Group) -> Pair:
  """Returns a group of runs on the official validation set against the reference's published seeds."""
  bpb, loss = group.values("ttt", "bpb"), group.values("ttt", "loss")
  seeds = {run.settings.seed: run.results["ttt"]["bpb"] for run in group.runs}
  both = [seed for seed in REFERENCE.seeds if seed in seeds]
  theirs = dict(zip(REFERENCE.seeds, REFERENCE.bpb, strict=True))
  is_set = len(bpb) > 1
  return Pair(
    baseline=REFERENCE.name,
    challenger=group.label,
    bpb=float(np.mean(bpb) - np.mean(REFERENCE.bpb)),
    documents=None,
    seeds=statistics.paired([theirs[s] for s in both], [seeds[s] for s in both]) if len(both) > 1 else None,
    welch=statistics.welch(REFERENCE.bpb, bpb),
    rules=statistics.rules(REFERENCE.loss, loss) if is_set else None,
  )


def _pair(first: Group, second: Group, stage: str, notes: list[str]) -> Pair:
  a, b = first.values(stage, "bpb"), second.values(stage, "bpb")
  documents = None
  try:
    documents = statistics.paired(*document_scores(first, second, stage))
  except Absent as reason:
    if stage == "ttt":
      notes.append(f"{second.label} against {first.label}: {reason}")
  by_seed = [{run.settings.seed: run.results[stage]["bpb"] for run in group.runs} for group in (first, second)]
  both = [seed for seed in by_seed[0] if seed in by_seed[1]]
  return Pair(
    baseline=first.label,
    challenger=second.label,
    bpb=float(np.mean(b) - np.mean(a)),
    documents=documents,
    seeds=statistics.paired(*([scores[s] for s in both] for scores in by_seed)) if len(both) > 1 else None,
    welch=statistics.welch(a, b) if max(len(a), len(b)) > 1 else None,
    rules=statistics.rules(first.values(stage, "loss"), second.values(stage, "loss"))
    if min(len(a), len(b)) > 1
    else None,
  )


_NATS = {"ttt": "nats", "artifact": "nats_plain"}
"""Stage → its scores by document."""


def document_scores(first: Group, second: Group, stage: str = "ttt") -> tuple[np.ndarray, np.ndarray]:
  """Returns a stage's bits per byte by document, means over each group's runs, in the first run's order.

  Raises:
    Absent: a run has no such scores by document, or they are of other documents.
  """
  base = first.runs[0].need("documents")
  means = []
  for group in (first, second):
    columns = [in_order_of(run.need("documents"), base.index) for run in group.runs]
    if any(c is None or not np.array_equal(c.text_bytes, base.text_bytes) for c in columns):
      raise Absent("they scored different documents, which cannot be paired.")
    nats = [getattr(c, _NATS.get(stage, ""), None) for c in columns]
    if any(x is None for x in nats):
      raise Absent(f"the scores of the stage “{stage}” are not kept by document.")
    means.append(np.mean([c.bpb(x) for c, x in zip(columns, nats, strict=True)], axis=0))
  return means[0], means[1]


@figure("Seed by seed")
def seeds(runs: Runs) -> Plot:
  """The last score of every run, with the mean of each group and its 95 % interval."""
  found = compare(runs)
  what = {"ttt": "after test-time training", "artifact": "of the artifact", "plain": "of the averaged weights"}[
    found.stage
  ]

  def draw(width: float):
    drawing, (axes,) = canvas(width, 1.15 + 0.62 * len(found.groups))
    for row, (group, summary) in enumerate(zip(found.groups, found.summaries, strict=True)):
      color = SERIES[row % len(SERIES)]
      if summary.half_width is not None:
        axes.plot([summary.mean - summary.half_width, summary.mean + summary.half_width], [row, row], color=color, lw=7,
                  alpha=0.18)  # fmt: skip
        axes.plot(summary.mean, row, "|", ms=24, mew=2.2, color=color)
      for place, run in enumerate(sorted(group.runs, key=lambda run: run.results[found.stage]["bpb"])):
        value, seed = run.results[found.stage]["bpb"], run.settings.seed
        (point,) = axes.plot(value, row, "o", ms=8, color=color, mec=style.PANEL, mew=1.2)
        style.tip(point, f"{run.name}, seed {seed}: {value:.5f}")
        beside = {"textcoords": "offset points", "ha": "center", "size": 8.5, "color": MUTED}
        axes.annotate(str(seed), (value, row), (0, 11 if place % 2 else -17), **beside)
    if found.published is not None:
      axes.axvline(float(np.mean(REFERENCE.bpb)), color=INK, lw=1.2, ls=(0, (4, 3)), label="published reference, mean")
      style.legend_above(axes)
    axes.set_yticks(range(len(found.groups)), [group.label for group in found.groups])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(found.groups) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.set_xlabel(f"bits per byte {what}; the numbers are seeds")
    style.only_vertical_grid(axes)
    return drawing

  best = min(zip(found.summaries, found.groups, strict=True), key=lambda both: both[0].mean)
  caption = f"{best[1].label}: {best[0].mean:.4f} bits per byte on average"
  if best[0].deviation is not None:
    caption += f", with a standard deviation of {best[0].deviation:.4f}; the bar is the 95 % interval of the mean"
  rows = [
    (run.name, run.settings.seed, group.label, run.results[found.stage]["bpb"])
    for group in found.groups
    for run in group.runs
  ]
  return Plot("seeds", caption + ".", draw, Table(("run", "seed", "set", "bits per byte"), rows), True)


@figure("Document by document")
def paired(runs: Runs) -> Plot:
  """Differences by document from the baseline."""
  groups = grouped(runs)
  ordered = groups if len(groups) > 1 else [Group(run.name, [run]) for run in runs]
  base = ordered[0].runs[0].need("documents")
  gaps = {}
  for other in ordered[1:]:
    first, second = document_scores(ordered[0], other)
    gaps[other.label] = second - first
  order = np.argsort(np.mean(list(gaps.values()), axis=0))
  count = len(order)

  def draw(width: float):
    drawing, (axes,) = canvas(width, 3.4)
    for (label, gap), color in zip(gaps.items(), SERIES[1:] * len(gaps), strict=False):
      if count <= 60:
        axes.plot(np.arange(count), gap[order], "o", color=color, ms=6, label=label)
        axes.axhline(gap.mean(), color=color, lw=1.1, ls=(0, (4, 3)))
      else:
        gap = np.sort(gap)
        pick = np.unique(np.linspace(0, count - 1, 400).astype(int))
        axes.plot((pick + 0.5) / count, gap[pick], color=color, label=label)
    axes.axhline(0, color=SOFT, lw=1)
    if count <= 60:
      axes.set_xticks(np.arange(count), [str(i) for i in base.index[order]] if count <= 30 else [""] * count,
                      fontsize=8.5 if width == FULL else 7.5)  # fmt: skip
      axes.set_xlabel("document")
    else:
      axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
      axes.set_xlabel("share of the documents")
    axes.set_ylabel(f"bits per byte, less {ordered[0].label}")
    style.only_horizontal_grid(axes)
    style.legend_above(axes)
    return drawing

  said = "; ".join(
    f"{label} is better on {int((gap < 0).sum()):,} of {count:,} documents" for label, gap in gaps.items()
  )
  caption = f"Below zero is better than {ordered[0].label}: {said}."
  rows = [(int(base.index[k]), *(float(gap[k]) for gap in gaps.values())) for k in order][:1000]
  return Plot("paired", caption, draw, Table(("document", *gaps), rows), True)
