"""Where documents come from: JSON lines, plain or zstd, or text files; read in batches that can be found again."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import zstandard

from pgolf_jax.errors import UserError

BATCH_BYTES = 1 << 20  # of raw records; large enough that handing a batch to a worker costs nothing beside it


@dataclasses.dataclass(frozen=True)
class Position:
  """A place in a stream of documents from which reading can go on."""

  document: int = 0  # how many documents come before it
  line: int = 0  # how many lines (or files) come before it
  offset: int = 0  # how many bytes of uncompressed text come before it


@dataclasses.dataclass(frozen=True)
class Record:
  """One document as it was found."""

  source: str  # file it comes from
  line: int  # number of its line, from 1; 0 for a file of its own
  raw: bytes

  @property
  def name(self) -> str:
    return f"{self.source}, line {self.line}" if self.line else self.source

  def text(self) -> str:
    """The document's text.

    Raises:
      UserError: not UTF-8, not a JSON object, no `text` in it, or an empty one; names file, line and place.
    """
    try:
      text = self.raw.decode("utf-8")
    except UnicodeDecodeError as error:
      raise UserError(f"{self.name}: invalid UTF-8 at byte {error.start}; convert the text or leave it out") from error
    if self.line:
      text = self._text_field(text)
    if not text:
      raise UserError(f"{self.name}: an empty document; leave it out")
    return text

  def _text_field(self, line: str) -> str:
    try:
      fields = json.loads(line)
    except json.JSONDecodeError as error:
      raise UserError(
        f"{self.name}: broken JSON at column {error.colno} ({error.msg}); mend the line or leave it out"
      ) from error
    text = fields.get("text") if isinstance(fields, dict) else None
    if not isinstance(text, str):
      raise UserError(f'{self.name}: no "text" with a string; each line is a JSON object such as {{"text": "…"}}')
    try:
      text.encode()
    except UnicodeEncodeError as error:
      half = ascii(text[error.start])
      raise UserError(
        f"{self.name}: half a surrogate pair ({half}) at character {error.start} of its text, which UTF-8 cannot hold; "
        "mend the line or leave it out"
      ) from error
    return text


@dataclasses.dataclass(frozen=True)
class Batch:
  """Consecutive documents, and where the first of them starts."""

  start: Position
  records: list[Record]
  read: int  # bytes of the input file or files read so far, for the progress bar


class Documents(Protocol):
  """A stream of documents in a fixed order."""

  name: str
  size: int  # bytes on disk

  def identity(self) -> dict:
    """What tells this input from another: name, size, hash of its ends or of its names and sizes."""

  def modified(self) -> int:
    """When the input was last changed, in nanoseconds."""

  def records(self, start: Position) -> Iterator[tuple[Position, Record, int]]:
    """Documents from `start` on: where each starts, what it is, and the bytes of input read so far."""


def batches(
  documents: Documents, start: Position, *, wanted: Callable[[int], bool], stop: int | None = None
) -> Iterator[Batch]:
  """The documents whose number `wanted` accepts, from `start` up to number `stop`, about a megabyte at a time."""
  batch, size = None, 0
  for position, record, read in documents.records(start):
    if stop is not None and position.document >= stop:
      break
    if not wanted(position.document):
      continue
    if batch is None:
      batch = Batch(position, [], read)
    batch.records.append(record)
    size += len(record.raw)
    if size >= BATCH_BYTES:
      yield dataclasses.replace(batch, read=read)
      batch, size = None, 0
  if batch is not None:
    yield dataclasses.replace(batch, read=documents.size)


def open_documents(path: Path) -> Documents:
  """The documents at `path`: a .jsonl or .jsonl.zst file, or a folder of .txt files (in name order).

  Raises:
    UserError: nothing there, or something else.
  """
  path = Path(path)
  if path.is_dir():
    files = sorted(file for file in path.rglob("*.txt") if file.is_file())
    if not files:
      raise UserError(f"{path}: no .txt file in this folder; give a folder of .txt files or a .jsonl file")
    return TextFiles(path, files)
  if not path.is_file():
    raise UserError(f"{path}: no such file or folder; give documents as .jsonl, .jsonl.zst or a folder of .txt files")
  if not path.name.endswith((".jsonl", ".jsonl.zst")):
    raise UserError(f"{path}: of no known kind; give documents as .jsonl, .jsonl.zst or a folder of .txt files")
  return JsonLines(path)


class TextFiles:
  """One document per file, byte for byte."""

  def __init__(self, folder: Path, files: Sequence[Path], name: str | None = None):
    self.name = name or folder.name
    self._folder, self._files = folder, files
    self._sizes = [file.stat().st_size for file in files]
    self.size = sum(self._sizes)

  def identity(self) -> dict:
    listing = [f"{file.relative_to(self._folder)} {size}" for file, size in zip(self._files, self._sizes, strict=True)]
    listed = hashlib.sha256("\n".join(listing).encode()).hexdigest()
    return {"name": self.name, "files": len(listing), "bytes": self.size, "sha256_of_listing": listed}

  def modified(self) -> int:
    return max(file.stat().st_mtime_ns for file in self._files)

  def records(self, start: Position) -> Iterator[tuple[Position, Record, int]]:
    read = start.offset
    for i in range(start.line, len(self._files)):
      raw = self._files[i].read_bytes()
      position = Position(i, i, read)
      read += len(raw)
      yield position, Record(str(self._files[i]), 0, raw), read


class JsonLines:
  """One document per line, blank lines skipped; a name ending in .zst is decompressed on the way."""

  ENDS = 1 << 20  # bytes at each end of the file that tell it from another

  def __init__(self, path: Path):
    self._path = path
    self.name = path.name
    self.size = path.stat().st_size

  def identity(self) -> dict:
    with self._path.open("rb") as file:
      ends = hashlib.sha256(file.read(self.ENDS))
      file.seek(max(0, self.size - self.ENDS))
      ends.update(file.read(self.ENDS))
    return {"name": self.name, "bytes": self.size, "sha256_of_ends": ends.hexdigest()}

  def modified(self) -> int:
    return self._path.stat().st_mtime_ns

  def records(self, start: Position) -> Iterator[tuple[Position, Record, int]]:
    document, number, offset = start.document, start.line, start.offset
    with self._path.open("rb") as file:
      stream = file
      if self._path.suffix == ".zst":
        stream = io.BufferedReader(_ZstdStream(file, self._path), 1 << 20)
        for skipped in range(offset, 0, -(1 << 20)):
          stream.read(min(skipped, 1 << 20))
      else:
        stream.seek(offset)
      for line in stream:
        if line.strip():
          yield Position(document, number, offset), Record(str(self._path), number + 1, line), file.tell()
          document += 1
        number += 1
        offset += len(line)


class _ZstdStream(io.RawIOBase):
  """Reads any number of zstd frames one after the other and, unlike the library's reader, misses a cut-off end."""

  def __init__(self, file: BinaryIO, path: Path):
    self._file, self._path = file, path
    self._start_frame()
    self._ready = b""

  def _start_frame(self) -> None:
    # Files made with --long need windows of up to 2 GiB, which the library refuses unless told.
    self._frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
    self._inside = False

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    while not self._ready and self._more():
      pass
    n = min(len(buffer), len(self._ready))
    buffer[:n] = self._ready[:n]
    self._ready = self._ready[n:]
    return n

  def _more(self) -> bool:
    """Decompresses the next stretch; false at the end of the file."""
    packed = self._frame.unused_data if self._frame.eof else b""
    if self._frame.eof:
      self._start_frame()
    packed = packed or self._file.read(1 << 17)
    if not packed:
      if self._inside:
        raise UserError(f"{self._path}: the file ends in the middle of its zstd data; fetch it again")
      return False
    self._inside = True
    try:
      self._ready = memoryview(self._frame.decompress(packed))
    except zstandard.ZstdError as error:
      raise UserError(
        f"{self._path}: damaged zstd data before byte {self._file.tell()} ({error}); fetch the file again"
      ) from error
    return True
