"""Items of a day that end badly, and one that ends well; the tests of `pgolf bench gpu-day` run them as processes."""

import os
import signal
import time


def measures(day, amount: float = 1.0):
  """Yields two rows; the second tells what the item was given."""
  yield {"config": "first", "ms": amount, "p10": amount, "p90": amount, "n": 3, "verdict": "ok"}
  yield {"config": "second", "note": f"tiny {day.tiny}, {len(day.rows)} rows before"}


def tells(day, names: list[str]):
  """Yields what these variables of the environment are while it measures."""
  yield {"config": "environment", "values": [os.environ.get(name) for name in names]}


def hangs(day):
  """Logs its number, yields a row and never ends, as a kernel that deadlocks; it does not heed a request to end."""
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  print(f"process {os.getpid()} hangs")
  yield {"config": "before it hangs", "ms": 1.0, "verdict": "ok"}
  time.sleep(600)


def crashes(day):
  """Yields a row and ends by a signal, as a process does whose driver faults."""
  yield {"config": "before it crashes", "ms": 1.0, "verdict": "ok"}
  os.kill(os.getpid(), signal.SIGSEGV)


def raises(day):
  """Ends with an error."""
  raise ValueError("no such luck")
  yield
