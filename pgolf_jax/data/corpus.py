"""Corpora: documents as JSON lines (plain or zstd) or text files, read in batches from any position, and which of them
are held out for validation.

Neither held-out documents nor copies of them, which are recognised by digest, are used for training.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from pgolf_jax.data.zstd_stream import ZstdStream
from pgolf_jax.errors import UserError
from pgolf_jax.runtime.log import progress

MAX_DOCUMENT_BYTES = 1 << 26  # of a line or file, where nothing else is asked for
_MAX_BLANK = 1 << 20  # bytes of blank lines one after the other
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
    except (ValueError, RecursionError) as error:
      what = "JSON that is nested too deeply or has a number of thousands of digits"
      if isinstance(error, json.JSONDecodeError):
        what = f"broken JSON at column {error.colno} ({error.msg})"
      raise UserError(f"{self.place}: {what}; correct the line or remove it") from error
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


def open_corpus(path: Path, max_document: int = MAX_DOCUMENT_BYTES) -> Corpus:
  """Returns the corpus at `path`: a .jsonl or .jsonl.zst file, or a folder of .txt files, in the order of their names.

  Args:
    path: file or folder.
    max_document: bytes of the longest document, as a line of JSON or a file; reading refuses longer ones.

  Raises:
    UserError: there is nothing at `path`, or something else.
  """
  path = Path(path)
  if path.is_dir():
    files = sorted(file for file in path.rglob("*.txt") if file.is_file())
    if not files:
      raise UserError(f"{path}: no .txt file in this folder; give a folder of .txt files or a .jsonl file")
    return TextFiles(path, files, max_document=max_document)
  if not path.is_file():
    raise UserError(f"{path}: no such file or folder; give documents as .jsonl, .jsonl.zst or a folder of .txt files")
  if not path.name.endswith((".jsonl", ".jsonl.zst")):
    raise UserError(f"{path}: its kind is unknown; give documents as .jsonl, .jsonl.zst or a folder of .txt files")
  return JsonLines(path, max_document)


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


@dataclasses.dataclass(frozen=True)
class Holdout:
  """The rule that holds out the first `count` (None: all) of every `every`-th document of a corpus."""

  count: int | None
  every: int = 1

  def __post_init__(self):
    for name, number in (("--val-docs", self.count), ("--val-every", self.every)):
      if number is not None and number < 1:
        raise UserError(f"{name} {number} must be 1 or more")

  def includes(self, document: int) -> bool:
    """Tells whether the document of this number, from 0, is held out."""
    number, rest = divmod(document + 1, self.every)
    return rest == 0 and (self.count is None or number <= self.count)

  @property
  def stop(self) -> int | None:
    """Number of the document from which on none is held out; None where there may be one anywhere."""
    return None if self.count is None else self.count * self.every

  def describe(self) -> str:
    """Returns the rule in words."""
    which = "all documents" if self.count is None else f"the first {self.count} documents"
    return which if self.every == 1 else f"{which} of those numbered {self.every}, {2 * self.every}, … (from 1)"


def in_training(holdout: Holdout | None) -> Callable[[int], bool]:
  """Returns a function that tells of a document's number whether the rule leaves it for training.

  Args:
    holdout: rule for the training corpus; None if validation comes from another corpus.
  """
  return lambda document: holdout is None or not holdout.includes(document)


def digest(text: bytes) -> bytes:
  """Returns the SHA-256 of a document's UTF-8 text, by which its copies are recognised."""
  return hashlib.sha256(text).digest()


