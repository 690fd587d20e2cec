"""`pgolf bench data`: how fast text becomes shards, and what the time goes into."""

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table: what was done, by how many processes or threads, to how many bytes, in what time.

  `core_seconds` is the time that cores worked on it; on a machine that does other work too, it tells more.
  """

  what: str
  parallel: int
  text_bytes: int
  seconds: float
  core_seconds: float

  @property
  def rate(self) -> float:
    """Megabytes of original text per second."""
    return self.text_bytes / 1e6 / self.seconds


def data(
  train: Path | None = None,
  val: Path | None = None,
  tokenizer: Path | None = None,
  workers: int | None = None,
  sample_mb: float = 10.0,
) -> None:
  """Time the preparation of text: all of it (sidecar for validation only), then its parts on a sample.

  Rates are in MB of original text per second. A part that says "or" is what the one above it replaces.

  Example: pgolf bench data --train web.jsonl.zst --val val.jsonl.zst --tokenizer published.model

  Args:
    train: documents; the speeches that come with the package if not given.
    val: validation documents; one training document in twenty if not given.
    tokenizer: SentencePiece model; one of 1024 pieces, trained on the speeches, if not given.
    workers: processes; one per core if not given.
    sample_mb: how much text to time the parts on, in MB.
  """
  from rich.console import Console
  from rich.table import Table

  workers = workers or len(os.sched_getaffinity(0))
  table = Table(title="preparing text", title_justify="left")
  for column in ("what", "in parallel", "MB", "core s", "s", "MB/s"):
    table.add_column(column, justify="left" if column == "what" else "right")
  with tempfile.TemporaryDirectory() as folder:
    for row in measure(Path(folder), train, val, tokenizer, workers, sample_mb):
      figures = (f"{figure:.2f}" for figure in (row.text_bytes / 1e6, row.core_seconds, row.seconds, row.rate))
      table.add_row(row.what, str(row.parallel), *figures)
  Console().print(table)


def measure(
  folder: Path, train: Path | None, val: Path | None, tokenizer: Path | None, workers: int, sample_mb: float
) -> list[Row]:
  """The rows of the table; arguments as `data`, and an empty folder to work in."""
  from pgolf_jax.data.default_text import default_documents, ensure_default_data
  from pgolf_jax.data.documents import open_documents
  from pgolf_jax.data.manifest import TOKENIZER
  from pgolf_jax.data.prepare import Preparation, prepare
  from pgolf_jax.data.split import Choice
  from pgolf_jax.data.tokenizer import Tokenizer

  documents, choice = (open_documents(train), Choice(None, every=20)) if train else default_documents()
  held_out = open_documents(val) if val else None
  model = tokenizer or ensure_default_data(folder / "default", 1024) / TOKENIZER
  pieces = Tokenizer.load(model)
  rows = []
  for processes in dict.fromkeys((workers, 1)):
    preparation = Preparation(
      documents, held_out, Choice(None) if val else choice, pieces, pieces.vocab_size, pieces.has_caseops
    )
    clock = _Clock()
    manifest = prepare(folder / f"by_{processes}", preparation, processes)
    text_bytes = manifest.train.text_bytes + manifest.val.text_bytes
    rows.append(Row("prepare, all of it", processes, text_bytes, *clock.read()))
  return rows + _parts(documents, model, workers, sample_mb)


def _parts(documents, model: Path, workers: int, sample_mb: float) -> list[Row]:
  """Each part of the work alone, in one process; SentencePiece's own batch encoding in `workers` threads."""
  import sentencepiece

  from pgolf_jax.data import caseops
  from pgolf_jax.data.sidecar import token_bytes
  from pgolf_jax.data.split import digest
  from pgolf_jax.data.tokenizer import Tokenizer

  records = _sample(documents, sample_mb * 1e6)
  text_bytes = sum(len(record.text().encode()) for record in records)
  rows = []

  def timed(what: str, work: Callable[[], list], parallel: int = 1) -> list:
    clock = _Clock()
    result = work()
    rows.append(Row(what, parallel, text_bytes, *clock.read()))
    return result

  pieces = Tokenizer.load(model)
  direct = sentencepiece.SentencePieceProcessor(model_file=str(model))
  timed("floor: parse and hash", lambda: [digest(record.text().encode()) for record in records])
  texts = [record.text() for record in records]
  coded = timed("CaseOps", lambda: list(map(caseops.encode if pieces.has_caseops else str, texts)))
  tokens = timed("tokenize, nothing known", lambda: list(map(pieces.encode, coded)))
  timed("tokenize, words known", lambda: list(map(pieces.encode, coded)))
  timed("or: SentencePiece, singly", lambda: list(map(direct.encode, coded)))
  timed("or: SentencePiece, batch", lambda: direct.encode(coded, num_threads=workers), workers)
  timed(
    "sidecar",
    lambda: [token_bytes(pieces, c, t, is_caseops=pieces.has_caseops) for c, t in zip(coded, tokens, strict=True)],
  )
  return rows


class _Clock:
  """Starts when made."""

  def __init__(self):
    self._began = self._now()

  def read(self) -> tuple[float, float]:
    """Seconds since, and seconds that cores worked for this process and its finished children."""
    seconds, core_seconds = (now - began for now, began in zip(self._now(), self._began, strict=True))
    return seconds, core_seconds

  @staticmethod
  def _now() -> tuple[float, float]:
    times = os.times()
    return time.perf_counter(), times.user + times.system + times.children_user + times.children_system


def _sample(documents, size: float) -> list:
  from pgolf_jax.data.documents import Position, batches

  records, read = [], 0
  for batch in batches(documents, Position(), wanted=lambda document: True):
    records += batch.records
    read += sum(len(record.raw) for record in batch.records)
    if read >= size:
      break
  return records


COMMAND = data
