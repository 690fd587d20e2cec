"""How figures look: their colours, which follow the page from light to dark, their sizes, and their SVG and PNG."""

import functools
import html
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from PIL import Image

INK, MUTED, GRID, PANEL = "#1d232b", "#5c6773", "#e2e5e9", "#ffffff"
SERIES = ("#1f5fbf", "#c4540a", "#0d7f66", "#8a3ab0", "#a8770c", "#b3264f", "#3d6b8e", "#6b6f1d")
"""Colours of runs and of parts, which the common kinds of colour blindness tell apart; at least 3:1 on the panel."""
SOFT = "#9aa5b1"

_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PANEL: "panel", SOFT: "soft"} | {
  color: f"c{number}" for number, color in enumerate(SERIES, 1)
}

_FONTS = ("Inter", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans")
FULL, HALF = 9.6, 4.5  # inches: the page's whole width, and a column or a phone


class Table(NamedTuple):
  """The numbers of a figure, for those who cannot see it and those who compute on."""

  head: tuple[str, ...]
  rows: list[tuple]


class Plot(NamedTuple):
  """A figure of the report.

  Attributes:
    name: of its PNG, without the ending.
    caption: one sentence that says what to see.
    draw: draws it at a width in inches; returns the figure.
    table: its numbers.
    is_full: whether it takes the page's whole width; it is then drawn for a phone too.
    title: as `figure` gives it.
  """

  name: str
  caption: str
  draw: Callable[[float], Figure]
  table: Table
  is_full: bool = False
  title: str = ""


def figure(title: str) -> Callable[[Callable[..., Plot]], Callable[..., Plot]]:
  """Gives a function that makes a plot its title, which the page names where the plot is left out."""

  def entitled(function: Callable[..., Plot]) -> Callable[..., Plot]:
    @functools.wraps(function)
    def make(runs: Sequence) -> Plot:
      return function(runs)._replace(title=title)

    make.title = title
    return make

  return entitled


def settings() -> dict:
  """Returns matplotlib's settings of all figures."""
  known = {font.name for font in font_manager.fontManager.ttflist}
  return {
    "font.family": [name for name in _FONTS if name in known],
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,  # names of runs may hold a dollar sign
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "pgolf",
  }


def canvas(width: float, height: float, rows: int = 1, **options) -> tuple[Figure, Sequence[Axes]]:
  """Returns a figure of this size in inches and its axes from top to bottom, which share the horizontal one."""
  figure = Figure(figsize=(width, height))
  grid = figure.subplots(rows, 1, squeeze=False, sharex=rows > 1, **options)
  return figure, list(grid[:, 0])


def only_horizontal_grid(axes: Axes) -> None:
  """Leaves the lines at the ticks of the vertical axis alone."""
  axes.grid(False, axis="x")


def only_vertical_grid(axes: Axes) -> None:
  """Leaves the lines at the ticks of the horizontal axis alone."""
  axes.grid(False, axis="y")
  axes.spines["left"].set_visible(False)


def short_ticks(axis) -> None:
  """Writes an axis's ticks as 2k or 1.5M."""
  axis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
  axis.set_minor_formatter(NullFormatter())


def legend_above(axes: Axes, columns: int = 4, **options) -> None:
  """Puts the legend in one strip above the axes, on the left."""
  axes.legend(
    loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, borderaxespad=0.2, handlelength=1.4,
    columnspacing=1.4, **options,
  )  # fmt: skip


def bar_label(axes: Axes, x: float, y: float, text: str, *, before: bool = False) -> None:
  """Writes beside the end of a horizontal bar, after it or before."""
  axes.annotate(text, (x, y), (-4 if before else 4, 0), textcoords="offset points", va="center", size=8.5,
                ha="right" if before else "left", color=MUTED)  # fmt: skip


def tip(artist, text: str) -> None:
  """Gives an artist a tooltip in the page."""
  artist.set_gid(f"tip:{text}")


def short(x: float, unit: str = "") -> str:
  """Returns a number in three digits or so, with k, M, G or T before its unit."""
  for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if abs(x) >= size:
      return f"{x / size:.3g}{' ' if unit else ''}{letter}{unit}"
  return f"{x:.3g} {unit}".strip()


def signed(x: float, digits: int = 4) -> str:
  """Returns a difference with its sign, the minus as long as the plus is wide."""
  return f"{x:+.{digits}f}".replace("-", "−")


def duration(seconds: float) -> str:
  """Returns a time in words, such as 2 min 8 s."""
  if seconds < 10:
    return f"{seconds:.1f} s"
  if seconds < 120:
    return f"{seconds:.0f} s"
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f"{minutes} min {rest} s" if rest else f"{minutes} min"
  return f"{minutes // 60} h {minutes % 60} min"


def round_times(total: float, most: int) -> np.ndarray:
  """Returns at most so many ticks at round times up to `total` seconds."""
  steps = [n * unit for unit in (1, 60, 3600) for n in (1, 2, 5, 10, 15, 30)] + [86400 * n for n in (1, 2, 5, 10, 50)]
  step = next((step for step in steps if total / step <= most), steps[-1])
  return np.arange(0, total, step)


def svg(plot: Plot, width: float) -> str:
  """Returns a figure as an SVG element for the page: text stays text, colours are the page's variables."""
  with matplotlib.rc_context(settings()):
    buffer = io.StringIO()
    plot.draw(width).savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
  name = f"{plot.name}-{'full' if width == FULL else 'half'}"
  return _for_page(buffer.getvalue(), name, plot)


def png(plot: Plot, path: Path, *, dpi: int = 150) -> None:
  """Writes a figure with its title as a PNG file on white, of 256 colours."""
  with matplotlib.rc_context(settings()):
    figure = plot.draw(FULL if plot.is_full else HALF * 1.35)
    figure.suptitle(plot.title, x=0.012, ha="left", size=12.5, weight="bold")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor=PANEL)
  Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


_NUMBER = re.compile(r"(\d\.\d\d)\d+")
_GEOMETRY = re.compile(r' (?:d|x|y|width|height|transform|points|x1|x2|y1|y2)="[^"]*"')


def _for_page(text: str, name: str, plot: Plot) -> str:
  body = text[text.index("<svg") :]
  body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
  body = re.sub(r"<!--.*?-->|<style[^>]*>.*?</style>", "", body, flags=re.DOTALL)
  body = body.replace("xlink:href", "href")
  box = re.search(r'viewBox="([^"]+)"', body)[1]
  body = body[body.index(">") + 1 :]
  body = _GEOMETRY.sub(lambda found: _NUMBER.sub(r"\1", found[0]), body)
  body = _with_tips(body)
  # Several figures stand in one page: each keeps its own identifiers.
  body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
  body = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', body)
  body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)
  body = re.sub(r"font: ([^;\"]*?px) [^;\"]*", r"font: \1 var(--sans)", body)
  body = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", body)
  for color, variable in _VARIABLES.items():
    body = body.replace(color, f"var(--{variable})")
  label = html.escape(f"{plot.title}. {plot.caption}")
  width = "full" if name.endswith("-full") else "half"
  return f'<svg class="plot {width}" viewBox="{box}" role="img" aria-label="{label}">{body}'


def _with_tips(body: str) -> str:
  """Turns the groups that `tip` named into groups with a title, which browsers show as a tooltip."""
  return re.sub(r'<g id="tip:([^"]*)">', lambda found: f'<g class="tip"><title>{found[1]}</title>', body)