@dataclasses.dataclass(frozen=True)
class HeldOutDocuments:
  """The documents held out for validation, by digest."""

  digests: frozenset[bytes]
  sha256: str  # of the digests in order

  @classmethod
  def collect(cls, corpus: Corpus, holdout: Holdout) -> "HeldOutDocuments":
    """Reads the documents that `holdout` names.

    Raises:
      UserError: there are fewer of them than `holdout.count`, or one of them is faulty.
    """
    ordered = []
    with progress("reading validation documents", total=corpus.size, unit="B") as bar:
      bytes_read = 0
      for batch in read_batches(corpus, Position(), wanted=holdout.includes, stop=holdout.stop):
        ordered.extend(digest(document.text().encode()) for document in batch.documents)
        bar.advance(batch.bytes_read - bytes_read)
        bytes_read = batch.bytes_read
    if not ordered or (holdout.count is not None and len(ordered) < holdout.count):
      raise UserError(
        f"{corpus.name}: {len(ordered)} documents to hold out where {holdout.count or 'some'} were asked for; "
        "ask for fewer or give more documents"
      )
    return cls(frozenset(ordered), hashlib.sha256(b"".join(ordered)).hexdigest())


def training_texts(corpus: Corpus, holdout: Holdout | None, held_out: HeldOutDocuments, limit: int) -> list[str]:
  """Returns training documents from the start of a corpus, until they have at least `limit` bytes in all.

  Args:
    corpus: the training corpus.
    holdout: rule for this corpus; None if validation comes from another one.
    held_out: the validation documents, whose copies are left out too.
    limit: bytes of UTF-8.

  Raises:
    UserError: no document is left, or one of them is faulty.
  """
  texts, size = [], 0
  for batch in read_batches(corpus, Position(), wanted=in_training(holdout)):
    for document in batch.documents:
      text = document.text()
      utf8 = text.encode()
      if digest(utf8) in held_out.digests:
        continue
      texts.append(text)
      size += len(utf8)
      if size >= limit:
        return texts
  if not texts:
    raise UserError(f"{corpus.name}: no document is left for training; hold out fewer")
  return texts


class TextFiles:
  """A corpus of one document per file, byte for byte."""

  def __init__(
    self, folder: Path, files: Sequence[Path], name: str | None = None, max_document: int = MAX_DOCUMENT_BYTES
  ):
    self.name = name or folder.name
    self._max_document = _checked_length(max_document)
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
      with self._files[i].open("rb") as file:
        raw = file.read(self._max_document + 1)
      if len(raw) > self._max_document:
        raise _too_long(str(self._files[i]), i, self._max_document)
      position = Position(i, i, bytes_read)
      bytes_read += len(raw)
      yield position, RawDocument(str(self._files[i]), 0, raw), bytes_read


class JsonLines:
  """A corpus of one document per line; blank lines are skipped, a file whose name ends in .zst is decompressed."""

  ENDS = 1 << 20  # bytes at each end of the file that go into its identity

  def __init__(self, path: Path, max_document: int = MAX_DOCUMENT_BYTES):
    self._path, self._max_document = path, _checked_length(max_document)
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
    blank = 0  # bytes of blank lines since the last document, which a bomb can have millions of
    with self._path.open("rb") as file:
      stream = file
      if self._path.suffix == ".zst":
        stream = io.BufferedReader(ZstdStream(file, self._path), 1 << 20)
        for left in range(offset, 0, -(1 << 20)):
          stream.read(min(left, 1 << 20))
      else:
        stream.seek(offset)
      while line := stream.readline(self._max_document + 1):
        if len(line) > self._max_document:
          raise _too_long(f"{self._path}, line {line_number + 1}", document, self._max_document)
        if line.strip():
          position = Position(document, line_number, offset)
          yield position, RawDocument(str(self._path), line_number + 1, line), file.tell()
          document += 1
          blank = 0
        elif (blank := blank + len(line)) > _MAX_BLANK:
          raise UserError(f"{self._path}, line {line_number + 1}: ends {_MAX_BLANK} bytes of blank lines; remove them")
        line_number += 1
        offset += len(line)


def _checked_length(max_document: int) -> int:
  if max_document < 1:
    raise UserError(f"--max-document {max_document} must be 1 or more")
  return max_document


def _too_long(place: str, document: int, most: int) -> UserError:
  return UserError(
    f"{place}: document {document + 1} has more than {most} bytes; cut it, remove it, or raise --max-document"
  )
