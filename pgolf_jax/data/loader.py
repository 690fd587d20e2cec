"""The training stream: consecutive spans of the training shards, one for each rank. Recipe section 1."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt16

from pgolf_jax.data.shards import list_shards, read_shard
from pgolf_jax.errors import UserError
from pgolf_jax.runtime.log import log


class Loader:
  """Reads micro-batches of `world_size` spans of n + 1 tokens each.

  The shards are read in name order, each from its first bos. A micro-batch never crosses the end of a shard: it then
  begins in the next shard, after the last in the first. The whole state is (shard index, cursor).

  Args:
    folder: holds `fineweb_train_*.bin`.
    world_size: number of ranks, each of which is given one span of a micro-batch.
    row_tokens: n, the number of inputs of a span.
    bos_id: the token that starts a document.
    vocab_size: of the model, below which all tokens must be.

  Raises:
    UserError: there are no shards, or one gives no micro-batch because no document starts in it or it is too short. The
      last of several, which has what was left over, is then left out.
  """

  def __init__(self, folder: str | Path, *, world_size: int, row_tokens: int, bos_id: int = 1, vocab_size: int = 2**16):
    self._paths = list_shards(Path(folder), "train")
    self.world_size = world_size
    self._span = row_tokens + 1
    self._bos_id, self._vocab_size = bos_id, vocab_size
    try:
      for index in range(len(self._paths)):
        self._open(index)
    except _NoMicroBatch as fault:
      if not 0 < index == len(self._paths) - 1:
        raise
      log.info("The last training shard is left out. %s", fault)
      self._paths.pop()
    self._open(0)

  def _open(self, index: int) -> None:
    path = self._paths[index]
    self._tokens = read_shard(path)
    self._index = index
    self._cursor = _first(self._tokens, self._bos_id)
    if self._cursor is None:
      raise _NoMicroBatch(
        f"{path}: no document starts in this shard (no token {self._bos_id}); prepare the data again, in larger shards."
      )
    if self._cursor + self.world_size * self._span > len(self._tokens):
      raise _NoMicroBatch(
        f"{path}: {len(self._tokens)} tokens are too few for one micro-batch of {self.world_size} × {self._span}; "
        "use larger shards or a smaller train.batch_tokens."
      )

  def _advance(self) -> int:
    """Moves past the next micro-batch and returns where it begins."""
    need = self.world_size * self._span
    if self._cursor + need > len(self._tokens):
      self._open((self._index + 1) % len(self._paths))
    begin = self._cursor
    self._cursor += need
    return begin

  def micro_batch(self) -> UInt16[np.ndarray, "world span"]:
    """Reads the next micro-batch; row r is rank r's span, its first n tokens inputs and its last n targets.

    Raises:
      UserError: a token lies outside the vocabulary.
    """
    begin = self._advance()
    rows = np.asarray(self._tokens[begin : begin + self.world_size * self._span])
    if (highest := int(rows.max())) >= self._vocab_size:
      raise UserError(
        f"{self._paths[self._index]} holds token {highest}, but model.vocab_size={self._vocab_size}; set it to that of "
        "the data's tokenizer."
      )
    return rows.reshape(self.world_size, self._span)

  def skip(self, micro_batches: int) -> None:
    """Skips micro-batches without reading them."""
    for _ in range(micro_batches):
      self._advance()

  def step(self, accumulation: int) -> UInt16[np.ndarray, "rows span"]:
    """Reads the micro-batches of one step, [world·accumulation, n + 1], the rows of a rank next to each other."""
    rows = np.stack([self.micro_batch() for _ in range(accumulation)], axis=1)
    return rows.reshape(-1, self._span)

  def state(self) -> dict[str, int]:
    """Returns the place in the stream, for `restore`."""
    return {"shard": self._index, "cursor": self._cursor}

  def restore(self, state: dict[str, int]) -> None:
    """Continues at the place that `state` returned.

    Raises:
      UserError: the shards are not those of that state.
    """
    index, cursor = int(state["shard"]), int(state["cursor"])
    if index >= len(self._paths):
      raise UserError(f"The checkpoint is at training shard {index}, but there are only {len(self._paths)} shards.")
    self._open(index)
    if not self._cursor <= cursor <= len(self._tokens):
      raise UserError(
        f"The checkpoint is at token {cursor} of {self._paths[index]}, which has {len(self._tokens)} tokens."
      )
    self._cursor = cursor


class _NoMicroBatch(UserError):
  """A shard from which no micro-batch can be read."""


def _first(tokens: np.ndarray, value: int) -> int | None:
  block = 1 << 20
  for begin in range(0, len(tokens), block):
    matches = np.flatnonzero(tokens[begin : begin + block] == value)
    if matches.size:
      return begin + int(matches[0])
  return None
