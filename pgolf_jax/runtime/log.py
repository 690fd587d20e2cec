"""What people are told while a program runs: log lines, and the progress of long work.

On a terminal, progress is live bars below whatever else is printed, gone when their work is done; else plain lines.
Nothing here loads JAX, so that the first sign of life comes before it is loaded.
"""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pgolf_jax import tables

log = logging.getLogger("pgolf")
_silent = False  # shows nothing on the terminal
_follows = False  # of several processes on one run, one speaks


def silence() -> None:
  """Shows no more progress and keeps no more log lines in this process: it is not the leader of its run."""
  global _silent, _follows
  _silent = _follows = True


@contextlib.contextmanager
def to_stderr() -> Iterator[None]:
  """Sends log lines to standard error in the block, until `log_to` says otherwise."""
  before = list(log.handlers), log.propagate, log.level
  log.handlers, log.propagate = [_Terminal("stderr")], False
  log.setLevel(logging.INFO)
  try:
    yield
  finally:
    log.handlers, log.propagate = before[:2]
    log.setLevel(before[2])


@contextlib.contextmanager
def quietly() -> Iterator[None]:
  """Prints neither progress nor log lines in the block, as a library should; a run's file still gets the lines.

  Whoever listens to the logger gets what it would get: its handlers and the root's, at the level that was set.
  """
  global _silent
  before = _silent, list(log.handlers), log.propagate, log.level
  log.handlers, log.propagate = [_Listeners()], False
  _silent = True
  try:
    yield
  finally:
    for handler in set(log.handlers).difference(before[1]):
      handler.close()
    _silent, log.handlers, log.propagate = before[:3]
    log.setLevel(before[3])


def log_to(path: Path) -> None:
  """Sends log lines to the terminal and, with times in UTC, to the file `path`; only the leader's lines are kept."""
  log.setLevel(logging.INFO)
  if _follows:
    log.handlers, log.propagate = [logging.NullHandler()], False
    return
  others = [handler for handler in log.handlers if isinstance(handler, _Listeners)] or [_Terminal("stdout")]
  log.handlers, log.propagate = others, False
  try:
    to_file = _LogFile(path, encoding="utf-8")
  except OSError as error:
    log.warning("%s cannot be written (%s); log lines go to the terminal only.", path, error.strerror)
    return
  formatter = _WideFormatter("%(asctime)sZ %(message)s", datefmt="%Y-%m-%dT%H:%M:%S")
  formatter.converter = time.gmtime
  to_file.setFormatter(formatter)
  log.handlers = [to_file, *others]


class _Listeners(logging.Handler):
  """Passes log lines on to those who listened to the logger before, at the level that held before."""

  def __init__(self):
    super().__init__(log.getEffectiveLevel())
    self._handlers, self._propagates = list(log.handlers), log.propagate

  def emit(self, record: logging.LogRecord) -> None:
    for handler in self._handlers:
      if record.levelno >= handler.level:
        handler.handle(record)
    if self._propagates:
      log.root.handle(record)


class _Terminal(logging.Handler):
  """Log lines on a stream of this process, above the bars; once its reader has gone they go nowhere, and work goes on.

  Args:
    stream: stdout or stderr, looked up at each line, for the bars put themselves in its place.
  """

  def __init__(self, stream: str):
    super().__init__()
    self._stream = stream

  def emit(self, record: logging.LogRecord) -> None:
    try:
      print(self.format(record), file=getattr(sys, self._stream), flush=True)
    except (OSError, ValueError):  # a closed pipe, a terminal that is gone
      log.removeHandler(self)


class _WideFormatter(logging.Formatter):
  """Tables keep their whole width in a file."""

  def format(self, record: logging.LogRecord) -> str:
    with tables.unfolded():
      return super().format(record)


