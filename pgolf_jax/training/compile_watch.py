"""Counts compilations, so that one inside the clock is reported as the fault it is."""

import jax

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
