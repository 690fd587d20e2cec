"""Writing whole files, reading JSON that may be damaged, and one process at a time in a folder."""

import contextlib
import datetime
import json
import math
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

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
