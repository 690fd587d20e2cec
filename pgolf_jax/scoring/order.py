"""The two orders of scoring: what the n-gram counts have seen when a document's hints are made.

`strict`: documents in the order in which they are scored, one after another; a hint depends on documents before it in
that order and on its own document's past, as do the weights and the adapters. One order explains every score.
`reference`: the stream from left to right, once, before anything is scored. A document's hints then come from documents
that are scored later, while those depend on it through the global phase.
"""

from typing import Protocol

import numpy as np
from jaxtyping import Bool, Int32, Integer

from pgolf_jax.kernels.ngram import NgramState
from pgolf_jax.scoring.documents import Document
from pgolf_jax.scoring.trace import Trace
from pgolf_jax.settings import HintConfig


class Hints(Protocol):
  """Hints of all targets, filled in as the order allows; 0 where the gate is shut."""

  hint_N: Int32[np.ndarray, "N"]
  gate_N: Bool[np.ndarray, "N"]

  def prepare(self, documents: tuple[Document, ...]) -> None:
    """Makes sure that the targets of these documents, the next to be scored, have their hints."""


class _Base:
  def __init__(self, config: HintConfig, vocab_size: int, tokens_N1: Integer[np.ndarray, "N1"], trace: Trace):
    self._tokens = np.ascontiguousarray(tokens_N1)
    targets = len(tokens_N1) - 1
    self.hint_N = np.zeros(targets, np.int32)
    self.gate_N = np.zeros(targets, bool)
    self._trace = trace
    self._state = NgramState(
      config.order, threshold=config.threshold, mode=config.table, vocab_size=vocab_size, expected=targets
    )

  def _extend(self, targets: slice) -> None:
    hint, gate = self._state.update(self._tokens[targets.start + 1 : targets.stop + 1])
    self.hint_N[targets] = np.where(gate, hint, 0)
    self.gate_N[targets] = gate


class StrictHints(_Base):
  """Counts grow document by document, in the order of scoring."""

  def prepare(self, documents: tuple[Document, ...]) -> None:
    for document in documents:
      if self._state.last is None:
        self._state.seed(self._tokens[document.start : document.start + 1])
      self._extend(document.target_slice)
    self._trace.hints(documents)


class ReferenceHints(_Base):
  """Counts over the whole stream before the first document; its first target stands where its bos should be."""

  def __init__(self, config, vocab_size, tokens_N1, trace, documents: list[Document]):
    super().__init__(config, vocab_size, tokens_N1, trace)
    self._documents = documents

  def prepare(self, documents: tuple[Document, ...]) -> None:
    if self._state.last is None:
      self._state.seed(self._tokens[1:2])
      self._extend(slice(0, len(self.hint_N)))
      self._trace.hints(self._documents)


class NoHints:
  """Every gate shut."""

  def __init__(self, targets: int):
    self.hint_N = np.zeros(targets, np.int32)
    self.gate_N = np.zeros(targets, bool)

  def prepare(self, documents: tuple[Document, ...]) -> None:
    pass
