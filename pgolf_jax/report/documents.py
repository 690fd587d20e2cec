"""The figures of documents: scores by length and by position, what test-time training brings, and hints.

Each function takes the runs and returns a `Plot`, or raises `Absent` with the reason. Runs that scored the same
documents are shown by their mean; others are left to a report of their own.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from pgolf_jax.report import style
from pgolf_jax.report.gather import Absent, Documents, RunData
from pgolf_jax.report.style import FULL, INK, MUTED, SERIES, SOFT, Plot, Table, canvas, figure

Runs = Sequence[RunData]

_FEW = 60  # documents that are drawn one by one


def mean_documents(runs: Runs) -> Documents:
  """Returns the documents with the mean nats over runs, in the order in which the first run scored them.

  Raises:
    Absent: no run has scores by document, or the runs scored other documents.
  """
  found = [run.documents for run in runs if run.documents is not None] or [runs[0].need("documents")]
  aligned = [in_order_of(documents, found[0].index) for documents in found]
  if any(a is None or not np.array_equal(a.text_bytes, found[0].text_bytes) for a in aligned):
    raise Absent("the runs scored different documents, so that their scores by document cannot be set side by side.")
  means = {}
  for name in ("nats", "nats_untilted", "hints", "nats_plain", "hits"):
    columns = [getattr(documents, name) for documents in aligned]
    means[name] = None if any(column is None for column in columns) else np.mean(columns, axis=0)
  return found[0]._replace(**means)


def in_order_of(documents: Documents, index: np.ndarray) -> Documents | None:
  """Returns the documents in this order; None if they are others."""
  if not np.array_equal(np.sort(documents.index), np.sort(index)):
    return None
  order = np.argsort(documents.index)[np.argsort(np.argsort(index))]
  return Documents(*(None if column is None else column[order] for column in documents))


@figure("By length of the document")
def length(runs: Runs) -> Plot:
  """Bits per byte of each document by its length, or of many documents by bins of length."""
  documents = mean_documents(runs)
  size = documents.text_bytes
  if len(size) < 2:
    raise Absent("one document alone shows nothing by length.")
  bpb, plain = documents.bpb(documents.nats), documents.nats_plain
  before = None if plain is None else documents.bpb(plain)
  is_few = len(size) <= 5 * _FEW
  edges = np.unique(np.quantile(size, np.linspace(0, 1, 21)))
  bins = np.clip(np.searchsorted(edges, size, side="right") - 1, 0, max(len(edges) - 2, 0))
  used = np.unique(bins)

  def of_bins(nats):
    return [documents.bpb(nats)[bins == b] for b in used]

  def draw(width: float):
    drawing, (axes,) = canvas(width, 3.6)
    if is_few:
      if before is not None:
        axes.vlines(size, bpb, before, color=SOFT, lw=1.2)
        axes.plot(size, before, "s", color=SERIES[1], ms=5.5, label="artifact")
      axes.plot(size, bpb, "o", color=SERIES[2], ms=6.5, label="with test-time training")
      for name, x, y in zip(documents.index, size, bpb, strict=True):
        (point,) = axes.plot(x, y, "o", ms=13, alpha=0.0, color=SERIES[2])
        style.tip(point, f"document {name}: {y:.4f} bits per byte, {x:,} bytes")
    else:
      x = [np.median(size[bins == b]) for b in used]
      low, middle, high = np.array([np.quantile(part, (0.1, 0.5, 0.9)) for part in of_bins(documents.nats)]).T
      axes.fill_between(x, low, high, color=SERIES[2], alpha=0.15, lw=0, label="10 to 90 %")
      axes.plot(x, middle, "-o", color=SERIES[2], ms=4, label="median, test-time training")
      if plain is not None:
        axes.plot(
          x, [np.median(part) for part in of_bins(plain)], "-s", color=SERIES[1], ms=3.5, label="median, artifact"
        )
    if size.max() > 8 * max(size.min(), 1):
      axes.set_xscale("log")
    style.short_ticks(axes.xaxis)
    axes.set_xlabel("bytes of the document")
    axes.set_ylabel("bits per byte")
    axes.margins(0.08)
    style.only_horizontal_grid(axes)
    if before is not None or not is_few:
      style.legend_above(axes, columns=2)
    return drawing

  hardest, easiest = int(bpb.argmax()), int(bpb.argmin())
  caption = (
    f"{len(size):,} documents from {size.min():,} to {size.max():,} bytes score between {bpb[easiest]:.3f} and "
    f"{bpb[hardest]:.3f} bits per byte; document {documents.index[hardest]} is the hardest."
  )
  rows = [(int(i), int(b), float(y), None if before is None else float(before[k]))
          for k, (i, b, y) in enumerate(zip(documents.index, size, bpb, strict=True))][:1000]  # fmt: skip
  head = ("document", "bytes", "bits per byte", "artifact alone")
  return Plot("length", caption, draw, Table(head, rows))


@figure("By position in the document")
def position(runs: Runs) -> Plot:
  """Bits per byte by the place in the document."""
  found = [run for run in runs if run.position is not None] or [runs[0].need("position")]
  first = found[0].position
  same = [run.position for run in found if np.array_equal(run.position.text_bytes, first.text_bytes)]
  bits = np.log(2) * first.text_bytes
  curves = {}
  for name, label in (("nats_plain", "artifact"), ("nats_untilted", "learning"), ("nats", "learning and hints")):
    columns = [getattr(part, name) for part in same]
    if all(column is not None for column in columns):
      curves[label] = np.mean(columns, axis=0) / bits
  middle = np.sqrt(np.maximum(first.first, 8) * first.end)

  def draw(width: float):
    drawing, (axes,) = canvas(width, 3.6)
    for (label, y), color, marker in zip(
      curves.items(), (SERIES[1], SERIES[0], SERIES[2])[-len(curves) :], "sDo"[-len(curves) :], strict=True
    ):
      axes.plot(middle, y, f"-{marker}", color=color, ms=4.5, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"))
    axes.set_xlabel("tokens into the document")
    axes.set_ylabel("bits per byte")
    style.only_horizontal_grid(axes)
    style.legend_above(axes, columns=3)
    return drawing

  y = curves["learning and hints"]
  caption = f"The first {first.end[0]:,} tokens of a document cost {y[0]:.3f} bits per byte"
  caption += f", those from {first.first[-1]:,} on {y[-1]:.3f}." if len(y) > 1 else "."
  if "artifact" in curves and len(y) > 1:
    gap = curves["artifact"] - y
    caption += (
      f" The gain over the artifact alone goes from {style.signed(gap[0], 3)} there to {style.signed(gap[-1], 3)}."
    )
  rows = [
    (int(a), int(b), *(float(c[k]) for c in curves.values()))
    for k, (a, b) in enumerate(zip(first.first, first.end, strict=True))
  ]
  return Plot("position", caption, draw, Table(("from token", "to", *curves), rows))


@figure("What test-time training brings")
def gain(runs: Runs) -> Plot:
  """What learning and hints bring to each document over the artifact alone, the most first."""
  documents = mean_documents(runs)
  if documents.nats_plain is None:
    raise Absent("the nats of the artifact alone are not kept by target (artifact_nll.npy): the run was made by an "
                 "earlier version, or its artifact has been replaced.")  # fmt: skip
  learning = documents.bpb(documents.nats_plain - documents.nats_untilted)
  hints = documents.bpb(documents.nats_untilted - documents.nats)
  order = np.argsort(-(learning + hints))
  learning, hints, names = learning[order], hints[order], documents.index[order]
  whole = learning + hints
  count = len(whole)

  def draw(width: float):
    drawing, (axes,) = canvas(width, 3.4)
    x = np.arange(count)
    if count <= _FEW:
      bottoms = np.where(np.sign(learning) == np.sign(hints), learning, 0.0)
      for k in x:
        bars = (
          *axes.bar(k, learning[k], 0.72, color=SERIES[0]),
          *axes.bar(k, hints[k], 0.72, bottom=bottoms[k], color=SERIES[1]),
        )
        for bar in bars:
          style.tip(
            bar,
            f"document {names[k]}: learning {style.signed(learning[k])}, hints {style.signed(hints[k])} bits per byte",
          )
      if count <= 30:
        axes.set_xticks(x, [str(name) for name in names], fontsize=8.5 if width == FULL else 7.5)
      else:
        axes.set_xticks([])
      axes.set_xlabel("document")
    else:
      pick = np.unique(np.linspace(0, count - 1, 400).astype(int))
      axes.fill_between(pick / count, 0, whole[pick], color=SERIES[0], alpha=0.25, lw=0)
      axes.plot(pick / count, whole[pick], color=SERIES[0])
      axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
      axes.set_xlabel("share of the documents")
    axes.axhline(0, color=MUTED, lw=1)
    axes.set_ylabel("bits per byte saved")
    style.only_horizontal_grid(axes)
    if count <= _FEW:
      axes.legend(axes.patches[:2], ["learning", "hints"], loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2,
                  borderaxespad=0.2, handlelength=1.0)  # fmt: skip
    return drawing

  better = int((whole > 0).sum())
  bits = np.log(2) * documents.text_bytes.sum()
  mean = (documents.nats_plain.sum() - documents.nats.sum()) / bits
  least, most = style.signed(whole.min(), 3), style.signed(whole.max(), 3)
  caption = (
    f"Test-time training makes {better:,} of {count:,} documents cheaper, from {least} to {most} bits per byte; "
    f"{style.signed(mean)} over all bytes."
  )
  rows = [(int(n), float(a), float(b)) for n, a, b in zip(names, learning, hints, strict=True)][:1000]
  return Plot("gain", caption, draw, Table(("document", "learning", "hints"), rows), True)


@figure("Hints and their hits")
def hints(runs: Runs) -> Plot:
  """How many targets had a hint and how often it was right, in the order of scoring."""
  documents = mean_documents(runs)
  if not any(run.settings.hints.enabled for run in runs):
    raise Absent("hints are off (hints.enabled = false).")
  if documents.hits is None:
    raise Absent("documents.jsonl does not tell right hints from wrong ones; score the run again.")
  given, right = documents.hints.sum(), documents.hits.sum()
  if not given:
    raise Absent("no context was seen often enough to give a hint.")
  pieces = np.array_split(np.arange(len(documents.index)), min(len(documents.index), 40))
  targets, some, hits = (np.array([column[p].sum() for p in pieces]) for column in
                         (documents.targets, documents.hints, documents.hits))  # fmt: skip
  is_each = len(pieces) == len(documents.index)

  def draw(width: float):
    drawing, (axes,) = canvas(width, 3.1)
    x = np.arange(1, len(pieces) + 1)
    right_bars = axes.bar(x, hits / targets, 0.72, color=SERIES[2], label="right")
    wrong_bars = axes.bar(x, (some - hits) / targets, 0.72, bottom=hits / targets, color=SERIES[1], label="wrong")
    for bars in (right_bars, wrong_bars):
      for bar, n, h, t in zip(bars, some, hits, targets, strict=True):
        style.tip(bar, f"{n:,.0f} hints for {t:,} targets, {h:,.0f} right")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.2g} %"))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("documents in the order of scoring" + ("" if is_each else ", in 40 parts"))
    axes.set_ylabel("targets with a hint")
    axes.tick_params(axis="x", labelcolor=INK)
    style.only_horizontal_grid(axes)
    style.legend_above(axes, columns=2)
    return drawing

  saved = documents.nats_untilted.sum() - documents.nats.sum()
  bits = saved / np.log(2) / documents.text_bytes.sum()
  caption = (
    f"{given:,.0f} of {documents.targets.sum():,} targets got a hint and {100 * right / given:.1f} % of the hints were "
    f"right, which saves {saved:,.0f} nats ({bits:.5f} bits per byte)."
  )
  names = documents.index if is_each else range(1, len(pieces) + 1)
  rows = [(int(k), int(t), float(n), float(h)) for k, t, n, h in zip(names, targets, some, hits, strict=True)]
  head = ("document" if is_each else "part", "targets", "hints", "right")
  return Plot("hints", caption, draw, Table(head, rows), True)
