"""Writing whole files, reading JSON that may be damaged, and one process at a time in a folder."""

import contextlib
import datetime
import hashlib
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

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
  """Deletes what killed processes left of what they were writing in `folder`; no process may be writing there."""
  for partial in folder.glob(".*.partial"):
    remove(partial)


def remove(path: Path) -> None:
  """Deletes a file, or a folder with what is in it, if there is one."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def require_room(path: Path) -> None:
  """Raises UserError if a file cannot be written at `path`; asked before the work whose result it will hold."""
  if path.is_dir():
    raise UserError(f"{path} is a folder where a file is to be written; name a file in it.")
  if not path.parent.is_dir():
    raise UserError(f"{path} cannot be written: there is no folder {path.parent}; make it, or name another place.")
  if not os.access(path.parent, os.W_OK):
    raise UserError(f"{path} cannot be written: {path.parent} may not be changed; name another place.")


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


class Damaged(UserError):
  """A file is not what was written."""


def seal(values: Mapping) -> dict:
  """Returns JSON values with their own SHA-256 beside them."""
  return {**values, _SEAL: json_hash(values)}


def read_sealed(path: Path) -> dict:
  """Returns the values of a file that holds what `seal` gave.

  Raises:
    Damaged: there is no such file, or it is not what was written.
  """
  try:
    values = read_json(path)
  except UserError as error:
    raise Damaged(str(error)) from error
  if not is_sealed(values):
    raise Damaged(f"{path} is damaged: its checksum differs.")
  return unsealed(values)


def is_sealed(values: Mapping) -> bool:
  """Returns whether JSON values are those that `seal` gave."""
  return seal(unsealed(values)) == values


def unsealed(values: Mapping) -> dict:
  """Returns the values that `seal` was given."""
  return {name: value for name, value in values.items() if name != _SEAL}


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


def write_json_lines(path: Path, lines: Iterable[object]) -> None:
  """Writes one JSON value a line as the whole file."""
  write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_json(path: Path, kind: type = dict) -> Any:
  """Returns the JSON value that is the whole file.

  Args:
    path: the file.
    kind: type that the value must have.

  Raises:
    UserError: the file cannot be read, is not JSON, nests too deeply, holds NaN, an infinity or a number of thousands
      of digits, or a value of another type; names the file and the line.
  """
  return _parsed(_text(path), str(path), 1, kind)


def read_json_lines(path: Path) -> list[dict]:
  """Returns the JSON objects of a file of one a line; a torn last line, as a kill leaves it, is left out.

  Torn is what has no end of line and is no JSON object; blank lines are skipped.

  Raises:
    UserError: the file cannot be read, or any other line is faulty as in `read_json`; names the file and the line.
  """
  *lines, rest = _text(path).split("\n")
  values = [_parsed(line, str(path), number, dict) for number, line in enumerate(lines, 1) if line.strip()]
  if rest.strip():
    with contextlib.suppress(UserError):
      values.append(_parsed(rest, str(path), len(lines) + 1, dict))
  return values


def parse_json(text: str) -> Any:
  """Returns the value of a JSON text, all of whose numbers are finite.

  Raises:
    ValueError: it is not JSON, nests too deeply, or holds a number that JSON or this program does not know; a
      json.JSONDecodeError, which tells the place.
  """
  try:
    return json.loads(text, parse_constant=_finite, parse_float=_finite)
  except json.JSONDecodeError:
    raise
  except (ValueError, RecursionError) as error:
    raise _fault(text) from error


def _text(path: Path) -> str:
  try:
    data = path.read_bytes()
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
  try:
    return data.decode()
  except UnicodeDecodeError as error:
    line = data.count(b"\n", 0, error.start) + 1
    raise UserError(f"{path}, line {line}: invalid UTF-8, so the file is damaged.") from error


def _parsed(text: str, where: str, first: int, kind: type) -> Any:
  """The value of a JSON text that begins at line `first` of `where`."""
  try:
    value = parse_json(text)
  except json.JSONDecodeError as error:
    raise UserError(f"{where}, line {first + error.lineno - 1}: damaged JSON ({error.msg}).") from error
  if not isinstance(value, kind):
    raise UserError(f"{where}, line {first}: a JSON {_KINDS[type(value)]} where {_KINDS[kind]} is needed.")
  return value


_KINDS = {dict: "object", list: "array", str: "string", int: "number", float: "number", bool: "truth value"}
_KINDS[type(None)] = "null"


def _finite(number: str) -> float:
  value = float(number)
  if not math.isfinite(value):
    raise ValueError(f"{number} is not finite")
  return value


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]|[^\s,:"\[\]{}]+')
_MAX_DEPTH = 100  # far below what Python's own parser can do


def _fault(text: str) -> json.JSONDecodeError:
  """What is wrong with a text that the parser refuses without saying where: depth, or a number."""
  depth = 0
  for token in _TOKEN.finditer(text):
    word = token[0]
    depth += (word in "[{") - (word in "]}")
    if depth > _MAX_DEPTH:
      return json.JSONDecodeError(f"more than {_MAX_DEPTH} levels deep", text, token.start())
    if word[0] in "-NI0123456789":
      try:
        is_number = math.isfinite(float(word)) and (not word.lstrip("-").isdigit() or int(word) is not None)
      except ValueError:
        is_number = False
      if not is_number:
        return json.JSONDecodeError("a number that is not finite or far too long", text, token.start())
  return json.JSONDecodeError("not JSON", text, 0)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
  """Writes arrays by name as a whole safetensors file, with `metadata` in its header."""
  with replacing(path) as partial:
    save_file({name: np.array(array, order="C") for name, array in arrays.items()}, partial, metadata=metadata)


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
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / ".lock"
  if path.is_dir():
    remove(path)
  with path.open("a+", encoding="utf-8") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(
        f"{folder} is in use by {_named(_holder(path))}; wait until it ends, or choose another folder."
      ) from None
    except OSError:
      _refuse_holder(path)
    if not _is_same(file, path):  # its holder has deleted it meanwhile, with a start that came to nothing
      raise UserError(f"{folder} was in use until this moment; run the command again.")
    file.truncate(0)
    now = datetime.datetime.now(datetime.UTC)
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "time": now.isoformat(timespec="seconds")}
    with contextlib.suppress(OSError):  # a full disk: the lock holds, only its message is poorer
      file.write(json.dumps(holder))
      file.flush()
    try:
      yield
    finally:
      # The file stays, empty: to remove it would let a process that has it open hold a lock that others do not see.
      file.truncate(0)


def _is_same(file: IO, path: Path) -> bool:
  """Whether an open file is the one that lies at a path."""
  with contextlib.suppress(FileNotFoundError):
    return os.path.samestat(os.fstat(file.fileno()), path.stat())
  return False


def _refuse_holder(path: Path) -> None:
  """Where the file system knows no locks, the file alone says who has the folder; a dead process of this host has not.

  Raises:
    UserError: another process has it, or may have it.
  """
  holder = _holder(path)
  if holder is None or not _may_live(holder) or (_is_here(holder) and holder["pid"] == os.getpid()):
    return
  raise UserError(
    f"{path.parent} is in use by {_named(holder)}; wait until it ends, or delete {path} if that process is gone."
  )


def is_held(folder: Path) -> bool:
  """Returns whether a process has a folder, as far as its lock file says."""
  holder = _holder(folder / ".lock")
  return holder is not None and _may_live(holder)


def _is_here(holder: dict) -> bool:
  return holder["host"] == socket.gethostname()


def _may_live(holder: dict) -> bool:
  """Whether a lock's holder may be at work; of other hosts nothing is known."""
  if not _is_here(holder):
    return True
  try:
    os.kill(holder["pid"], 0)
  except PermissionError:
    return True  # of another user
  except (OSError, OverflowError):
    return False
  return True


def _holder(path: Path) -> dict | None:
  """Returns what a lock file says: host, pid and time."""
  try:
    holder = read_json(path)
    return {"host": str(holder["host"]), "pid": int(holder["pid"]), "time": str(holder["time"])}
  except (UserError, KeyError, TypeError, ValueError):
    return None


def _named(holder: dict | None) -> str:
  return "another process" if holder is None else "process {pid} on {host} since {time}".format_map(holder)
