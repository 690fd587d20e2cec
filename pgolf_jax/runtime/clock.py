"""The clock of training and of evaluation: seconds that a limit counts, and the programs compiled within them."""

import contextlib
import time
from collections.abc import Iterator

import jax

from pgolf_jax.runtime import distributed

_EVENT = "/jax/core/compile/backend_compile_duration"
_compilations = 0
_listening = False


def _count(event: str, duration: float, **_) -> None:
  global _compilations
  del duration
  if event == _EVENT:
    _compilations += 1


def compilations() -> int:
  """Programs compiled in this process since this was first called."""
  global _listening
  if not _listening:
    jax.monitoring.register_event_duration_secs_listener(_count)
    _listening = True
  return _compilations


class Clock:
  """Counts the seconds, and the compilations, between `start` and `stop`; it may start again.

  A compilation while the clock runs is a fault: everything that it covers is compiled before.

  Args:
    seconds, compilations: counted before, by a process that this one goes on from.
  """

  def __init__(self, seconds: float = 0.0, compilations: int = 0):
    self._before = seconds
    self._began: float | None = None
    self._compiled = compilations  # before the clock last started
    self._compiled_before = 0

  def start(self) -> None:
    """Starts a clock that stands still."""
    assert self._began is None, "the clock is running"
    self.agreed()  # with several processes its first call compiles a program
    self._compiled_before = compilations()
    self._began = time.perf_counter()

  def stop(self) -> None:
    """Stops the clock. With several processes all stop at the leader's count."""
    self._before, self._compiled, self._began = self.agreed(), self.compilations, None

  @contextlib.contextmanager
  def stopped(self) -> Iterator[None]:
    """Work that does not count."""
    self.stop()
    try:
      yield
    finally:
      self.start()

  @property
  def seconds(self) -> float:
    """Seconds counted so far, by this process."""
    return self._before + (0.0 if self._began is None else time.perf_counter() - self._began)

  @property
  def compilations(self) -> int:
    """Programs compiled so far while the clock ran."""
    return self._compiled + (0 if self._began is None else compilations() - self._compiled_before)

  def agreed(self) -> float:
    """Returns the seconds counted so far, the same on every process: what they decide by the clock comes from here."""
    return self.agreed_with(0)[0]

  def agreed_with(self, number: int) -> tuple[float, int]:
    """Returns the seconds counted so far and the largest number of all, the same on every process, in one exchange."""
    return distributed.leaders(self.seconds, number)
