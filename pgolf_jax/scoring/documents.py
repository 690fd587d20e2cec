"""Documents of the validation stream, the batches in which they are scored, and their rows on the devices.

Recipe section 5.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Integer, Shaped

from pgolf_jax.data.shards import ValidationData
from pgolf_jax.errors import UserError
from pgolf_jax.settings import TTTConfig


class Document(NamedTuple):
  """A document: its bos, its text, and the bos that follows it as the last target."""

  index: int  # in stream order
  start: int  # position of its bos in the stream
  length: int  # tokens, both bos counted

  @property
  def targets(self) -> int:
    """Number of targets: positions start + 1 … start + length − 1 of the stream."""
    return self.length - 1

  @property
  def target_slice(self) -> slice:
    """Where its targets stand among the stream's: target i is token i + 1."""
    return slice(self.start, self.start + self.length - 1)


class Batch(NamedTuple):
  """Documents whose adapters move in step."""

  index: int  # 0 holds the shortest documents
  documents: tuple[Document, ...]  # from shorter to longer
  learns: tuple[bool, ...]  # whether each document moves its adapters and takes part in the global phases
  chunk_size: int  # targets between two updates
  is_short: bool  # whether it takes the adapters of short documents

  @property
  def targets(self) -> int:
    """Targets of all its documents."""
    return sum(document.targets for document in self.documents)

  @property
  def longest(self) -> int:
    """Tokens of the longest document, both bos counted."""
    return self.documents[-1].length


def find_documents(tokens_N1: Integer[np.ndarray, "N1"], bos_id: int) -> list[Document]:
  """Returns the documents of a stream; the last one ends where the stream ends.

  Raises:
    UserError: the stream does not begin with bos, so that some targets would belong to no document.
  """
  tokens_N1 = np.asarray(tokens_N1)
  starts = np.flatnonzero(tokens_N1 == bos_id)
  if not len(starts) or starts[0] != 0:
    first = f"its first bos is at position {starts[0]}" if len(starts) else "it has no bos"
    raise UserError(
      f"The validation stream begins with token {tokens_N1[:1]} at position 0, not with bos={bos_id} ({first}); "
      "prepare it again."
    )
  ends = np.append(starts[1:] + 1, len(tokens_N1))
  documents = [Document(i, int(s), int(e - s)) for i, (s, e) in enumerate(zip(starts, ends, strict=True))]
  # A stream may end with the bos of a document that is missing; that bos is the last target.
  return documents if documents[-1].targets else documents[:-1]


def sum_by_document(data: ValidationData, bos_id: int, x_N: Shaped[np.ndarray, "N"]) -> Float64[np.ndarray, "n"]:
  """Returns for each document of a stream the sum over its targets."""
  starts = [document.start for document in find_documents(data.tokens, bos_id)]
  return np.add.reduceat(np.asarray(x_N, np.float64), starts)


def first_documents(data: ValidationData, count: int | None, bos_id: int) -> ValidationData:
  """Returns the first documents of a stream and the bos that follows them, or the whole stream without a count.

  Raises:
    UserError: the stream has fewer documents.
  """
  if count is None:
    return data
  documents = find_documents(data.tokens, bos_id)
  if not 0 < count <= len(documents):
    raise UserError(f"There are {len(documents)} validation documents; ask for 1 to {len(documents)}, not {count}.")
  last = documents[count - 1]
  return ValidationData(*(x[: last.start + last.length] for x in data))


def select(documents: list[Document], fraction: float, seed: int) -> list[Document]:
  """Returns all documents, or a share of them, drawn with Python's generator as the reference draws it."""
  if fraction >= 1:
    return documents
  count = max(1, round(len(documents) * fraction))
  return [documents[i] for i in sorted(random.Random(seed).sample(range(len(documents)), count))]


def batches(ttt: TTTConfig, documents: Sequence[Document]) -> list[Batch]:
  """Cuts documents into batches, in the order in which they are scored.

  They are sorted by length and cut from the short end; the batch of the longest comes first, or the one of the
  shortest where `ttt.eval_batches` asks for reports on the way.
  """
  by_length = sorted(documents, key=lambda d: d.length)
  firsts = range(0, len(by_length), ttt.batch_size)
  cut = [_batch(ttt, i, by_length[first : first + ttt.batch_size]) for i, first in enumerate(firsts)]
  return cut if ttt.eval_batches else sorted(cut, key=lambda batch: -batch.longest)


def _batch(ttt: TTTConfig, index: int, documents: list[Document]) -> Batch:
  longest = documents[-1].length
  return Batch(
    index=index,
    documents=tuple(documents),
    learns=tuple(_learns(ttt, document) for document in documents),
    chunk_size=_chunk_size(ttt, longest),
    is_short=ttt.short.lora and longest <= ttt.short.doc_len,
  )


def _chunk_size(ttt: TTTConfig, longest: int) -> int:
  """Targets between two updates, for a batch whose longest document has this many tokens."""
  short = ttt.short
  if not short.score_first:
    return ttt.chunk_size
  if short.score_first_steps:
    return next((size for length, size in sorted(short.score_first_steps) if longest <= length), ttt.chunk_size)
  return short.chunk_size if longest <= short.doc_len and short.chunk_size > 0 else ttt.chunk_size


