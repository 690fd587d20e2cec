"""Writing whole files: a reader, also one after a kill, sees the old file or the new one, never a part."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


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
  """The values of a file of one JSON value a line.

  Raises:
    ValueError: a line is not JSON.
  """
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes arrays by name as a whole safetensors file."""
  with replacing(path) as partial:
    save_file({name: np.array(array, order="C") for name, array in arrays.items()}, partial)
