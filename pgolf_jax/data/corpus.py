"""Corpora: documents as JSON lines (plain or zstd) or text files, read in batches from any position."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import zstandard

from pgolf_jax.errors import UserError

BATCH_BYTES = 1 << 20  # of raw documents; sending so large a batch to a worker costs little beside its encoding


@dataclasses.dataclass(frozen=True)
class Position:
  """A place in a corpus from which it can be read."""

  document: int = 0  # number of documents before it
  line: int = 0  # number of lines (or files) before it
  offset: int = 0  # number of uncompressed bytes before it


@dataclasses.dataclass(frozen=True)
class RawDocument:
  """A document as it stands in its file, not yet decoded."""

  source: str  # name of the file
  line: int  # number of its line, from 1; 0 for a file of its own
  raw: bytes

  @property
  def place(self) -> str:
    """File and line, for messages."""
    return f"{self.source}, line {self.line}" if self.line else self.source

  def text(self) -> str:
    """Returns the document's text.

    Raises:
      UserError: the document is not UTF-8, not a JSON object, has no `text` or an empty one; names file and place.
    """
    try:
      text = self.raw.decode("utf-8")
    except UnicodeDecodeError as error:
      raise UserError(
        f"{self.place}: invalid UTF-8 at byte {error.start}; convert the text to UTF-8 or remove it"
      ) from error
    if self.line:
      text = self._text_field(text)
    if not text:
      raise UserError(f"{self.place}: an empty document; remove it")
    return text

  def _text_field(self, line: str) -> str:
    try:
      fields = json.loads(line)
    except json.JSONDecodeError as error:
      raise UserError(
        f"{self.place}: broken JSON at column {error.colno} ({error.msg}); correct the line or remove it"
      ) from error
    text = fields.get("text") if isinstance(fields, dict) else None
    if not isinstance(text, str):
      raise UserError(f'{self.place}: no "text" with a string; each line is a JSON object such as {{"text": "…"}}')
    try:
      text.encode()
    except UnicodeEncodeError as error:
      half = ascii(text[error.start])
      raise UserError(
        f"{self.place}: half a surrogate pair ({half}) at character {error.start} of its text, which UTF-8 cannot "
        "hold; correct the line or remove it"
      ) from error
    return text


@dataclasses.dataclass(frozen=True)
class RawBatch:
  """Consecutive documents of a corpus."""

  start: Position  # of the first document
  documents: list[RawDocument]
  bytes_read: int  # of the input files, up to the end of the batch


class Corpus(Protocol):
  """A sequence of documents in a fixed order."""

  name: str
  size: int  # bytes on disk

  def identity(self) -> dict:
    """Returns what tells this corpus from another: its name, size and a hash of its ends or of its file list."""

  def modified(self) -> int:
    """Returns when the corpus was last changed, in nanoseconds."""

  def read(self, start: Position) -> Iterator[tuple[Position, RawDocument, int]]:
    """Yields (position, document, bytes of the input read so far) for every document from `start` on."""


def open_corpus(path: Path) -> Corpus:
  """Returns the corpus at `path`: a .jsonl or .jsonl.zst file, or a folder of .txt files, in the order of their names.

  Raises:
    UserError: there is nothing at `path`, or something else.
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


def read_batches(
  corpus: Corpus, start: Position, *, wanted: Callable[[int], bool], stop: int | None = None
) -> Iterator[RawBatch]:
  """Yields batches of about a megabyte of the documents from `start` on whose number `wanted` accepts.

  Args:
    corpus: where to read.
    start: where to begin.
    wanted: tells of a document's number whether it is read.
    stop: number of the document before which to end; None to read to the end.
  """
  batch, size = None, 0
  for position, document, bytes_read in corpus.read(start):
    if stop is not None and position.document >= stop:
      break
    if not wanted(position.document):
      continue
    if batch is None:
      batch = RawBatch(position, [], bytes_read)
    batch.documents.append(document)
    size += len(document.raw)
    if size >= BATCH_BYTES:
      yield dataclasses.replace(batch, bytes_read=bytes_read)
      batch, size = None, 0
  if batch is not None:
    yield dataclasses.replace(batch, bytes_read=corpus.size)


class TextFiles:
  """A corpus of one document per file, byte for byte."""

  def __init__(self, folder: Path, files: Sequence[Path], name: str | None = None):
    self.name = name or folder.name
    self._folder, self._files = folder, files
    self._sizes = [file.stat().st_size for file in files]
    self.size = sum(self._sizes)

  def identity(self) -> dict:
    listing = [f"{file.relative_to(self._folder)} {size}" for file, size in zip(self._files, self._sizes, strict=True)]
    listing_sha256 = hashlib.sha256("\n".join(listing).encode()).hexdigest()
    return {"name": self.name, "files": len(listing), "bytes": self.size, "sha256_of_listing": listing_sha256}

  def modified(self) -> int:
    return max(file.stat().st_mtime_ns for file in self._files)

  def read(self, start: Position) -> Iterator[tuple[Position, RawDocument, int]]:
    bytes_read = start.offset
    for i in range(start.line, len(self._files)):
      raw = self._files[i].read_bytes()
      position = Position(i, i, bytes_read)
      bytes_read += len(raw)
      yield position, RawDocument(str(self._files[i]), 0, raw), bytes_read


class JsonLines:
  """A corpus of one document per line; blank lines are skipped, a file whose name ends in .zst is decompressed."""

  ENDS = 1 << 20  # bytes at each end of the file that go into its identity

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

  def read(self, start: Position) -> Iterator[tuple[Position, RawDocument, int]]:
    document, line_number, offset = start.document, start.line, start.offset
    with self._path.open("rb") as file:
      stream = file
      if self._path.suffix == ".zst":
        stream = io.BufferedReader(_ZstdStream(file, self._path), 1 << 20)
        for left in range(offset, 0, -(1 << 20)):
          stream.read(min(left, 1 << 20))
      else:
        stream.seek(offset)
      for line in stream:
        if line.strip():
          position = Position(document, line_number, offset)
          yield position, RawDocument(str(self._path), line_number + 1, line), file.tell()
          document += 1
        line_number += 1
        offset += len(line)


class _ZstdStream(io.RawIOBase):
  """Reads consecutive zstd frames and, unlike the library's reader, refuses a file that ends inside one."""

  def __init__(self, file: BinaryIO, path: Path):
    self._file, self._path = file, path
    self._start_frame()
    self._ready = b""

  def _start_frame(self) -> None:
    # Files made with --long need windows of up to 2 GiB, which the library refuses by default.
    self._frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
    self._is_inside = False

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    while not self._ready and self._decompress_more():
      pass
    n = min(len(buffer), len(self._ready))
    buffer[:n] = self._ready[:n]
    self._ready = self._ready[n:]
    return n

  def _decompress_more(self) -> bool:
    """Decompresses the next stretch of the file; returns false at its end."""
    packed = self._frame.unused_data if self._frame.eof else b""
    if self._frame.eof:
      self._start_frame()
    packed = packed or self._file.read(1 << 17)
    if not packed:
      if self._is_inside:
        raise UserError(f"{self._path}: the file ends in the middle of its zstd data; fetch it again")
      return False
    self._is_inside = True
    try:
      self._ready = memoryview(self._frame.decompress(packed))
    except zstandard.ZstdError as error:
      raise UserError(
        f"{self._path}: damaged zstd data before byte {self._file.tell()} ({error}); fetch the file again"
      ) from error
    return True
