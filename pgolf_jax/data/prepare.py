"""Preparing a data folder: documents → tokenizer → validation shards and sidecar → training shards → manifest.

A journal in the folder says which shards are finished and where in the text the next one begins, so that a
preparation that was killed goes on from there and ends with the same files.
"""

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from pgolf_jax.data import caseops
from pgolf_jax.data.documents import Documents, batches
from pgolf_jax.data.encoding import Encoder, encode_all
from pgolf_jax.data.journal import JOURNAL, Journal, SplitState
from pgolf_jax.data.manifest import MANIFEST, TOKENIZER, TRANSFORMS, Manifest
from pgolf_jax.data.shard_writer import ShardWriter
from pgolf_jax.data.shards import read_count
from pgolf_jax.data.split import Choice, HeldOut, in_training, training_texts
from pgolf_jax.data.tokenizer import Tokenizer
from pgolf_jax.data.tokenizer_training import train_tokenizer
from pgolf_jax.errors import UserError
from pgolf_jax.runtime.progress import progress

SHARD_TOKENS = 100_000_000  # as published
TOKENIZER_BYTES = 100_000_000  # of text to train a tokenizer on; more changes few pieces


@dataclasses.dataclass(frozen=True)
class Preparation:
  """What to prepare, and how. The same text and settings give the same files, whatever the number of workers.

  Attributes:
    train: the documents.
    val: documents to hold out from, if not the training documents.
    choice: which documents are held out.
    tokenizer: the tokenizer to use; None trains one.
    vocab_size: pieces of the tokenizer to train.
    is_caseops: whether the text is rewritten by CaseOps.
    shard_tokens: tokens of each shard but the last.
  """

  train: Documents
  val: Documents | None
  choice: Choice
  tokenizer: Tokenizer | None
  vocab_size: int
  is_caseops: bool = True
  shard_tokens: int = SHARD_TOKENS

  def __post_init__(self):
    if self.shard_tokens < 1:
      raise UserError(f"shards of {self.shard_tokens} tokens: give at least 1")
    if self.tokenizer is not None and self.tokenizer.vocab_size != self.vocab_size:
      raise UserError(
        f"a tokenizer of {self.tokenizer.vocab_size} pieces where {self.vocab_size} were asked for; "
        f"use another tokenizer or set the vocabulary size to {self.tokenizer.vocab_size}"
      )
    if self.is_caseops and self.tokenizer is not None and not self.tokenizer.has_caseops:
      raise UserError("this tokenizer has no pieces for the CaseOps markers; use another, or prepare without CaseOps")

  @property
  def held_out_from(self) -> Documents:
    return self.val or self.train

  @property
  def choice_in_train(self) -> Choice | None:
    """Which of the training documents are held out; None if validation has a file of its own."""
    return self.choice if self.val is None else None

  def settings(self) -> dict:
    """Everything that decides what the files will be."""
    return {
      "train": self.train.identity(),
      "val": self.val and self.val.identity(),
      "validation": dataclasses.asdict(self.choice),
      "text_transform": TRANSFORMS[self.is_caseops],
      "tokenizer": self.tokenizer and self.tokenizer.sha256,
      "vocab_size": self.vocab_size,
      "shard_tokens": self.shard_tokens,
    }


