"""The verb `pgolf report`."""

from pathlib import Path
from typing import Literal

from pgolf_jax.settings.arguments import Positional


def report(
  runs: Positional[list[Path]],
  out: Path | None = None,
  format: Literal["html", "png", "all"] = "all",
) -> None:
  """Write a page with the figures of one run, or of several side by side: loss, scores, time, bytes, audit.

  The page is one HTML file that needs nothing else; beside it lie its figures as PNG and its numbers as JSON. A run
  that is not finished shows what it has. Needs matplotlib and Jinja2 (pip install 'pgolf_jax[report]').

  Example: pgolf report runs/seed42 runs/seed0 runs/seed314 --out report

  Args:
    runs: run folders, or folders of sets that `pgolf run --seeds` made; of several, the first is the baseline.
    out: folder for the report; RUN/report if not given, and beside the first of several runs.
    format: html for the page alone, png for the figures alone, all for both.
  """
  from pgolf_jax.report import write

  written = write(runs, out, html=format != "png", png=format != "html")
  for path in written:
    print(path)


COMMANDS = {"report": {"": report}}
