"""Preparing a data folder: documents → tokenizer → validation shards and sidecar → training shards → manifest.

A journal in the folder records which shards are finished and where in the corpus the next one begins, so that a
preparation that was killed continues there and ends with the same files.
"""

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pgolf_jax.data import caseops
from pgolf_jax.data.caseops import Markers
from pgolf_jax.data.corpus import Corpus, HeldOutDocuments, Holdout, in_training, read_batches, training_texts
from pgolf_jax.data.encode import EncodedBatch, Encoder, encode_all
from pgolf_jax.data.manifest import (
  JOURNAL,
  MANIFEST,
  TOKENIZER,
  TRANSFORMS,
  File,
  Journal,
  Manifest,
  SplitProgress,
  sha256_of,
)
from pgolf_jax.data.shards import read_count, shard_path, write_shard
from pgolf_jax.data.tokenizer import Tokenizer, train_tokenizer
from pgolf_jax.errors import UserError
from pgolf_jax.runtime.files import remove_partials, replacing
from pgolf_jax.runtime.log import log, progress
from pgolf_jax.runtime.memory import cores

SHARD_TOKENS = 100_000_000  # as published
TOKENIZER_BYTES = 100_000_000  # of text to train a tokenizer on; more text changes few pieces


@dataclasses.dataclass(frozen=True)
class Preparation:
  """What to prepare, and how. The same text and settings give the same files, whatever the number of workers.

  Attributes:
    train: the documents.
    val: documents from which some are held out, if not from the training documents.
    holdout: which documents are held out.
    tokenizer: the tokenizer to use; None trains one.
    vocab_size: pieces of the tokenizer to train.
    markers: where CaseOps puts them.
    shard_tokens: tokens of each shard but the last.
  """

  train: Corpus
  val: Corpus | None
  holdout: Holdout
  tokenizer: Tokenizer | None
  vocab_size: int
  markers: Markers = "published"
  shard_tokens: int = SHARD_TOKENS

  def __post_init__(self):
    if self.shard_tokens < 1:
      raise UserError(f"--shard-tokens {self.shard_tokens} must be 1 or more")
    if self.tokenizer is not None and self.tokenizer.vocab_size != self.vocab_size:
      raise UserError(
        f"a tokenizer of {self.tokenizer.vocab_size} pieces where {self.vocab_size} were asked for; "
        f"use another tokenizer or set the vocabulary size to {self.tokenizer.vocab_size}"
      )
    if self.markers != "none" and self.tokenizer is not None and not self.tokenizer.has_caseops:
      raise UserError("this tokenizer has no pieces for the CaseOps markers; use another, or prepare without CaseOps")

  @property
  def held_out_from(self) -> Corpus:
    """The corpus from which documents are held out."""
    return self.val or self.train

  @property
  def holdout_in_train(self) -> Holdout | None:
    """Which of the training documents are held out; None if validation comes from another corpus."""
    return self.holdout if self.val is None else None

  def settings(self) -> dict:
    """Returns everything that decides what the files will be."""
    return {
      "train": self.train.identity(),
      "val": self.val and self.val.identity(),
      "validation": dataclasses.asdict(self.holdout),
      "text_transform": TRANSFORMS[self.markers],
      "tokenizer": self.tokenizer and self.tokenizer.sha256,
      "vocab_size": self.vocab_size,
      "shard_tokens": self.shard_tokens,
    }


def prepare(folder: Path, preparation: Preparation, workers: int | None = None) -> Manifest:
  """Prepares `folder`, or finishes preparing it; does nothing if that has been done.

  Args:
    folder: where the shards, sidecar, tokenizer and manifest go; made if it does not exist.
    preparation: what to prepare.
    workers: processes that tokenize; None for one per core.

  Raises:
    UserError: the text is faulty, or the folder holds something else.
  """
  if workers is not None and workers < 0:
    raise UserError(f"--workers {workers} must be 1 or more")
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  with _alone_in(folder):
    settings = preparation.settings()
    manifest = Manifest.read(folder)
    if manifest is not None:
      _check_same(folder, manifest.settings, settings)
      _check_present(folder, manifest)
      (folder / JOURNAL).unlink(missing_ok=True)  # left by a kill between writing the manifest and deleting this
      return manifest
    remove_partials(folder)
    modified = max(corpus.modified() for corpus in (preparation.train, preparation.held_out_from))
    journal = Journal.open(folder, settings, modified)
    try:
      return _prepare(folder, preparation, journal, workers or cores())
    except Exception:
      journal.discard()  # so that the corrected command finds nothing in its way
      with contextlib.suppress(OSError):  # something is in it
        folder.rmdir()
      raise


