"""Which documents are held out for validation, and how they are kept out of training."""

import dataclasses
import hashlib
from collections.abc import Callable

from pgolf_jax.data.documents import Documents, Position, batches
from pgolf_jax.errors import UserError
from pgolf_jax.runtime.progress import progress


@dataclasses.dataclass(frozen=True)
class Choice:
  """The documents of a stream that are held out: the first `count` of every `every`-th; all of these for None."""

  count: int | None
  every: int = 1

  def __post_init__(self):
    if self.every < 1 or (self.count is not None and self.count < 1):
      raise UserError(f"validation of {self.count} documents, one in {self.every}: both must be at least 1")

  def includes(self, document: int) -> bool:
    number, rest = divmod(document + 1, self.every)
    return rest == 0 and (self.count is None or number <= self.count)

  @property
  def stop(self) -> int | None:
    """Number of documents after which no further one is chosen, if known."""
    return None if self.count is None else self.count * self.every

  def describe(self) -> str:
    which = "all documents" if self.count is None else f"the first {self.count} documents"
    return which if self.every == 1 else f"{which} of those numbered {self.every}, {2 * self.every}, … (from 1)"


def in_training(choice: Choice | None) -> Callable[[int], bool]:
  """Whether a document, by its number, is left for training; `choice` is None if validation comes from elsewhere."""
  return lambda document: choice is None or not choice.includes(document)


def digest(text: bytes) -> bytes:
  """What a document is known by: the SHA-256 of its UTF-8 text."""
  return hashlib.sha256(text).digest()


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """The documents held out for validation, by digest."""

  digests: frozenset[bytes]
  count: int
  sha256: str  # of their digests in order

  @classmethod
  def collect(cls, documents: Documents, choice: Choice) -> "HeldOut":
    """Reads the documents that `choice` names.

    Raises:
      UserError: there are fewer than the choice asks for, or one of them is faulty.
    """
    ordered = []
    with progress("reading validation documents", total=documents.size, unit="B") as bar:
      read = 0
      for batch in batches(documents, Position(), wanted=choice.includes, stop=choice.stop):
        ordered.extend(digest(record.text().encode()) for record in batch.records)
        bar.advance(batch.read - read)
        read = batch.read
    if not ordered or (choice.count is not None and len(ordered) < choice.count):
      raise UserError(
        f"{documents.name}: {len(ordered)} documents to hold out where {choice.count or 'some'} were asked for; "
        "ask for fewer or give more documents"
      )
    return cls(frozenset(ordered), len(ordered), hashlib.sha256(b"".join(ordered)).hexdigest())


def training_texts(documents: Documents, choice: Choice | None, held_out: HeldOut, limit: int) -> list[str]:
  """Training documents from the start of the stream, up to `limit` bytes in all (at least one document).

  Args:
    documents: the stream.
    choice: which of its documents are held out; None if they come from elsewhere.
    held_out: the validation documents, no copy of which is returned either.
    limit: bytes of UTF-8.
  """
  texts, size = [], 0
  for batch in batches(documents, Position(), wanted=in_training(choice)):
    for record in batch.records:
      text = record.text()
      if digest(text.encode()) in held_out.digests:
        continue
      texts.append(text)
      size += len(text.encode())
      if size >= limit:
        return texts
  if not texts:
    raise UserError(f"{documents.name}: no document is left for training; hold out fewer")
  return texts
