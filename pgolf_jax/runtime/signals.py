"""Signals that end a program: none is lost, and the exit status names it.

A program that can save postpones them to a moment of its choice; everywhere else they end it at once.
"""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_AGAIN = 1.0  # seconds


class Ended(KeyboardInterrupt):
  """A signal ended the program; `status` is its exit status."""

  def __init__(self, signum: int):
    super().__init__(signal.Signals(signum).name)
    self.status = 128 + signum


@contextlib.contextmanager
def ending_signals() -> Iterator[None]:
  """SIGTERM and SIGINT raise `Ended` in the block.

  Python drops what is raised while a finaliser runs, and libraries make other errors of what is raised in a callback.
  So it is raised again each second until the block has ended, and then whatever else the block raised.
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
    logging.getLogger("pgolf").info("%s: saving, then stopping; once more stops at once", signal.Signals(signum).name)

  def ask() -> int:
    told[:] = arrived[:1]
    return told[0] if told else 0

  handlers = {signum: signal.signal(signum, postpone) for signum in _SIGNALS}
  try:
    yield ask
  finally:
    for signum, handler in handlers.items():
      signal.signal(signum, handler)
  if arrived and not told:
    signal.raise_signal(arrived[0])