def prepare(folder: Path, preparation: Preparation, workers: int | None = None) -> Manifest:
  """Prepares `folder`, or finishes preparing it; does nothing if that has been done.

  Args:
    folder: where the shards, sidecar, tokenizer and manifest go; made if need be.
    preparation: what to prepare.
    workers: processes that tokenize; None for one per core.

  Raises:
    UserError: faulty text, or a folder that holds something else.
  """
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  with _alone_in(folder):
    settings = preparation.settings()
    manifest = Manifest.read(folder)
    if manifest is not None:
      _check_same(folder, manifest.settings, settings)
      _check_present(folder, manifest)
      (folder / JOURNAL).unlink(missing_ok=True)  # killed between the manifest and this, the last time
      return manifest
    modified = max(documents.modified() for documents in (preparation.train, preparation.held_out_from))
    journal = Journal.open(folder, settings, modified)
    held_out = HeldOut.collect(preparation.held_out_from, preparation.choice)
    tokenizer = _tokenizer(folder, preparation, held_out, journal)
    workers = workers or len(os.sched_getaffinity(0))
    for split in ("val", "train"):
      if not journal.splits[split].finished:
        _write_split(folder, split, preparation, tokenizer, held_out, journal, workers)
    manifest = Manifest(
      text_transform=TRANSFORMS[preparation.is_caseops],
      tokenizer_sha256=tokenizer.sha256,
      tokenizer_kind=tokenizer.kind,
      vocab_size=tokenizer.vocab_size,
      tokenizer_text_bytes=journal.tokenizer_text_bytes,
      validation=f"{preparation.choice.describe()} of {preparation.held_out_from.name}",
      validation_sha256=held_out.sha256,
      train=journal.splits["train"].done,
      val=journal.splits["val"].done,
      settings=settings,
    )
    manifest.write(folder)
    (folder / JOURNAL).unlink()
    return manifest


def _tokenizer(folder: Path, preparation: Preparation, held_out: HeldOut, journal: Journal) -> Tokenizer:
  """The tokenizer of `folder`: the one already there from before a kill, or the one given, or a new one."""
  path = folder / TOKENIZER
  if path.exists():
    return Tokenizer.load(path, preparation.vocab_size)
  tokenizer = preparation.tokenizer
  if tokenizer is None:
    texts = training_texts(preparation.train, preparation.choice_in_train, held_out, TOKENIZER_BYTES)
    journal.tokenizer_text_bytes = sum(len(text.encode()) for text in texts)
    coded = map(caseops.encode, texts) if preparation.is_caseops else texts
    tokenizer = train_tokenizer(coded, preparation.vocab_size, is_caseops=preparation.is_caseops)
    journal.save()
  partial = path.with_name(f"{path.name}.partial")
  partial.write_bytes(tokenizer.model)
  partial.replace(path)
  return tokenizer


def _write_split(
  folder: Path,
  split: str,
  preparation: Preparation,
  tokenizer: Tokenizer,
  held_out: HeldOut,
  journal: Journal,
  workers: int,
) -> None:
  """Writes the shards of `split` that are not there yet."""
  state = journal.splits[split]
  if split == "val":
    documents, encoder_held_out = preparation.held_out_from, None
    source = batches(documents, state.start, wanted=preparation.choice.includes, stop=preparation.choice.stop)
  else:
    documents, encoder_held_out = preparation.train, held_out.digests
    source = batches(documents, state.start, wanted=in_training(preparation.choice_in_train))
  encoder = Encoder(tokenizer, is_caseops=preparation.is_caseops, held_out=encoder_held_out)

  def save(state: SplitState) -> None:
    journal.splits[split] = state
    journal.save()

  writer = ShardWriter(folder, split, preparation.shard_tokens, state, save)
  what = {"val": "preparing validation", "train": "preparing training text"}[split]
  with (
    progress(what, total=documents.size, unit="B") as bar,
    contextlib.closing(encode_all(encoder, source, workers)) as results,
  ):
    read = 0
    for encoded in results:
      writer.add(encoded)
      bar.advance(encoded.read - read)
      read = encoded.read
  writer.finish()


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
  """Waits until no other process prepares `folder`, and keeps others out meanwhile."""
  handle = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield
  finally:
    os.close(handle)


def _check_same(folder: Path, there: dict, asked: dict) -> None:
  different = [name for name in asked if there.get(name) != asked[name]]
  if different:
    raise UserError(
      f"{folder}: already holds data of another preparation (it differs in {', '.join(different)}); "
      "choose another folder or delete this one"
    )


def _check_present(folder: Path, manifest: Manifest) -> None:
  for file in manifest.files():
    if read_count(folder / file.name) != file.tokens:
      raise UserError(f"{folder / file.name}: not as {MANIFEST} has it; delete {folder} and prepare it again")
