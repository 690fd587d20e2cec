"""`pgolf bench data`: how fast text becomes shards, and what the time goes into."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import sentencepiece

from pgolf_jax.bench import harness
from pgolf_jax.bench.harness import Way
from pgolf_jax.data import caseops
from pgolf_jax.data.corpus import Corpus, Holdout, Position, RawDocument, digest, open_corpus, read_batches
from pgolf_jax.data.encode import token_bytes
from pgolf_jax.data.folder import default_corpus, ensure_default_data
from pgolf_jax.data.manifest import TOKENIZER, Manifest
from pgolf_jax.data.prepare import Preparation, prepare
from pgolf_jax.data.tokenizer import Tokenizer
from pgolf_jax.runtime.memory import cores


def data(
  train: Path | None = None,
  val: Path | None = None,
  tokenizer: Path | None = None,
  workers: int | None = None,
  sample_mb: float = 10.0,
  repeats: int = 5,
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
    repeats: times that each way is run, in turn with the others.
  """
  workers = workers or cores()
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    corpus, holdout = (open_corpus(train), Holdout(None, every=20)) if train else default_corpus()
    held_out_from, holdout = (open_corpus(val), Holdout(None)) if val else (None, holdout)
    model = tokenizer or ensure_default_data(folder / "default", 1024) / TOKENIZER
    pieces = Tokenizer.load(model)
    markers = "published" if pieces.has_caseops else "none"
    preparation = Preparation(corpus, held_out_from, holdout, pieces, pieces.vocab_size, markers)
    ways = [_whole(preparation, folder, processes) for processes in dict.fromkeys((workers, 1))]
    ways += _parts(_sample(corpus, sample_mb * 1e6), model, workers)
    measurements, notes = harness.measure(ways, repeats, warmups=0)
  columns = {
    "MB": lambda m: f"{m.facts:.2f}",
    **harness.CORES,
    **harness.SECONDS,
    "MB/s": lambda m: f"{m.facts / m.median:.2f}",
  }
  harness.show("preparing text", measurements, columns, notes)


def _whole(preparation: Preparation, folder: Path, processes: int) -> Way:
  """Returns the whole preparation, by `processes` processes, into new folders in `folder`."""

  def run() -> Manifest:
    return prepare(Path(tempfile.mkdtemp(dir=folder)), preparation, processes)

  def megabytes(manifest: Manifest) -> float:
    return (manifest.train.text_bytes + manifest.val.text_bytes) / 1e6

  return Way(_labels("prepare, all of it", processes), lambda: run, inspect=megabytes)


def _parts(documents: list[RawDocument], model: Path, workers: int) -> list[Way]:
  """Returns each part of the work alone, in one process; SentencePiece's batch encoding in `workers` threads."""
  texts = [document.text() for document in documents]
  megabytes = sum(len(text.encode()) for text in texts) / 1e6
  pieces = Tokenizer.load(model)
  rewrite = caseops.encode if pieces.has_caseops else str
  coded = list(map(rewrite, texts))
  tokens = list(map(pieces.encode, coded))  # from here on, the words are known to `pieces`
  direct = sentencepiece.SentencePieceProcessor(model_file=str(model))

  def sidecar() -> list:
    both = zip(coded, tokens, strict=True)
    return [token_bytes(pieces, text, tokens_N, is_caseops=pieces.has_caseops) for text, tokens_N in both]

  def part(what: str, run: Callable[[], list], threads: int = 1) -> Way:
    return Way(_labels(what, threads), lambda: run, inspect=lambda result: megabytes)

  return [
    part("floor: parse and hash", lambda: [digest(document.text().encode()) for document in documents]),
    part("CaseOps", lambda: list(map(rewrite, texts))),
    part("tokenize, no word known", lambda: list(map(Tokenizer.load(model).encode, coded))),
    part("tokenize, words known", lambda: list(map(pieces.encode, coded))),
    part("or: SentencePiece, singly", lambda: list(map(direct.encode, coded))),
    part("or: SentencePiece, batch", lambda: direct.encode(coded, num_threads=workers), workers),
    part("sidecar", sidecar),
  ]


def _labels(what: str, parallel: int) -> dict[str, str]:
  return {"what": what, "in parallel": str(parallel)}


def _sample(corpus: Corpus, size: float) -> list[RawDocument]:
  """Returns documents from the start of a corpus, of at least `size` bytes if it has as many."""
  documents, bytes_read = [], 0
  for batch in read_batches(corpus, Position(), wanted=lambda document: True):
    documents += batch.documents
    bytes_read += sum(len(document.raw) for document in batch.documents)
    if bytes_read >= size:
      break
  return documents


COMMAND = data
