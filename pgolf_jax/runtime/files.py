"""Writing whole files, and one process at a time in a folder."""

import contextlib
import datetime
import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from pgolf_jax.errors import UserError
from pgolf_jax.runtime import distributed

try:
  import fcntl
except ImportError:  # Windows has none; nothing is locked there
  fcntl = None


@contextlib.contextmanager
def replacing(path: Path, *, is_durable: bool = False) -> Iterator[Path]:
  """Gives a path to write to; what was written there takes the place of `path` at the block's end.

  If the block raises, `path` stays as it was.

  Args:
    path: the file to replace.
    is_durable: waits until the contents are on disk, so that they outlive a power cut if their name does.
  """
  partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
  try:
    yield partial
    if is_durable:
      with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise


def remove_partials(folder: Path) -> None:
  """Deletes what killed processes left of files that they were writing in `folder`; no process may be writing there."""
  for partial in folder.glob(".*.partial"):
    partial.unlink()


def write_bytes(path: Path, data: bytes) -> None:
  """Writes `data` as the whole file."""
  with replacing(path) as partial:
    partial.write_bytes(data)


def write_text(path: Path, text: str) -> None:
  """Writes `text` as the whole file, in UTF-8."""
  write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
  """Writes a JSON value as the whole file, indented."""
  write_text(path, json.dumps(value, indent=2) + "\n")


def write_json_lines(path: Path, lines: Iterable[object]) -> None:
  """Writes one JSON value a line as the whole file."""
  write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_json_lines(path: Path) -> list:
  """Returns the values of a file of one JSON value a line.

  Raises:
    ValueError: a line is not JSON.
  """
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes arrays by name as a whole safetensors file."""
  with replacing(path) as partial:
    save_file({name: np.array(array, order="C") for name, array in arrays.items()}, partial)


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
