"""Which documents are held out for validation, and what keeps them, and their copies, out of training."""

import dataclasses
import hashlib
from collections.abc import Callable

from pgolf_jax.data.corpus import Corpus, Position, read_batches
from pgolf_jax.errors import UserError
from pgolf_jax.runtime.log import progress


@dataclasses.dataclass(frozen=True)
class Holdout:
  """The rule that holds out the first `count` (None: all) of every `every`-th document of a corpus."""

  count: int | None
  every: int = 1

  def __post_init__(self):
    if self.every < 1 or (self.count is not None and self.count < 1):
      raise UserError(f"validation of {self.count} documents, one in {self.every}: both must be at least 1")

  def includes(self, document: int) -> bool:
    """Tells whether the document of this number, from 0, is held out."""
    number, rest = divmod(document + 1, self.every)
    return rest == 0 and (self.count is None or number <= self.count)

  @property
  def stop(self) -> int | None:
    """Number of the document from which on none is held out; None where there may be one anywhere."""
    return None if self.count is None else self.count * self.every

  def describe(self) -> str:
    """Returns the rule in words."""
    which = "all documents" if self.count is None else f"the first {self.count} documents"
    return which if self.every == 1 else f"{which} of those numbered {self.every}, {2 * self.every}, … (from 1)"


def in_training(holdout: Holdout | None) -> Callable[[int], bool]:
  """Returns a function that tells of a document's number whether the rule leaves it for training.

  Args:
    holdout: rule for the training corpus; None if validation comes from another corpus.
  """
  return lambda document: holdout is None or not holdout.includes(document)


def digest(text: bytes) -> bytes:
  """Returns the SHA-256 of a document's UTF-8 text, by which its copies are recognised."""
  return hashlib.sha256(text).digest()


@dataclasses.dataclass(frozen=True)
class HeldOutDocuments:
  """The documents held out for validation, by digest."""

  digests: frozenset[bytes]
  sha256: str  # of the digests in order

  @classmethod
  def collect(cls, corpus: Corpus, holdout: Holdout) -> "HeldOutDocuments":
    """Reads the documents that `holdout` names.

    Raises:
      UserError: there are fewer of them than `holdout.count`, or one of them is faulty.
    """
    ordered = []
    with progress("reading validation documents", total=corpus.size, unit="B") as bar:
      bytes_read = 0
      for batch in read_batches(corpus, Position(), wanted=holdout.includes, stop=holdout.stop):
        ordered.extend(digest(document.text().encode()) for document in batch.documents)
        bar.advance(batch.bytes_read - bytes_read)
        bytes_read = batch.bytes_read
    if not ordered or (holdout.count is not None and len(ordered) < holdout.count):
      raise UserError(
        f"{corpus.name}: {len(ordered)} documents to hold out where {holdout.count or 'some'} were asked for; "
        "ask for fewer or give more documents"
      )
    return cls(frozenset(ordered), hashlib.sha256(b"".join(ordered)).hexdigest())


def training_texts(corpus: Corpus, holdout: Holdout | None, held_out: HeldOutDocuments, limit: int) -> list[str]:
  """Returns training documents from the start of a corpus, until they have at least `limit` bytes in all.

  Args:
    corpus: the training corpus.
    holdout: rule for this corpus; None if validation comes from another one.
    held_out: the validation documents, whose copies are left out too.
    limit: bytes of UTF-8.

  Raises:
    UserError: no document is left, or one of them is faulty.
  """
  texts, size = [], 0
  for batch in read_batches(corpus, Position(), wanted=in_training(holdout)):
    for document in batch.documents:
      text = document.text()
      utf8 = text.encode()
      if digest(utf8) in held_out.digests:
        continue
      texts.append(text)
      size += len(utf8)
      if size >= limit:
        return texts
  if not texts:
    raise UserError(f"{corpus.name}: no document is left for training; hold out fewer")
  return texts
