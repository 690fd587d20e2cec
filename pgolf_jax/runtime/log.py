"""What people are told while a program runs: log lines, and the progress of long work.

Progress is a live bar with rate and time left on a terminal, plain lines otherwise.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax

log = logging.getLogger("pgolf")


def log_to(path: Path) -> None:
  """Sends log lines to the terminal and, with times in UTC, to the file `path`; only the leader's lines are kept."""
  log.propagate = _silent
  log.setLevel(logging.INFO)
  if jax.process_index() != 0:
    log.handlers = [logging.NullHandler()]
    return
  to_terminal = logging.NullHandler() if _silent else logging.StreamHandler(sys.stdout)
  to_terminal.setFormatter(logging.Formatter("%(message)s"))
  log.handlers = [to_terminal]
  try:
    to_file = _LogFile(path, encoding="utf-8")
  except OSError as error:
    log.warning("%s cannot be written (%s); what is said goes to the terminal alone.", path, error.strerror)
    return
  formatter = logging.Formatter("%(asctime)sZ %(message)s", datefmt="%Y-%m-%dT%H:%M:%S")
  formatter.converter = time.gmtime
  to_file.setFormatter(formatter)
  log.handlers = [to_file, to_terminal]


class _LogFile(logging.FileHandler):
  """A log file; once a line cannot be written it writes no more, and says so once."""

  def handleError(self, record: logging.LogRecord) -> None:
    error = sys.exc_info()[1]
    if not isinstance(error, OSError):
      super().handleError(record)
      return
    log.handlers = [handler for handler in log.handlers if handler is not self]
    self.stream = None  # closing it would write again
    log.warning(
      "%s cannot be written (%s); what is said goes to the terminal alone.", self.baseFilename, error.strerror
    )


_APPEAR_AFTER = 2.0  # seconds; shorter work shows nothing
_LINE_EVERY = 10.0  # seconds between plain lines
_silent = False


def silence() -> None:
  """Shows no more progress in this process: of several processes on one run, one speaks."""
  global _silent
  _silent = True


@contextlib.contextmanager
def quietly() -> Iterator[None]:
  """Prints neither progress nor log lines in the block, as a library should; a run's file still gets the lines."""
  global _silent
  before = _silent, list(log.handlers), log.propagate, log.level
  _silent = True
  try:
    yield
  finally:
    for handler in set(log.handlers).difference(before[1]):
      handler.close()
    _silent, log.handlers, log.propagate = before[:3]
    log.setLevel(before[3])


class Progress:
  """Counts work done and shows it. Use through `progress`."""

  def __init__(self, description: str, total: float | None, unit: str):
    self._description, self._total, self._unit = description, total, unit
    self._done = 0.0
    self._note = ""
    self._began = self._shown = time.monotonic()
    self._bar = None
    self._live = sys.stderr.isatty()

  def advance(self, amount: float = 1) -> None:
    """Reports `amount` more units as done."""
    self._done += amount
    self._show()

  def note(self, text: str) -> None:
    """A short text shown beside the count, such as a running loss."""
    self._note = text

  def _show(self) -> None:
    now = time.monotonic()
    if _silent or now - self._began < _APPEAR_AFTER:
      return
    if self._live:
      self._draw()
    elif now - self._shown >= _LINE_EVERY:
      self._shown = now
      print(self._line(now), file=sys.stderr, flush=True)

  def _line(self, now: float) -> str:
    rate = self._done / max(now - self._began, 1e-9)
    of = f" of {_short(self._total)}" if self._total else ""
    left = f", {_clock((self._total - self._done) / rate)} left" if self._total and rate > 0 else ""
    note = f" | {self._note}" if self._note else ""
    return f"{self._description}: {_short(self._done)}{of} {self._unit}, {_short(rate)} {self._unit}/s{left}{note}"

  def _draw(self) -> None:
    from rich import progress as rich_progress

    if self._bar is None:
      columns = [
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.TextColumn("{task.fields[count]}"),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[note]}"),
      ]
      from rich.console import Console

      self._bar = rich_progress.Progress(*columns, console=Console(stderr=True), transient=True)
      self._bar.start()
      self._task = self._bar.add_task(self._description, total=self._total, count="", note="")
    rate = self._done / max(time.monotonic() - self._began, 1e-9)
    of = f"/{_short(self._total)}" if self._total else ""
    count = f"{_short(self._done)}{of} {self._unit} {_short(rate)}/s"
    self._bar.update(self._task, completed=self._done, count=count, note=self._note)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.stop()


@contextlib.contextmanager
def progress(description: str, total: float | None = None, unit: str = "") -> Iterator[Progress]:
  """A Progress for the work in the block.

  Args:
    description: what is being done, as in "preparing".
    total: units of work in all, if known.
    unit: what is counted, as in "B" or "tokens".
  """
  shown = Progress(description, total, unit)
  try:
    yield shown
  finally:
    shown.close()


def _short(x: float) -> str:
  for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if x >= 10 * size:
      return f"{x / size:.0f}{letter}"
    if x >= size:
      return f"{x / size:.1f}{letter}"
  return f"{x:.0f}" if x >= 10 or x == int(x) else f"{x:.1f}"


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