class _LogFile(logging.FileHandler):
  """A log file; once a line cannot be written it writes no more, and says so once."""

  def handleError(self, record: logging.LogRecord) -> None:
    error = sys.exc_info()[1]
    if not isinstance(error, OSError):
      super().handleError(record)
      return
    log.handlers = [handler for handler in log.handlers if handler is not self]
    self.stream = None  # closing it would write again
    log.warning("%s cannot be written (%s); log lines go to the terminal only.", self.baseFilename, error.strerror)


_APPEAR_AFTER = 0.5  # seconds; shorter work shows nothing
_LINE_EVERY = 10.0  # seconds between plain lines
_REDRAW_EVERY = 0.25  # seconds between two drawings of the bars


class _Bars:
  """The bars on the terminal: one display for all, since two would draw over each other.

  Whatever draws holds the lock from the moment at which it works out how many lines the bars take until they are drawn:
  a log line that comes between the two would be drawn over.
  """

  def __init__(self):
    self._display, self._lock = None, threading.RLock()

  def add(self, description: str, total: float | None, began: float) -> int:
    with self._lock:
      if self._display is None:
        self._display = _display(self._lock)
        self._display.start()
        threading.Thread(target=self._redraw, args=(self._display,), daemon=True, name="bars").start()
      return self._display.add_task(description, total=total, count="", note="", began=began)

  def _redraw(self, display) -> None:
    while True:
      time.sleep(_REDRAW_EVERY)
      with self._lock:
        if self._display is not display:
          return
        display.refresh()

  def update(self, task: int, **fields) -> None:
    with self._lock:
      if self._display is not None:
        self._display.update(task, **fields)

  def remove(self, task: int) -> None:
    with self._lock:
      if self._display is None:
        return
      self._display.remove_task(task)
      if not self._display.tasks:
        self._display.stop()
        self._display = None


def _display(lock: threading.RLock):
  from rich import progress as bars
  from rich.console import Console
  from rich.table import Column

  class OneAtATime(Console):
    def __enter__(self):
      lock.acquire()
      return super().__enter__()

    def __exit__(self, *error) -> None:
      try:
        super().__exit__(*error)
      finally:
        lock.release()

  class Elapsed(bars.ProgressColumn):
    def render(self, task) -> str:
      return _clock(time.monotonic() - task.fields["began"])

  narrow = {"no_wrap": True, "overflow": "ellipsis"}
  return bars.Progress(
    bars.TextColumn("{task.description}", markup=False, table_column=Column(ratio=None, **narrow)),
    bars.BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4, max_width=40)),
    bars.TextColumn("{task.fields[count]}", markup=False, table_column=Column(**narrow)),
    Elapsed(),
    bars.TimeRemainingColumn(elapsed_when_finished=False),
    bars.TextColumn("{task.fields[note]}", markup=False, table_column=Column(**narrow)),
    console=OneAtATime(stderr=True),
    auto_refresh=False,
    transient=True,
    expand=True,
    # What is printed meanwhile goes above the bars, but not what goes into a file or a pipe.
    redirect_stdout=sys.stdout.isatty(),
    redirect_stderr=True,
  )


_bars = _Bars()