def _learns(ttt: TTTConfig, document: Document) -> bool:
  shortest, longest = ttt.lora.train_min_doc_len, ttt.lora.train_max_doc_len
  return (shortest <= 0 or document.length >= shortest) and (longest <= 0 or document.length <= longest)


def phase_boundaries(prefix_docs: int, phases: int, documents: int) -> list[int]:
  """Numbers of scored documents after which a global phase runs; fewer than one phase counts as one."""
  prefix, phases = max(0, min(documents, prefix_docs)), max(1, phases)
  return [prefix * k // phases for k in range(1, phases + 1)] if prefix else []


class Chains(NamedTuple):
  """Chains of batches, each with adapters of its own: batch i in the order of scoring is of chain i mod `count`."""

  count: int
  width: int  # batches that run side by side

  @classmethod
  def choose(cls, ttt: TTTConfig, world: int, devices: int) -> "Chains":
    """Returns the chains that the settings ask for.

    Args:
      world: ranks, each of which is a chain unless the settings say otherwise. A mean of earlier batches' adapters, to
        start from, makes one chain of all.
    """
    count = 1 if ttt.lora.warm_start_mean else ttt.chains or world
    # One batch's windows, computed afresh, fill a device; chunks alone do not.
    return cls(count, min(count, devices) if ttt.method == "exact" else count)

  def among(self, batches: int) -> "Chains":
    """Returns those that so many batches can fill."""
    return Chains(min(self.count, batches), min(self.width, batches))


class Round(NamedTuple):
  """Batches that run side by side, each of another chain, with chunks of one size and adapters of one kind."""

  batches: tuple[Batch, ...]
  places: tuple[int, ...]  # which of the `width` batches of a full round each is
  width: int
  group: int  # rounds of one group have the same chains

  @property
  def documents(self) -> list[Document]:
    """Documents of its batches, end to end."""
    return [document for batch in self.batches for document in batch.documents]

  @property
  def place_n(self) -> Int[np.ndarray, "n"]:
    """Returns where each document stands if batches are dealt out in turn, each from its longest document down."""
    counts = [len(batch.documents) for batch in self.batches]
    return deal(dict(zip(self.places, counts, strict=True)), self.width)

  def by_document(self, of_batch: Callable[[Batch], object]) -> np.ndarray:
    """Returns a batch's value, or its documents' values, for each document."""
    return np.concatenate([np.broadcast_to(of_batch(batch), len(batch.documents)) for batch in self.batches])

  @property
  def chunk_size(self) -> int:
    """Targets between two updates."""
    return self.batches[0].chunk_size

  @property
  def is_short(self) -> bool:
    """Whether it takes the adapters of short documents."""
    return self.batches[0].is_short


def deal(counts: Mapping[int, int], width: int) -> Int[np.ndarray, "n"]:
  """Returns where documents stand if batches are dealt out in turn, each from its last document down.

  Args:
    counts: place among `width` batches → documents of the batch.
  """
  return np.concatenate([np.arange(count)[::-1] * width + at for at, count in counts.items()])


def rounds(batches: Sequence[Batch], chains: Chains) -> list[Round]:
  """Puts neighbours that can run side by side into rounds."""
  result, last = [], None
  for index, batch in enumerate(batches):
    turn, chain = divmod(index, chains.count)
    group, place = divmod(chain, chains.width)
    kind = (turn, group, batch.chunk_size, batch.is_short)
    before = result.pop() if kind == last else Round((), (), chains.width, group)
    result.append(before._replace(batches=(*before.batches, batch), places=(*before.places, place)))
    last = kind
  return result


class Layout(NamedTuple):
  """Which row of which device holds which document of a round.

  Places are dealt out to the devices in turn: place i is in slot i // devices of device i % devices. So the rows that
  are still at work are the first of every device, and all devices have as many, give or take one. Where the devices
  divide a round's width, each has batches of its own. Arrays hold all slots of the first device, then those of the
  second, and so on.
  """

  devices: int
  slots: int  # rows on each device

  @property
  def rows(self) -> int:
    """Rows on all devices."""
    return self.devices * self.slots

  def slot_of_rows(self) -> Int[np.ndarray, "rows"]:
    """Returns the slot of each row on its device."""
    return np.arange(self.rows) % self.slots

  def place_of_rows(self) -> Int[np.ndarray, "rows"]:
    """Returns the place that each row is for: the inverse of `rows_of`."""
    return self.slot_of_rows() * self.devices + np.arange(self.rows) // self.slots

  def rows_of(self, place_n: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """Returns the row of each place."""
    return place_n % self.devices * self.slots + place_n // self.devices

  def documents_in(self, place_n: Int[np.ndarray, "n"]) -> Int[np.ndarray, "rows"]:
    """Returns which of the documents at these places is in each row; −1 in rows without one."""
    held = np.full(self.rows, -1)
    inside = np.flatnonzero(place_n < self.rows)
    held[self.rows_of(place_n[inside])] = inside
    return held

  def to_rows(self, x_n: np.ndarray, place_n: Int[np.ndarray, "n"], axis: int = 0) -> np.ndarray:
    """Returns the entries of documents in their rows, and 0 in the others."""
    shape = (*x_n.shape[:axis], self.rows, *x_n.shape[axis + 1 :])
    x_rows = np.zeros(shape, x_n.dtype)
    np.moveaxis(x_rows, axis, 0)[self.rows_of(place_n)] = np.moveaxis(x_n, axis, 0)
    return x_rows