def _prepare(folder: Path, preparation: Preparation, journal: Journal, workers: int) -> Manifest:
  settings = preparation.settings()
  held_out = HeldOutDocuments.collect(preparation.held_out_from, preparation.holdout)
  tokenizer = _tokenizer(folder, preparation, held_out, journal)
  encoding = _Encoding(folder, preparation, tokenizer, held_out, workers)
  for split in ("val", "train"):
    if not journal.splits[split].finished:
      _write_split(split, encoding, journal)
  manifest = Manifest(
    text_transform=TRANSFORMS[preparation.markers],
    tokenizer_sha256=tokenizer.sha256,
    tokenizer_kind=tokenizer.kind,
    vocab_size=tokenizer.vocab_size,
    tokenizer_text_bytes=journal.tokenizer_text_bytes,
    validation=f"{preparation.holdout.describe()} of {preparation.held_out_from.name}",
    validation_sha256=held_out.sha256,
    train=journal.splits["train"].done,
    val=journal.splits["val"].done,
    settings=settings,
  )
  manifest.write(folder)
  journal.delete()
  return manifest


def _tokenizer(folder: Path, preparation: Preparation, held_out: HeldOutDocuments, journal: Journal) -> Tokenizer:
  """Returns the tokenizer of `folder`, which is written there first if a killed preparation has not done so."""
  path = folder / TOKENIZER
  if path.exists():
    return Tokenizer.load(path, preparation.vocab_size)
  tokenizer = preparation.tokenizer
  if tokenizer is None:
    with progress("training the tokenizer"):
      texts = training_texts(preparation.train, preparation.holdout_in_train, held_out, TOKENIZER_BYTES)
      journal.tokenizer_text_bytes = sum(len(text.encode()) for text in texts)
      coded = (caseops.encode(text, preparation.markers) for text in texts)
      tokenizer = train_tokenizer(coded, preparation.vocab_size, is_caseops=preparation.markers != "none")
    journal.save()
  with replacing(path, is_durable=True) as partial:
    partial.write_bytes(tokenizer.model)
  return tokenizer


class _Encoding(NamedTuple):
  """What encoding either split needs."""

  folder: Path
  preparation: Preparation
  tokenizer: Tokenizer
  held_out: HeldOutDocuments
  workers: int


def _write_split(split: str, encoding: _Encoding, journal: Journal) -> None:
  """Writes the shards of `split` that the journal does not have yet."""
  folder, preparation, tokenizer, held_out, workers = encoding
  begun = journal.splits[split]
  if split == "val":
    corpus, left_out, holdout = preparation.held_out_from, None, preparation.holdout
    batches = read_batches(corpus, begun.start, wanted=holdout.includes, stop=holdout.stop)
  else:
    corpus, left_out = preparation.train, held_out.digests
    batches = read_batches(corpus, begun.start, wanted=in_training(preparation.holdout_in_train))
  encoder = Encoder(tokenizer, markers=preparation.markers, held_out=left_out)

  def save(progress: SplitProgress) -> None:
    journal.splits[split] = progress
    journal.save()

  writer = ShardWriter(folder, split, preparation.shard_tokens, begun, save)
  what = {"val": "preparing validation", "train": "preparing training text"}[split]
  with (
    progress(what, total=corpus.size, unit="B") as bar,
    contextlib.closing(encode_all(encoder, batches, workers)) as encoded_batches,
  ):
    bytes_read = 0
    for encoded in encoded_batches:
      writer.add(encoded)
      bar.advance(encoded.bytes_read - bytes_read)
      bytes_read = encoded.bytes_read
  writer.finish()


