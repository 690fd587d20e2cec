"""`pgolf data`: preparing, downloading and checking the text."""

from pathlib import Path
from typing import Literal

from pgolf_jax.settings.arguments import Positional


def prepare(
  out: Path,
  train: Path | None = None,
  val: Path | None = None,
  val_docs: int | None = None,
  val_every: int = 1,
  tokenizer: Path | None = None,
  vocab_size: int | None = None,
  caseops: bool = True,
  caseops_markers: Literal["published", "before-space"] = "published",
  shard_tokens: int = 100_000_000,
  max_document: int = 1 << 26,
  workers: int | None = None,
) -> None:
  """Turn documents into shards, byte sidecar, tokenizer and manifest.

  After a kill the same command continues where it was. The same text and settings give the same files.

  Example: pgolf data prepare --train docs_selected.jsonl --val-docs 50000 --tokenizer published.model --out data/web

  Args:
    out: folder to make.
    train: documents: .jsonl, .jsonl.zst (one object with "text" a line) or a folder of .txt files; the speeches that
      come with the package if not given.
    val: documents from which some are held out, if not from the training documents.
    val_docs: how many documents to hold out, from the first; officially 50000. All of --val if not given.
    val_every: hold out every N-th document instead of the first ones (1: the first ones).
    tokenizer: SentencePiece model to use; a lossless one is trained on the training documents if not given.
    vocab_size: pieces of the tokenizer; 8192 if one is trained and this is not given.
    caseops: rewrite capitals by CaseOps first.
    caseops_markers: where the marker of a capitalised word goes: behind the space in front of the word (published), or
      before that space, so that words with and without capitals share their pieces (before-space).
    shard_tokens: tokens of a shard.
    max_document: bytes of the longest document; a longer one is an error that names it.
    workers: processes; one per core if not given.
  """
  from pgolf_jax.data.folder import Sources, prepare_files

  prepare_files(
    out,
    Sources(
      train,
      val,
      val_docs,
      val_every,
      tokenizer,
      vocab_size,
      caseops,
      caseops_markers,
      shard_tokens,
      max_document,
      workers,
    ),
  )
  inspect(out)


def inspect(folder: Positional[Path]) -> None:
  """Show what is in a data folder.

  Example: pgolf data inspect data/web

  Args:
    folder: data folder.
  """
  from pgolf_jax.data.verify import inspect as run
  from pgolf_jax.tables import Table

  contents = run(folder)
  counts = ("shards", "tokens", "documents", "median tokens", "longest")
  rows = []
  for split in contents.splits:
    numbers = (split.shards, split.tokens, split.documents, split.median_tokens, split.longest_tokens)
    rows.append((split.name, *(f"{number:,}" for number in numbers)))
  print(Table(("split", *(f">{name}" for name in counts)), rows, title=str(folder)))
  print(f"\n{Table(('', ''), _facts(contents))}")


def _facts(contents):
  from pgolf_jax.data.caseops import IN_WORDS

  val = next((split for split in contents.splits if split.name == "val"), None)
  if contents.sidecar_bytes is not None and val:
    per_token = contents.sidecar_bytes / max(val.tokens, 1)
    yield "sidecar", f"{contents.sidecar_bytes:,} bytes, {per_token:.3f} per validation token"
  else:
    yield "sidecar", "none"
  if tokenizer := contents.tokenizer:
    yield (
      "tokenizer",
      f"{tokenizer.vocab_size} pieces, {tokenizer.kind}, CaseOps {'yes' if tokenizer.has_caseops else 'no'}",
    )
  else:
    yield "tokenizer", "none"
  if manifest := contents.manifest:
    yield "rewriting", IN_WORDS[manifest.markers]
    lost = manifest.val.text_bytes - manifest.val.counted_bytes
    yield "text", f"{manifest.train.text_bytes:,} bytes for training, {manifest.val.text_bytes:,} for validation"
    yield "not counted", f"{lost:,} bytes of the validation text, which the tokenizer drops when it normalises"
    yield "held out", f"{manifest.validation} ({manifest.validation_sha256[:16]}…)"
    yield "dropped", f"{manifest.train.duplicates:,} training documents that are held out for validation"
  else:
    yield "manifest", "none of this program"
  if contents.opening is not None:
    yield "begins", " ".join(contents.opening.split())


def verify(folder: Positional[Path], tokenizer: Path | None = None) -> int:
  """Check a data folder: headers, token range, documents, sidecar, text, overlap, manifest. Exits 1 if a check fails.

  Example: pgolf data verify data/web

  Args:
    folder: data folder.
    tokenizer: SentencePiece model, if not tokenizer.model in the folder.
  """
  from pgolf_jax.data.verify import verify as run
  from pgolf_jax.tables import Table

  checks = list(run(folder, tokenizer))
  marks = {True: "ok", False: "FAILED", None: "-"}
  rows = [(marks[check.passed], check.name, check.finding) for check in checks]
  print(Table(("", "check", "finding"), rows, title=str(folder)))
  return int(any(check.passed is False for check in checks))


def download(name: Positional[str], out: Path, train_shards: int = 80) -> None:
  """Fetch published data from the Hugging Face hub; run again, it continues with what is missing.

  Example: pgolf data download caseops --train-shards 10 --out data/caseops

  Args:
    name: caseops (of the record: 8192 pieces, CaseOps), sp1024 (1024 pieces, plain), or documents (the raw text).
    out: folder for the files.
    train_shards: number of training shards to fetch, from the first, of 100 million tokens each.
  """
  from pgolf_jax.data.download import download as run

  for path in run(name, out, train_shards):
    print(path)


COMMANDS = {"data": {"prepare": prepare, "inspect": inspect, "verify": verify, "download": download}}
