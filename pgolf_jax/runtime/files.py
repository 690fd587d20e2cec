"""Writing whole files, and one process at a time in a folder."""

import contextlib
import datetime
import hashlib
import json
import os
import shutil
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


def remove(path: Path) -> None:
  """Deletes a file, or a folder with what is in it, if there is one."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


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


class Damaged(Exception):
  """A file is not what was written: the message names it."""


def seal(values: Mapping) -> dict:
  """Returns JSON values with their own SHA-256 beside them."""
  return {**values, _SEAL: json_hash(values)}


def read_sealed(path: Path) -> dict:
  """Returns the values of a file that holds what `seal` gave.

  Raises:
    FileNotFoundError: there is no such file.
    Damaged: it is something else, or not what was written.
  """
  try:
    values = json.loads(path.read_bytes())
    sha256 = values.pop(_SEAL)
  except FileNotFoundError:
    raise
  except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
    raise Damaged(f"{path} is damaged ({_first_line(error)})") from error
  if json_hash(values) != sha256:
    raise Damaged(f"{path} is damaged (its checksum differs)")
  return values


_SEAL = "sha256"


def json_hash(value: object) -> str:
  """Returns the SHA-256 of a JSON value."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_hash(path: Path) -> str | None:
  """Returns the SHA-256 of a file; None if it is no file or cannot be read."""
  try:
    with path.open("rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  except OSError:
    return None


def _first_line(error: Exception) -> str:
  return (str(error) or type(error).__name__).splitlines()[0]


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


def write_npy(path: Path, array: np.ndarray) -> None:
  """Writes an array as a whole .npy file."""
  with replacing(path) as partial, partial.open("wb") as file:
    np.save(file, array)


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
