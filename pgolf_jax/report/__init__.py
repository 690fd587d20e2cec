"""A report of one run or of several: one HTML page that needs nothing else, PNGs of its figures, and its numbers.

The drawing needs the extra `report` (matplotlib and Jinja2); nothing here imports them until a report is written.
"""

import contextlib
import importlib
import importlib.util
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from pgolf_jax.errors import UserError
from pgolf_jax.run_folder import RunFolder
from pgolf_jax.runtime import jax_setup
from pgolf_jax.runtime.files import read_json
from pgolf_jax.runtime.log import log

FOLDER = "report"
"""Where a run's own report lies in its folder."""

PAGE = "index.html"
"""The page, in the report's folder."""

_PACKAGES = ("matplotlib", "jinja2")


def is_available() -> bool:
  """Whether the packages that reports need are installed."""
  return all(importlib.util.find_spec(name) is not None for name in _PACKAGES)


def write(runs: Sequence[Path], out: Path | None = None, *, html: bool = True, png: bool = True) -> list[Path]:
  """Writes the report of one run folder or of several.

  Args:
    runs: run folders, or folders of sets, which stand for the runs in them; the first run's config is the baseline.
    out: folder for the report; if not given, `report` in the folder that is named, or beside the first of several.
    html: write the page.
    png: write the figures as PNG files.

  Returns:
    The files written, the page first.

  Raises:
    UserError: a folder is not a run, a run is named twice, or the extra is not installed.
  """
  if not runs:
    raise UserError("Name the folder of a run, such as runs/demo.")
  if not is_available():
    raise UserError("Reports need matplotlib and Jinja2; `pip install 'pgolf_jax[report]'` installs them.")
  if out is None:
    first = runs[0].resolve()
    out = (first if len(runs) == 1 else first.parent) / FOLDER
  paths = [path for given in runs for path in _members(given)]
  places = [path.resolve() for path in paths]
  if twice := [path for path, place in zip(paths, places, strict=True) if places.count(place) > 1]:
    raise UserError(f"{twice[0]} is named twice; name each run once.")
  folders = {name: RunFolder(path) for name, path in zip(_names(places), paths, strict=True)}
  if out.exists() and not out.is_dir():
    raise UserError(f"{out} is a file where the report's folder belongs; name another with --out.")
  os.environ.setdefault("MPLCONFIGDIR", str(jax_setup.cache_folder() / "matplotlib"))
  page = importlib.import_module("pgolf_jax.report.page")
  with _quiet_matplotlib():
    return page.write(folders, out, html=html, png=png)


def after_run(run: RunFolder) -> Path | None:
  """Writes a run's report into its folder, if the extra is installed and the report there is older than the results.

  A failure only logs, for the run is complete.
  """
  if not is_available():
    return None
  page, results = run.path / FOLDER / PAGE, run.path / "results.json"
  if page.is_file() and results.is_file() and page.stat().st_mtime >= results.stat().st_mtime:
    return page
  try:
    page = write([run.path])[0]
  except Exception as error:
    log.warning("the report could not be written (%s: %s); `pgolf report %s` tries again.",
                type(error).__name__, error, run.path)  # fmt: skip
    return None
  log.info("report: %s", page)
  return page


def _members(folder: Path) -> list[Path]:
  """Returns the run folders of a set, or the folder of one run."""
  if (folder / "config.toml").exists() or not folder.is_dir():
    return [folder]
  return set_members(folder) or [folder]


def set_members(folder: Path, given: Sequence[str] = ()) -> list[Path]:
  """Returns the run folders of a set: those given first, then in the order of its set.json, all others by name."""
  order = list(given)
  with contextlib.suppress(UserError, KeyError, TypeError):
    order += [row["run"] for row in read_json(folder / "set.json")["runs"]]
  place = {name: number for number, name in reversed(list(enumerate(order)))}
  by_name = sorted(path for path in folder.iterdir() if (path / "config.toml").is_file())
  return sorted(by_name, key=lambda path: place.get(path.name, len(order)))


def _names(places: Sequence[Path]) -> list[str]:
  """Returns a name for each folder: its own, with as many of those above it as tell all of them apart."""
  for depth in range(1, max(len(place.parts) for place in places)):
    names = ["/".join(place.parts[-depth:]) for place in places]
    if len(set(names)) == len(names):
      return names
  return [str(place) for place in places]


@contextlib.contextmanager
def _quiet_matplotlib():
  """Keeps matplotlib's remarks on fonts and its cache out of the program's output."""
  logger = logging.getLogger("matplotlib")
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(level)
