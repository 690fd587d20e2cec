"""Cutting a stream of encoded documents into shards."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pgolf_jax.data.encoding import Encoded
from pgolf_jax.data.journal import SplitState
from pgolf_jax.data.manifest import File, Split, sha256_of
from pgolf_jax.data.shards import shard_path, write_shard
from pgolf_jax.errors import UserError


class ShardWriter:
  """Fills shards of a fixed number of tokens; documents run on from one into the next, as published."""

  def __init__(
    self, folder: Path, split: str, shard_tokens: int, state: SplitState, save: Callable[[SplitState], None]
  ):
    """Goes on from `state`.

    Args:
      folder: where shards go.
      split: "train" or "val"; the latter has a sidecar.
      shard_tokens: tokens of a shard.
      state: how far the split is.
      save: called with the new state whenever a shard is on disk.
    """
    self._folder, self._split, self._save = folder, split, save
    self._state = state
    self._totals = state.done  # of all documents added; its files are those on disk
    self._skip = state.skip
    self._fill = 0
    self._buffers = {split: np.empty(shard_tokens, np.uint16)}
    if split == "val":
      self._buffers["val_bytes"] = np.empty(shard_tokens, np.uint16)

  def add(self, encoded: Encoded) -> None:
    """Appends a batch, writing every shard that it fills."""
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
    room = self._buffers[self._split].size
    while at < encoded.tokens_N.size:
      n = min(room - self._fill, encoded.tokens_N.size - at)
      for split, values_N in self._streams(encoded):
        self._buffers[split][self._fill : self._fill + n] = values_N[at : at + n]
      at += n
      self._fill += n
      if self._fill == room:
        self._flush()
        on_disk = dataclasses.replace(before, shards=self._totals.shards, sidecar=self._totals.sidecar)
        self._save(SplitState(on_disk, encoded.start, at))

  def finish(self) -> None:
    """Writes what is left as a last, shorter shard.

    Raises:
      UserError: there was no document at all.
    """
    if not self._totals.documents:
      raise UserError(f"no document is left for {self._split}; hold out fewer, or give more text")
    if self._fill:
      self._flush()
    self._save(dataclasses.replace(self._state, done=self._totals, finished=True))

  def _streams(self, encoded: Encoded):
    yield self._split, encoded.tokens_N
    if self._split == "val":
      yield "val_bytes", encoded.bytes_N

  def _flush(self) -> None:
    index = len(self._totals.shards)
    files = []
    for split, buffer in self._buffers.items():
      path = shard_path(self._folder, split, index)
      write_shard(path, buffer[: self._fill])
      files.append((File(path.name, self._fill, sha256_of(path)),))
    shards, sidecar = files[0], files[1] if self._split == "val" else ()
    self._totals: Split = dataclasses.replace(
      self._totals, shards=self._totals.shards + shards, sidecar=self._totals.sidecar + sidecar
    )
    self._fill = 0
