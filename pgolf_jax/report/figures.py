"""The figures of training, stages, time and bytes, of one run or of several.

Each function takes the runs and returns a `Plot`, or raises `Absent` with the reason.
"""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pgolf_jax.report import style
from pgolf_jax.report.compare import strokes
from pgolf_jax.report.gather import Absent, RunData, step_flops, step_seconds
from pgolf_jax.report.statistics import REFERENCE
from pgolf_jax.report.style import FULL, INK, MUTED, SERIES, SOFT, Plot, Table, canvas, figure

Runs = Sequence[RunData]

_MOST_POINTS = 300
STAGE_WORDS = {"plain": "averaged weights", "artifact": "artifact", "ttt": "test-time training"}
"""Stage with a score → what was scored."""


def having(runs: Runs, part: str) -> list[RunData]:
  """Returns the runs that have a part; raises Absent with the first one's reason if none has."""
  found = [run for run in runs if getattr(run, part) is not None]
  return found or [runs[0].need(part)]


def _binned(x: np.ndarray, most: int = _MOST_POINTS) -> np.ndarray:
  """Returns the means of as many pieces of equal length; values that are not numbers count for nothing."""
  pieces = np.array_split(x, min(most, len(x)))
  return np.array([np.nanmean(piece) if np.isfinite(piece).any() else np.nan for piece in pieces])


def nats_to_bpb(runs: Runs) -> float | None:
  """Returns bits per byte of one nat per target on the validation text, None where nothing was scored."""
  known = [run.validation_set for run in runs if run.validation_set]
  return known[0][0] / known[0][1] / math.log(2) if known else None