class ShardWriter:
  """Cuts encoded documents, laid end to end, into shards of a fixed number of tokens, as published.

  Args:
    folder: where shards go.
    split: "train" or "val"; the latter has a sidecar.
    shard_tokens: tokens of a shard.
    begun: how much of the split is written.
    save: called with the new progress whenever a shard is on disk.
  """

  def __init__(
    self, folder: Path, split: str, shard_tokens: int, begun: SplitProgress, save: Callable[[SplitProgress], None]
  ):
    self._folder, self._split, self._save = folder, split, save
    self._begun = begun
    self._totals = begun.done  # counts of all documents added, and the files that are on disk
    self._skip = begun.skip
    self._fill = 0
    self._buffers = {split: np.empty(shard_tokens, np.uint16)}
    if split == "val":
      self._buffers["val_bytes"] = np.empty(shard_tokens, np.uint16)

  def add(self, encoded: EncodedBatch) -> None:
    """Appends a batch and writes every shard that it fills."""
    before = self._totals
    counted = 0 if encoded.bytes_N is None else int(encoded.bytes_N.sum(dtype=np.int64))
    self._totals = dataclasses.replace(
      before,
      documents=before.documents + encoded.documents,
      text_bytes=before.text_bytes + encoded.text_bytes,
      counted_bytes=before.counted_bytes + counted,
      duplicates=before.duplicates + encoded.duplicates,
    )
    at, self._skip = self._skip, 0
    capacity = self._buffers[self._split].size
    while at < encoded.tokens_N.size:
      n = min(capacity - self._fill, encoded.tokens_N.size - at)
      for split, buffer in self._buffers.items():
        values_N = encoded.bytes_N if split == "val_bytes" else encoded.tokens_N
        buffer[self._fill : self._fill + n] = values_N[at : at + n]
      at += n
      self._fill += n
      if self._fill == capacity:
        self._flush()
        on_disk = dataclasses.replace(before, shards=self._totals.shards, sidecar=self._totals.sidecar)
        self._save(SplitProgress(on_disk, encoded.start, at))

  def finish(self) -> None:
    """Writes the remaining tokens as a last, shorter shard.

    Raises:
      UserError: no document was added.
    """
    if not self._totals.documents:
      raise UserError(f"no document is left for {self._split}; hold out fewer, or give more text")
    if self._fill:
      self._flush()
    self._save(dataclasses.replace(self._begun, done=self._totals, finished=True))

  def _flush(self) -> None:
    index = len(self._totals.shards)
    files = {}
    for split, buffer in self._buffers.items():
      path = shard_path(self._folder, split, index)
      write_shard(path, buffer[: self._fill])
      files[split] = File(path.name, self._fill, sha256_of(path))
    sidecar = (files["val_bytes"],) if "val_bytes" in files else ()
    self._totals = dataclasses.replace(
      self._totals,
      shards=(*self._totals.shards, files[self._split]),
      sidecar=(*self._totals.sidecar, *sidecar),
    )
    self._fill = 0


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
  """Waits until no other process prepares `folder`, and makes others wait during the block."""
  handle = os.open(folder, os.O_RDONLY)
  try:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      log.info("%s: another process prepares this folder; waiting for it", folder)
      with progress("waiting for another process"):
        fcntl.flock(handle, fcntl.LOCK_EX)
    yield
  finally:
    os.close(handle)


def _check_same(folder: Path, prepared: dict, asked: dict) -> None:
  different = [name for name in asked if prepared.get(name) != asked[name]]
  if different:
    raise UserError(
      f"{folder}: already holds data of another preparation (it differs in {', '.join(different)}); "
      "choose another folder or delete this one"
    )


def _check_present(folder: Path, manifest: Manifest) -> None:
  for file in manifest.files():
    if read_count(folder / file.name) != file.tokens:
      raise UserError(
        f"{folder / file.name}: its number of tokens is not that in {MANIFEST}; delete {folder} and prepare it again"
      )