class Progress:
  """Counts work done and shows it. Use through `progress`."""

  def __init__(self, description: str, total: float | None, unit: str):
    self.description, self._total, self._unit = description, total, unit
    self._done = 0.0
    self._note = ""
    self._began = self._shown = time.monotonic()
    self._task: int | None = None
    self._timer: threading.Timer | None = None
    self._lock = threading.Lock()
    self._is_closed = False
    if not _silent and _is_live():
      self._timer = threading.Timer(_APPEAR_AFTER, self._appear)
      self._timer.daemon = True
      self._timer.start()

  def advance(self, amount: float = 1) -> None:
    """Reports `amount` more units as done."""
    self._done += amount
    self._show()

  def note(self, text: str) -> None:
    """A short text shown beside the count, such as a running loss."""
    self._note = text

  def _appear(self) -> None:
    with self._lock:
      if not self._is_closed:
        self._task = _bars.add(self.description, self._total, self._began)
    self._show()

  def _show(self) -> None:
    now = time.monotonic()
    if self._task is not None:
      _bars.update(self._task, completed=self._done, count=self._count(now), note=self._note)
    elif not _silent and self._timer is None and now - max(self._shown, self._began) >= _LINE_EVERY:
      self._shown = now
      with contextlib.suppress(OSError, ValueError):  # nobody reads any more
        print(self._line(now), file=sys.stderr, flush=True)

  def _count(self, now: float) -> str:
    if not self._unit:
      return ""
    rate = self._done / max(now - self._began, 1e-9)
    of = f"/{_short(self._total)}" if self._total else ""
    return f"{_short(self._done)}{of} {self._unit}" + (f" {_short(rate)}/s" if rate >= 1 else "")

  def _line(self, now: float) -> str:
    rate = self._done / max(now - self._began, 1e-9)
    of = f" of {_short(self._total)}" if self._total else ""
    left = f", {_clock((self._total - self._done) / rate)} left" if self._total and rate > 0 else ""
    note = f" | {self._note}" if self._note else ""
    return f"{self.description}: {_short(self._done)}{of} {self._unit}, {_short(rate)} {self._unit}/s{left}{note}"

  def close(self) -> None:
    with self._lock:
      self._is_closed = True
      if self._timer is not None:
        self._timer.cancel()
      if self._task is not None:
        _bars.remove(self._task)
        self._task = None


_at_work: list[Progress] = []


def current_work() -> str:
  """Returns what is being done now, as the innermost `progress` describes it; empty if nothing is."""
  return _at_work[-1].description if _at_work else ""


@contextlib.contextmanager
def progress(description: str, total: float | None = None, unit: str = "") -> Iterator[Progress]:
  """A Progress for the work in the block.

  Args:
    description: what is being done, as in "preparing".
    total: units of work in all, if known.
    unit: what is counted, as in "B" or "tokens"; empty where only the time is shown.
  """
  started()
  shown = Progress(description, total, unit)
  _at_work.append(shown)
  try:
    yield shown
  finally:
    _at_work.remove(shown)
    shown.close()


class _Start:
  """A line on the terminal that says that the program is loading, until something else is written."""

  def __init__(self):
    self._streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    for name, stream in self._streams.items():
      _all_waking.append(_Waking(stream))
      setattr(sys, name, _all_waking[-1])
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._draw, daemon=True, name="starting")
    self._thread.start()

  def _draw(self) -> None:
    began, terminal = time.monotonic(), self._streams["stderr"]
    if self._ended.wait(_APPEAR_AFTER):
      return
    with contextlib.suppress(OSError, ValueError):
      while not self._ended.wait(0.2):
        terminal.write(f"\rstarting {_clock(time.monotonic() - began)}")
        terminal.flush()
      terminal.write("\r\033[K")
      terminal.flush()

  def end(self) -> None:
    self._ended.set()
    self._thread.join()
    for name, stream in self._streams.items():
      if isinstance(getattr(sys, name), _Waking):
        setattr(sys, name, stream)


class _Waking:
  """A stream whose first line ends the start."""

  def __init__(self, stream):
    self._stream = stream

  def write(self, text: str) -> int:
    started()
    return self._stream.write(text)

  def __getattr__(self, name: str):
    return getattr(self._stream, name)


_start: _Start | None = None
_all_waking: list[_Waking] = []
"""Kept alive: `print` of CPython 3.12 ends its line on the stream that it began with, without holding on to it."""


def starting() -> None:
  """Shows that the program is loading, until something is written or `started` is called."""
  global _start
  if _start is None and not _silent and _is_live():
    _start = _Start()


def started() -> None:
  """Ends what `starting` began."""
  global _start
  begun, _start = _start, None
  if begun is not None:
    begun.end()


def _is_live() -> bool:
  """Whether there is a terminal that can move its cursor."""
  return sys.stderr.isatty() and os.environ.get("TERM") not in (None, "", "dumb", "unknown")


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