@figure("Loss and bits per byte")
def loss(runs: Runs) -> Plot:
  """Training loss by step, with the scores of the stages beside its end."""
  shown = having(runs, "curves")
  factor = nats_to_bpb(shown)
  smooth = {}
  for run in shown:
    pieces = min(60, max(15, len(run.curves.step) // 4))
    smooth[run.name] = (_binned(run.curves.step, pieces), _binned(run.curves.loss, pieces))
  rows = [(run.name, int(step), float(value)) for run in shown for step, value in zip(*smooth[run.name], strict=True)]
  last = max(run.curves.step[-1] for run in shown)

  def draw(width: float):
    drawing, (axes,) = canvas(width, 3.9 if width == FULL else 3.4)
    for run, (color, name) in zip(shown, strokes(shown), strict=True):
      if len(shown) <= 3:
        axes.plot(_binned(run.curves.step, 900), _binned(run.curves.loss, 900), color=color, alpha=0.22, lw=0.9)
      axes.plot(*smooth[run.name], color=color, label="training loss" if len(shown) == 1 else name)
      scored = np.isfinite(run.curves.val_loss)
      if scored.any():
        line = {"label": "validation loss"} if len(shown) == 1 else {}
        axes.plot(run.curves.step[scored], run.curves.val_loss[scored], "o--", color=color, ms=4, lw=1, **line)
      if factor:
        for stage, marker, place in (("plain", "o", 1.03), ("artifact", "s", 1.055), ("ttt", "D", 1.08)):
          if stage in run.results:
            score = run.results[stage]
            label = f"{STAGE_WORDS[stage]} {score['bpb']:.4f}" if len(shown) == 1 else None
            hue = _STAGE_COLORS[stage] if len(shown) == 1 else color
            (point,) = axes.plot(place * last, score["loss"], marker, color=hue, ms=6, label=label, ls="none")
            style.tip(point, f"{run.name}, {STAGE_WORDS[stage]}: {score['bpb']:.5f} bits per byte")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.set_xlim(-0.01 * last, last * (1.11 if factor else 1.02))
    style.short_ticks(axes.xaxis)
    style.only_horizontal_grid(axes)
    if factor:
      right = axes.secondary_yaxis("right", functions=(lambda y: y * factor, lambda y: y / factor))
      right.set_ylabel("bits per byte")
      right.spines["right"].set_visible(False)
    style.legend_above(axes, columns=4 if width == FULL else 2)
    return drawing

  first, end = shown[0].curves.loss[0], float(np.mean([smooth[run.name][1][-1] for run in shown]))
  caption = f"The training loss of {_many(shown, 'this run')} falls from {first:.2f} to {end:.2f} nats per token"
  caption += f" over {int(last):,} steps"
  if factor:
    whose = "its" if len(shown) == 1 else "their"
    caption += f"; the marks at the right are {whose} scores on the validation text, whose bytes the right axis counts"
  return Plot("loss", caption + ".", draw, Table(("run", "step", "nats per token"), rows), True)


_STAGE_COLORS = {"plain": SERIES[3], "artifact": SERIES[1], "ttt": SERIES[2]}


def _many(runs: Runs, one: str) -> str:
  return one if len(runs) == 1 else f"the {len(runs)} runs"


@figure("Learning rate and sequence length")
def schedule(runs: Runs) -> Plot:
  """The factor on the learning rates, Muon's momentum, and the longest segment, by step."""
  run = having(runs, "curves")[0]
  curves = run.curves
  changes = np.flatnonzero(np.diff(curves.seq_len, prepend=np.nan) != 0)
  began = np.flatnonzero(curves.looping > 0)

  def draw(width: float):
    drawing, (top, bottom) = canvas(width, 3.6, rows=2, height_ratios=[3, 2])
    top.plot(curves.step, curves.lr_scale, color=SERIES[0], label="factor on the learning rates")
    if np.isfinite(curves.momentum).any():
      top.plot(curves.step, curves.momentum, color=SERIES[3], lw=1.2, label="Muon’s momentum")
    top.set_ylim(0, 1.06)
    bottom.step(curves.step, curves.seq_len, where="post", color=SERIES[2])
    bottom.set_ylim(0, float(curves.seq_len.max()) * 1.25)
    bottom.set_ylabel("tokens")
    bottom.set_xlabel("step")
    for axes in (top, bottom):
      style.only_horizontal_grid(axes)
      if len(began):
        axes.axvspan(curves.step[began[0]], curves.step[-1], color=SERIES[2], alpha=0.08, lw=0)
    if len(began):
      bottom.text(
        curves.step[began[0]], 0.06, " looping", transform=bottom.get_xaxis_transform(), color=MUTED, size=8.5
      )
    bottom.set_title("longest segment", color=MUTED)
    style.legend_above(top, columns=2)
    bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    style.short_ticks(bottom.xaxis)
    return drawing

  lengths = " to ".join(f"{int(curves.seq_len[i]):,}" for i in changes)
  loops = f"; layers loop from step {int(curves.step[began[0]]):,}" if len(began) else ""
  caption = (
    f"Segments grow from {lengths} tokens{loops}." if len(changes) > 1 else f"Segments of {lengths} tokens{loops}."
  )
  rates = run.settings.optimizer
  caption += f" At factor 1: matrices {rates.matrix_lr:g}, embeddings {rates.embed_lr:g}, scalars {rates.scalar_lr:g}."
  rows = [(int(curves.step[i]), float(curves.lr_scale[i]), int(curves.seq_len[i]), bool(curves.looping[i]))
          for i in np.unique(np.linspace(0, len(curves.step) - 1, min(60, len(curves.step))).astype(int))]  # fmt: skip
  head = ("step", "factor on the learning rates", "longest segment", "looping")
  return Plot("schedule", caption, draw, Table(head, rows))


@figure("Tokens per second and MFU")
def throughput(runs: Runs) -> Plot:
  """Tokens per second of the training clock, and the model's operations against the device's peak."""
  shown = having(runs, "curves")
  rows, lines = [], {}
  for run in shown:
    seconds = step_seconds(run.curves)
    if not np.isfinite(seconds).any():
      raise Absent(f"{run.name}: its metrics hold no clock.")
    pieces = min(80, max(1, len(seconds) // 3))
    # A mean of times, not of rates: the tokens of the piece over its seconds.
    time = _binned(seconds, pieces)
    rate = run.settings.train.batch_tokens / time
    work = _binned(np.where(np.isfinite(seconds), step_flops(run), np.nan), pieces)
    lines[run.name] = (_binned(run.curves.step, pieces), rate, work / time)
    rows += [(run.name, int(s), float(r), float(f)) for s, r, f in zip(*lines[run.name], strict=True)]
  peak = shown[0].peaks if len({run.device for run in shown}) == 1 else None
  unit = peak.flops_per_s if peak else 1.0

  def draw(width: float):
    drawing, (top, bottom) = canvas(width, 3.6, rows=2)
    for run, (color, _) in zip(shown, strokes(shown), strict=True):
      step, rate, work = lines[run.name]
      top.plot(step, rate, color=color)
      bottom.plot(step, work / unit, color=color)
    for axes in (top, bottom):
      style.only_horizontal_grid(axes)
      axes.set_ylim(bottom=0)
    top.set_title("tokens per second", color=MUTED)
    style.short_ticks(top.yaxis)
    if peak:
      bottom.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.3g} %"))
      bottom.set_title(f"MFU, of {style.short(peak.flops_per_s, 'FLOP/s')}", color=MUTED)
    else:
      style.short_ticks(bottom.yaxis)
      bottom.set_title("the model’s FLOP/s on one device", color=MUTED)
    bottom.set_xlabel("step")
    style.short_ticks(bottom.xaxis)
    return drawing

  mean = float(np.mean([run.settings.train.batch_tokens / np.nanmean(step_seconds(run.curves)) for run in shown]))
  work = float(np.mean([_mean_rate(run) for run in shown]))
  caption = f"{mean:,.0f} tokens a second on average, "
  if peak:
    share, rate = f"{100 * work / peak.flops_per_s:.3g} %", style.short(peak.flops_per_s, "FLOP/s")
    caption += f"and {share} of the {rate} that {shown[0].device}’s data sheet gives for dense bfloat16."
  else:
    rate, device = style.short(work, "FLOP/s"), shown[0].device or "the device"
    caption += f"{rate} of the model on one device; the peak rate of {device} is not known, so that no MFU is given."
  caption += " A step counts as three forward passes: two operations a multiply-add of matrices, head and attention."
  head = ("run", "step", "tokens per second", "model FLOP/s of one device")
  return Plot("throughput", caption, draw, Table(head, rows))


def _mean_rate(run: RunData) -> float:
  """Returns the model's operations a second on one device, over all steps whose time is known."""
  seconds, work = step_seconds(run.curves), step_flops(run)
  known = np.isfinite(seconds)
  return float(work[known].sum() / seconds[known].sum())


@figure("The score, stage by stage")
def stages(runs: Runs) -> Plot:
  """Bits per byte from stage to stage."""
  shown = [run for run in runs if run.final_stage]
  if not shown:
    raise Absent("nothing is scored yet; the stages after training do it.")
  names = {
    "plain": "averaged\nweights",
    "artifact": "artifact",
    "untilted": "learning\nat test time",
    "ttt": "and\nhints",
  }
  scores = {run.name: _ladder(run) for run in shown}
  rungs = [name for name in names if any(name in ladder for ladder in scores.values())]

  def draw(width: float):
    drawing, (axes,) = canvas(width, 3.9)
    for run, (color, name) in zip(shown, strokes(shown), strict=True):
      ladder = scores[run.name]
      x = [rungs.index(name) for name in ladder]
      axes.plot(x, list(ladder.values()), "-o", color=color, ms=6.5, label=name)
      for place, (name, value) in zip(x, ladder.items(), strict=True):
        (point,) = axes.plot(place, value, "o", ms=14, alpha=0.0, color=color)
        style.tip(point, f"{run.name}, {name}: {value:.5f}")
        if len(shown) == 1:
          # Scores fall from left to right: the room is above, on the right.
          axes.annotate(f"{value:.4f}", (place, value), (3, 8), textcoords="offset points", color=INK, weight="bold")
    if all(run.validation_set == (REFERENCE.targets, REFERENCE.text_bytes) for run in shown):
      label = f"published reference after test-time training, {np.mean(REFERENCE.bpb):.4f}"
      axes.axhline(float(np.mean(REFERENCE.bpb)), color=MUTED, lw=1.2, ls=(0, (4, 3)), label=label)
      style.legend_above(axes, columns=1)
    axes.set_xticks(range(len(rungs)), [names[name] for name in rungs])
    axes.set_xlim(-0.4, len(rungs) - 0.45)
    axes.margins(y=0.22)
    axes.set_ylabel("bits per byte")
    style.only_horizontal_grid(axes)
    if len(shown) > 1:
      style.legend_above(axes, columns=2)
    return drawing

  steps = (("quantising costs", "plain", "artifact"), ("learning at test time brings", "artifact", "untilted"),
           ("hints", "untilted", "ttt"))  # fmt: skip
  gaps = [(words, gap(shown, before, after)) for words, before, after in steps]
  parts = [f"{words} {style.signed(apart, 5)}" for words, apart in gaps if apart is not None]
  so_far = float(np.mean([ladder[rungs[0]] for ladder in scores.values() if rungs[0] in ladder]))
  said = (", ".join(parts) + " bits per byte.") if parts else f"{so_far:.4f} bits per byte so far."
  rows = [(run.name, *(scores[run.name].get(name) for name in rungs)) for run in shown]
  head = ("run", *(names[name].replace("\n", " ") for name in rungs))
  return Plot("stages", said[0].upper() + said[1:], draw, Table(head, rows))


def gap(runs: Runs, before: str, after: str) -> float | None:
  """Returns the mean difference between two rungs over the runs that have both; None if none has."""
  both = [ladder for run in runs if {before, after} <= (ladder := _ladder(run)).keys()]
  return float(np.mean([ladder[after] - ladder[before] for ladder in both])) if both else None


def _ladder(run: RunData) -> dict[str, float]:
  values = {stage: run.results[stage]["bpb"] for stage in ("plain", "artifact") if stage in run.results}
  if ttt := run.results.get("ttt"):
    values |= {"untilted": ttt["bpb_without_hints"], "ttt": ttt["bpb"]}
  return values


TRAINING, EVALUATION, OTHER = "training clock", "evaluation clock", "outside the clocks"


def periods(run: RunData) -> list[tuple[str, float, str]]:
  """Returns what a run did, in order: name, seconds, and the clock that counts it."""
  found = []
  if (train := run.results.get("train")) and "converted_from" not in train:
    before = train.get("compile_and_warm_up_seconds", 0.0)
    found += [("compile and warm up", before, OTHER), ("train", train["seconds"], TRAINING)]
  if plain := run.results.get("plain"):
    found.append(("score the averaged weights", plain["seconds"], OTHER))
  if made := run.results.get("artifact"):
    found += [(name, made[key], OTHER) for name, key in
              (("calibrate", "calibrate"), ("quantise", "quantize"), ("encode", "encode")) if key in made]  # fmt: skip
    found.append(("score the artifact", made["seconds"], OTHER))
  if ttt := run.results.get("ttt"):
    inside = ttt.get("hint_seconds", 0.0) + ttt.get("global_phase_seconds", 0.0)
    found += [
      ("compile test-time training", ttt.get("compile_seconds", 0.0), OTHER),
      ("hints", ttt.get("hint_seconds", 0.0), EVALUATION),
      ("global phases", ttt.get("global_phase_seconds", 0.0), EVALUATION),
      ("score and learn", ttt["seconds"] - inside, EVALUATION),
    ]
  if audit := run.results.get("audit"):
    found.append(("audit", audit.get("stage_seconds", 0.0), OTHER))
  return found


@figure("Where the time went")
def times(runs: Runs) -> Plot:
  """What took how long, one bar after the other as they ran."""
  done = {run.name: periods(run) for run in runs if periods(run)}
  if not done:
    raise Absent("no stage is complete yet.")
  most = max(done.values(), key=len)
  names = [name for name, *_ in most]
  clocks = {name: clock for name, _, clock in most}
  mean = {name: float(np.mean([s for run in done.values() for n, s, _ in run if n == name])) for name in names}
  colors = {TRAINING: SERIES[0], EVALUATION: SERIES[2], OTHER: SOFT}
  total = sum(mean.values())

  def draw(width: float):
    drawing, (axes,) = canvas(width, 0.62 + 0.29 * len(names))
    began = 0.0
    for row, name in enumerate(names):
      bars = axes.barh(row, mean[name], left=began, height=0.66, color=colors[clocks[name]])
      style.tip(bars[0], f"{name}: {style.duration(mean[name])}, {clocks[name]}")
      is_late = began + mean[name] > 0.85 * total
      place = began if is_late else began + mean[name]
      style.bar_label(axes, place, row, style.duration(mean[name]), before=is_late)
      began += mean[name]
    axes.set_yticks(range(len(names)), names, color=INK)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, total * 1.01)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: style.duration(x) if x else "0"))
    axes.set_xticks(style.round_times(total, 8 if width == FULL else 4))
    style.only_vertical_grid(axes)
    used = [clock for clock in colors if clock in clocks.values()]
    axes.legend([Patch(color=colors[clock]) for clock in used], used, loc="lower left", bbox_to_anchor=(-0.01, 1.0),
                ncols=len(used) if width == FULL else 2, borderaxespad=0.2, handlelength=1.0)  # fmt: skip
    return drawing

  longest = max(mean, key=mean.get)
  inside = {clock: sum(mean[name] for name in names if clocks[name] == clock) for clock in (TRAINING, EVALUATION)}
  counted = " and ".join(f"{style.duration(seconds)} on the {clock}" for clock, seconds in inside.items() if seconds)
  average = " (means of the runs)" if len(done) > 1 else ""
  caption = f"{style.duration(total)} in all{average}, most of it to {longest}; {counted or 'none on a clock'}."
  rows = [(run, name, seconds, clock) for run, parts in done.items() for name, seconds, clock in parts]
  return Plot("times", caption, draw, Table(("run", "what", "seconds", "clock"), rows), True)


