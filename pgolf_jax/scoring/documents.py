"""Documents of the validation stream, and the batches in which test-time training takes them. Recipe section 5."""

import random
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer

from pgolf_jax.errors import UserError


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

  @property
  def longest(self) -> int:
    """Tokens of the longest document, both bos counted."""
    return self.documents[-1].length


def find_documents(tokens_N1: Integer[np.ndarray, "N1"], bos_id: int) -> list[Document]:
  """The documents of a stream; the last one ends where the stream ends.

  Raises:
    UserError: the stream does not begin with bos, so that some targets would belong to no document.
  """
  tokens_N1 = np.asarray(tokens_N1)
  starts = np.flatnonzero(tokens_N1 == bos_id)
  if not len(starts) or starts[0] != 0:
    raise UserError(
      f"The validation stream begins with token {tokens_N1[:1]}, not with bos={bos_id}; prepare it again."
    )
  ends = np.append(starts[1:] + 1, len(tokens_N1))
  found = [Document(i, int(s), int(e - s)) for i, (s, e) in enumerate(zip(starts, ends, strict=True))]
  # A stream may end with the bos of a document that is not there; that bos is the last target.
  return found if found[-1].targets else found[:-1]


def select(documents: list[Document], fraction: float, seed: int) -> list[Document]:
  """The documents that are scored: all, or a share of them drawn with Python's generator as the reference draws it."""
  if fraction >= 1:
    return documents
  count = max(1, round(len(documents) * fraction))
  return [documents[i] for i in sorted(random.Random(seed).sample(range(len(documents)), count))]


def batches(documents: list[Document], size: int, *, ascending: bool = False) -> list[Batch]:
  """Batches in the order in which they are scored: sorted by length, cut from the short end, the longest first."""
  by_length = sorted(documents, key=lambda d: d.length)
  cut = [Batch(i, tuple(by_length[a : a + size])) for i, a in enumerate(range(0, len(by_length), size))]
  return cut if ascending else sorted(cut, key=lambda b: -b.longest)


def phase_boundaries(prefix_docs: int, phases: int, documents: int) -> list[int]:
  """Numbers of scored documents after which a global phase runs; fewer than one phase counts as one."""
  prefix, phases = max(0, min(documents, prefix_docs)), max(1, phases)
  return [prefix * k // phases for k in range(1, phases + 1)] if prefix else []
