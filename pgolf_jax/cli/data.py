"""`pgolf data`: preparing, downloading and checking the text."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro


@dataclasses.dataclass(frozen=True)
class PrepareArguments:
  """What `pgolf data prepare` understands."""

  out: Path
  """Folder to make."""
  train: Path | None = None
  """Documents: .jsonl, .jsonl.zst (one object with "text" a line) or a folder of .txt files; if not given, the speeches
  that come with the package."""
  val: Path | None = None
  """Documents from which some are held out, if not from the training documents."""
  val_docs: int | None = None
  """How many documents to hold out, from the first; officially 50000. All of --val if not given."""
  val_every: int = 1
  """Hold out every N-th document instead of the first ones (1: the first ones)."""
  tokenizer: Path | None = None
  """SentencePiece model to use; if not given, a lossless one is trained on the training documents."""
  vocab_size: int | None = None
  """Pieces of the tokenizer; 8192 if one is trained and this is not given."""
  caseops: bool = True
  """Rewrite capitals by CaseOps first."""
  shard_tokens: int = 100_000_000
  """Tokens of a shard."""
  workers: int | None = None
  """Processes; one per core if not given."""


def prepare(arguments: Annotated[PrepareArguments, tyro.conf.arg(name="")]) -> None:
  """Turn documents into shards, byte sidecar, tokenizer and manifest.

  After a kill the same command continues where it was. The same text and settings give the same files.

  Example: pgolf data prepare --train docs_selected.jsonl --val-docs 50000 --tokenizer published.model --out data/web
  """
  from pgolf_jax.data.corpus import open_corpus
  from pgolf_jax.data.holdout import Holdout
  from pgolf_jax.data.prepare import Preparation
  from pgolf_jax.data.prepare import prepare as run
  from pgolf_jax.data.tokenizer import Tokenizer
  from pgolf_jax.errors import UserError

  a = arguments
  holdout = Holdout(a.val_docs, a.val_every)
  if a.train is not None:
    corpus = open_corpus(a.train)
    if a.val is None and holdout == Holdout(None):
      raise UserError("say how many documents are held out, as in --val-docs 50000, or give them with --val FILE")
  else:
    from pgolf_jax.data.folder import default_corpus

    corpus, default_holdout = default_corpus()
    if a.val is None and holdout == Holdout(None):
      holdout = default_holdout
  tokenizer = Tokenizer.load(a.tokenizer, a.vocab_size) if a.tokenizer else None
  vocab_size = tokenizer.vocab_size if tokenizer else a.vocab_size or 8192
  held_out_from = open_corpus(a.val) if a.val else None
  run(a.out, Preparation(corpus, held_out_from, holdout, tokenizer, vocab_size, a.caseops, a.shard_tokens), a.workers)
  inspect(a.out)


def inspect(folder: tyro.conf.Positional[Path]) -> None:
  """Show what is in a data folder.

  Example: pgolf data inspect data/web

  Args:
    folder: data folder.
  """
  from rich.console import Console
  from rich.table import Table

  from pgolf_jax.data.verify import inspect as run

  contents = run(folder)
  table = Table(title=str(folder), title_justify="left")
  for column in ("split", "shards", "tokens", "documents", "median tokens", "longest"):
    table.add_column(column, justify="left" if column == "split" else "right")
  for split in contents.splits:
    counts = (split.shards, split.tokens, split.documents, split.median_tokens, split.longest_tokens)
    table.add_row(split.name, *(f"{count:,}" for count in counts))
  facts = Table(show_header=False, box=None)
  for name, fact in _facts(contents):
    facts.add_row(name, fact)
  console = Console()
  console.print(table)
  console.print(facts)


def _facts(contents):
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
    lost = manifest.val.text_bytes - manifest.val.counted_bytes
    yield "text", f"{manifest.train.text_bytes:,} bytes for training, {manifest.val.text_bytes:,} for validation"
    yield "lost", f"{lost:,} validation bytes under no token, by the tokenizer's normalising"
    yield "held out", f"{manifest.validation} ({manifest.validation_sha256[:16]}…)"
    yield "dropped", f"{manifest.train.duplicates:,} training documents that are held out for validation"
  else:
    yield "manifest", "none of this program"
  if contents.opening is not None:
    yield "begins", repr(contents.opening)


def verify(folder: tyro.conf.Positional[Path], tokenizer: Path | None = None) -> int:
  """Check a data folder: headers, token range, documents, sidecar, text, overlap, manifest. Exits 1 if a check fails.

  Example: pgolf data verify data/web

  Args:
    folder: data folder.
    tokenizer: SentencePiece model, if not tokenizer.model in the folder.
  """
  from rich.console import Console
  from rich.table import Table

  from pgolf_jax.data.verify import verify as run

  checks = list(run(folder, tokenizer))
  table = Table(title=str(folder), title_justify="left")
  for column in ("check", "", "finding"):
    table.add_column(column, overflow="fold")
  marks = {True: "[green]ok[/]", False: "[red]FAILED[/]", None: "–"}
  for check in checks:
    table.add_row(check.name, marks[check.passed], check.finding)
  Console().print(table)
  return int(any(check.passed is False for check in checks))


def download(name: tyro.conf.Positional[str], out: Path, train_shards: int = 80) -> None:
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


COMMANDS = {"prepare": prepare, "inspect": inspect, "verify": verify, "download": download}