_WORDS = {
  "half": "other fp16",
  "steps": "steps of rows",
  "low_rank/a": "low rank, A",
  "low_rank/b": "low rank, B",
  "low_rank/steps": "low rank, steps",
  "steps/log": "steps",
  "small": "small tensors",
}
_FORMS = {"grid": (SERIES[0], "quantised"), "matrix": (SERIES[0], "quantised"), "half": (SERIES[3], "fp16")}


@figure("Bytes by tensor")
def sizes(runs: Runs) -> Plot:
  """Bytes of the artifact by kind of tensor, with bits per value."""
  shown = having(runs, "streams")
  run = shown[0]
  streams = sorted(run.streams, key=lambda stream: -stream.num_bytes)
  total = sum(stream.num_bytes for stream in streams)
  large = [stream for stream in streams if stream.num_bytes >= 0.004 * total]
  rest = total - sum(stream.num_bytes for stream in large)
  code = run.results.get("artifact", {}).get("code_bytes", 0)
  bars = []
  for stream in large:
    form, _, kind = stream.name.partition("/")
    color = _FORMS[form][0] if form in _FORMS else SOFT
    bits = 8 * stream.num_bytes / stream.values if stream.values else None
    name = kind.removesuffix(".weight") if form in _FORMS and kind else _WORDS.get(stream.name, stream.name)
    bars.append((name, stream.num_bytes, bits, color))
  bars += [("the rest", rest, None, SOFT)] if rest else []
  bars += [("code", code, None, SERIES[4])] if code else []

  def draw(width: float):
    drawing, (axes,) = canvas(width, 0.95 + 0.3 * len(bars))
    for row, (name, size, bits, color) in enumerate(bars):
      bar = axes.barh(row, size, height=0.66, color=color)
      style.tip(bar[0], f"{name}: {size:,} bytes" + (f", {bits:.2f} bits a value" if bits else ""))
      said = style.short(size, "B") + (f" · {bits:.1f} bits" if bits else "")
      style.bar_label(axes, size, row, said)
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, max(size for _, size, *_ in bars) * 1.42)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: style.short(x, "B") if x else "0"))
    style.only_vertical_grid(axes)
    forms = dict.fromkeys(form for form in _FORMS.values() if form[0] in {color for *_, color in bars})
    axes.legend([Patch(color=color) for color, _ in forms], [name for _, name in forms], loc="lower left",
                bbox_to_anchor=(-0.01, 1.0), ncols=2, borderaxespad=0.2, handlelength=1.0)  # fmt: skip
    return drawing

  budget = run.settings.quantize.budget_bytes
  whose = f" ({run.name})" if len(runs) > 1 else ""
  caption = f"{total:,} bytes of artifact{whose}" + (f" and {code:,} of code" if code else "")
  caption += f" take {100 * (total + code) / budget:.1f} % of the {budget:,} allowed; “bits” are per stored value."
  rows = [(stream.name, stream.num_bytes, stream.values) for stream in streams] + ([("code", code, 0)] if code else [])
  return Plot("bytes", caption, draw, Table(("stream", "bytes", "values"), rows))
