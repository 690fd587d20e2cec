"""One process writes to a folder at a time."""

import contextlib
import datetime
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from pgolf_jax.errors import UserError
from pgolf_jax.runtime import distributed

try:
  import fcntl
except ImportError:  # Windows has none; nothing is locked there
  fcntl = None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
  """Holds the folder's lock during the block; of several processes on one run the leader holds it for all.

  The operating system gives the lock back when a process ends in whatever way, so that a killed run leaves no lock
  behind. The file says who holds it, for the message that others get.

  Raises:
    UserError: another process holds the lock; the message names its host, its number and when it began.
  """
  if fcntl is None or not distributed.is_leader():
    yield
    return
  path = folder / ".lock"
  with path.open("a+", encoding="utf-8") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(f"{folder} is in use by {_holder(path)}; wait until it ends, or choose another folder.") from None
    file.truncate(0)
    now = datetime.datetime.now(datetime.UTC)
    json.dump({"host": socket.gethostname(), "pid": os.getpid(), "time": now.isoformat(timespec="seconds")}, file)
    file.flush()
    yield
    # The file stays, empty: to remove it would let a process that has it open hold a lock that others do not see.
    file.truncate(0)


def _holder(path: Path) -> str:
  try:
    holder = json.loads(path.read_text(encoding="utf-8"))
    return f"process {holder['pid']} on {holder['host']} since {holder['time']}"
  except (OSError, ValueError, KeyError, TypeError):
    return "another process"
