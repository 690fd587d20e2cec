"""The two orders of scoring: what the n-gram counts have seen when a document's hints are made.

`strict`: documents in the order in which they are scored, one after another; a hint depends on documents before it in
that order and on its own document's past, as do the weights and the adapters. One order explains every score.
`reference`: the stream from left to right, once, before anything is scored. A document's hints then come from documents
that are scored later, while those depend on it through the global phase.
"""

from typing import Protocol

import numpy as np
from jaxtyping import Bool, Int32, Integer

from pgolf_jax.scoring.documents import Document
from pgolf_jax.scoring.hints import HintStream, build_hints
from pgolf_jax.scoring.trace import Trace
from pgolf_jax.settings.config import HintConfig


class Hints(Protocol):
  """Hints of all targets, filled in as the order allows; 0 where the gate is shut."""

  hint_N: Int32[np.ndarray, "N"]
  gate_N: Bool[np.ndarray, "N"]

  def prepare(self, documents: tuple[Document, ...]) -> None:
    """Makes sure that the targets of these documents, the next to be scored, have their hints."""


class StrictHints:
  """Counts grow document by document, in the order of scoring."""

  def __init__(self, config: HintConfig, vocab_size: int, tokens_N1: Integer[np.ndarray, "N1"], trace: Trace):
    targets = len(tokens_N1) - 1
    self._tokens, self._trace = np.ascontiguousarray(tokens_N1), trace
    self.hint_N = np.zeros(targets, np.int32)
    self.gate_N = np.zeros(targets, bool)
    self._stream = HintStream(
      order=config.order,
      threshold=config.threshold,
      boost=config.boost,
      mode=config.table,
      vocab_size=vocab_size,
      expected=targets,
    )

  def prepare(self, documents: tuple[Document, ...]) -> None:
    for document in documents:
      found = self._stream.add(self._tokens[document.start : document.start + document.length])
      self.hint_N[document.target_slice], self.gate_N[document.target_slice] = found.ids, found.gate
    self._trace.hints(documents)


class ReferenceHints:
  """Counts over the whole stream before the first document; its first target stands where its bos should be."""

  def __init__(
    self,
    config: HintConfig,
    vocab_size: int,
    tokens_N1: Integer[np.ndarray, "N1"],
    trace: Trace,
    documents: list[Document],
  ):
    self._config, self._vocab_size, self._tokens = config, vocab_size, np.ascontiguousarray(tokens_N1)
    self._trace, self._documents = trace, documents
    self._built = False
    self.hint_N = np.zeros(len(tokens_N1) - 1, np.int32)
    self.gate_N = np.zeros(len(tokens_N1) - 1, bool)

  def prepare(self, documents: tuple[Document, ...]) -> None:
    if self._built:
      return
    c = self._config
    found = build_hints(
      self._tokens[1:],
      order=c.order,
      threshold=c.threshold,
      boost=c.boost,
      mode=c.table,
      vocab_size=self._vocab_size,
    )
    self.hint_N, self.gate_N, self._built = found.ids, found.gate, True
    self._trace.hints(self._documents)


class NoHints:
  """Every gate shut."""

  def __init__(self, targets: int):
    self.hint_N = np.zeros(targets, np.int32)
    self.gate_N = np.zeros(targets, bool)

  def prepare(self, documents: tuple[Document, ...]) -> None:
    pass
