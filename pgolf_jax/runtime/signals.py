"""Signals that end a program: none is lost, and the exit status names it.

A program that can save postpones them to a moment of its choice; everywhere else they end it at once.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from pgolf_jax.runtime.log import current_work, log

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_AGAIN = 1.0  # seconds
_SILENT_FOR = 2.0  # seconds that a stop may take before it is said what it waits for
_saving = 0  # blocks that save before they stop


class Ended(KeyboardInterrupt):
  """A signal ended the program; `status` is its exit status."""

  def __init__(self, signum: int):
    super().__init__(signal.Signals(signum).name)
    self.status = 128 + signum


@contextlib.contextmanager
def ending_signals() -> Iterator[None]:
  """SIGTERM and SIGINT raise `Ended` in the block.

  Python drops what is raised while a finaliser runs, and libraries make other errors of what is raised in a callback.
  So it is raised again each second until the block has ended, and then whatever else the block raised. Work outside of
  Python, such as a compilation, goes on meanwhile; a thread says so, and a further signal then ends the process.
  """
  if threading.current_thread() is not threading.main_thread():
    yield  # only the main thread may handle signals
    return
  process, arrived = os.getpid(), []

  def end(signum: int, frame) -> None:
    if os.getpid() != process:  # a process that was forked from this one ends as any other does
      signal.signal(signum, signal.SIG_DFL)
      os.kill(os.getpid(), signum)
      return
    if signum != signal.SIGALRM:
      arrived.append(signum)
    signal.setitimer(signal.ITIMER_REAL, _AGAIN)
    raise Ended(arrived[0])

  handlers = {signum: signal.signal(signum, end) for signum in (*_SIGNALS, signal.SIGALRM)}
  try:
    with _watched():
      yield
  except Ended:
    raise
  except BaseException as error:
    if arrived:
      raise Ended(arrived[0]) from error
    raise
  else:
    if arrived:
      raise Ended(arrived[0])
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    for signum, handler in handlers.items():
      signal.signal(signum, handler)


@contextlib.contextmanager
def _watched() -> Iterator[None]:
  """A thread that sees signals while the main thread is outside of Python and cannot."""
  arriving, arrived = os.pipe()
  os.set_blocking(arrived, False)
  before = signal.set_wakeup_fd(arrived, warn_on_full_buffer=False)
  ended = threading.Event()
  threading.Thread(target=_watch, args=(arriving, ended), daemon=True, name="signals").start()
  try:
    yield
  finally:
    ended.set()
    signal.set_wakeup_fd(before)
    os.close(arrived)


def _watch(arriving: int, ended: threading.Event) -> None:
  first: float | None = None
  while numbers := os.read(arriving, 1):
    signum = numbers[0]
    if signum not in _SIGNALS:
      continue
    now = time.monotonic()
    if first is None:
      first = now
      threading.Thread(target=_explain, args=(signum, ended), daemon=True, name="stop").start()
    elif now - first > _AGAIN / 2 and not ended.wait(_AGAIN):  # processes that share a terminal all get one at once
      _say("stopped at once; the same command goes on from what was saved last, if anything was.")
      os._exit(128 + signum)
  os.close(arriving)


def _explain(signum: int, ended: threading.Event) -> None:
  """Says what a stop waits for, unless it is done soon."""
  if ended.wait(_SILENT_FOR):
    return
  work = current_work()
  waits = f"waits for what cannot be interrupted{f' ({work})' if work else ''}"
  then = "then saves and stops" if _saving else "then stops"
  _say(f"{signal.Signals(signum).name}: {waits}, {then}; once more ends it at once.")


def _say(text: str) -> None:
  with contextlib.suppress(OSError, ValueError):
    print(f"pgolf: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def postponed_signals() -> Iterator[Callable[[], int]]:
  """Postpones SIGTERM and SIGINT to moments when the block asks for them; the second one interrupts at once.

  Gives a function that returns the number of the signal that this process has had, or 0. Processes agree on it by
  `distributed.leaders`, so that all save and stop at the same step. A signal that the block did not ask for any more
  goes to who handles it outside.
  """
  if threading.current_thread() is not threading.main_thread():
    yield lambda: 0  # only the main thread may handle signals
    return
  arrived: list[int] = []
  told: list[int] = []

  def postpone(signum: int, frame) -> None:
    if arrived:
      raise Ended(signum)
    arrived.append(signum)
    log.info("%s: saving, then stopping; once more stops at once", signal.Signals(signum).name)

  def ask() -> int:
    told[:] = arrived[:1]
    return told[0] if told else 0

  global _saving
  handlers = {signum: signal.signal(signum, postpone) for signum in _SIGNALS}
  _saving += 1
  try:
    yield ask
  finally:
    _saving -= 1
    for signum, handler in handlers.items():
      signal.signal(signum, handler)
  if arrived and not told:
    signal.raise_signal(arrived[0])
