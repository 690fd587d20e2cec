"""N-gram hints: which token each target's context points to, and the tilt of the model's distribution towards it.

Recipe section 6. The context alone decides whether a hint is given, never the target. Two orders of counting:

`strict`: documents in the order in which they are scored, one after another. A hint depends on documents before it in
that order and on its own document's past, as do the weights and the adapters: one order explains every score.
`reference`: the stream from left to right, once, before anything is scored. A document's hints then come from documents
that are scored later, while those depend on it through the global phase.

Of several orders of n-grams the longest that has a hint gives it. How much a hint weighs is fixed, or it is learnt
(`scoring.strength`).

The text that was counted is the only state. A restarted evaluation counts its finished documents once more, at tens of
millions of tokens a second.
"""

import dataclasses
import os
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int16, Int32, Integer

from pgolf_jax.kernels.ngram import NgramState
from pgolf_jax.scoring.documents import Document
from pgolf_jax.scoring.strength import Strengths, tilted
from pgolf_jax.settings import HintConfig, Settings

SHARES = (0.35, 0.65, 0.999)
"""Shares of a context's continuations at which the classes of confidence begin, after the first."""
TOTALS = (2, 4, 12)
"""Numbers of times that a context came before at which the classes of experience begin, after the first."""
CLASSES = (len(SHARES) + 1) * (len(TOTALS) + 1)


@dataclasses.dataclass(frozen=True)
class Hints:
  """One entry per target; zeros where `gate` is shut."""

  ids: Int32[np.ndarray, "N"]  # the token hinted at
  gate: Bool[np.ndarray, "N"]  # whether the distribution is tilted at all
  boost: Float32[np.ndarray, "N"]  # β, nats, where it is fixed
  # Of the hint: its n-gram's place in `HintConfig.orders`, confidence, experience. Only where strengths are learnt.
  kind: Int16[np.ndarray, "N"]


class HintStream:
  """Hints for documents in the order in which they come.

  A context may reach back into the documents before, as in running text. A document's own first token stands before
  its targets: it is the last target of the document before it, or else it is put in as a seed.

  Args:
    config: `table="reference"` uses the published hash keys, which may collide.
    vocab_size: number of token ids.
    expected: targets of all documents together, if known.
    threads: threads that count; None takes the cores of this process.
  """

  def __init__(self, config: HintConfig, vocab_size: int, *, expected: int = 0, threads: int | None = None):
    self._counts = [
      NgramState(
        order,
        threshold=config.threshold,
        mode=config.table,
        vocab_size=vocab_size,
        expected=expected,
        threads=_cores() if threads is None else threads,
      )
      for order in config.orders
    ]
    self._boost = np.float32(config.boost)
    self._has_kinds = config.strength == "mixture"
    # As published, no hint means confidence 0, and a threshold of 0 lets that through, as a hint at token 0.
    self._is_always_open = config.table == "reference" and config.threshold <= 0

  def add(self, document: Integer[np.ndarray, "N1"]) -> Hints:
    """Returns hints for `document[1:]`, and counts these targets for the documents after it."""
    targets = max(len(document) - 1, 0)
    ids, gate, kind = np.zeros(targets, np.int32), np.zeros(targets, bool), np.zeros(targets, np.int16)
    for place, counts in enumerate(self._counts):
      if len(document) and counts.last != document[0]:
        counts.seed(document[:1])
      seen = {}
      if self._has_kinds:
        seen = {"confidence": np.empty(targets, np.float32), "total": np.empty(targets, np.int32)}
      hint, is_open = counts.update(document[1:], **seen)
      is_open = (is_open | self._is_always_open) & ~gate
      np.copyto(ids, hint, where=is_open, casting="unsafe")
      if self._has_kinds:
        classes = np.digitize(seen["confidence"], SHARES) * (len(TOTALS) + 1) + np.digitize(seen["total"], TOTALS)
        np.copyto(kind, place * CLASSES + classes, where=is_open, casting="unsafe")
      gate |= is_open
    return Hints(ids, gate, gate * self._boost, kind)

  @property
  def nbytes(self) -> int:
    """Bytes of memory that the counts hold."""
    return sum(counts.nbytes for counts in self._counts)


def kinds(config: HintConfig) -> int:
  """Returns the number of kinds of hints."""
  return len(config.orders) * CLASSES


def build_hints(
  targets: Integer[np.ndarray, "N"],
  config: HintConfig,
  *,
  seed_token: int | None = None,
  vocab_size: int | None = None,
  threads: int | None = None,
) -> Hints:
  """Returns hints for all targets from one pass from left to right, as the published procedure makes them.

  Args:
    targets: the text without its first token.
    seed_token: the text's first token. None repeats the published procedure, which puts the first target in front.
    vocab_size: None stands for the largest target plus one.
    threads: as in `HintStream`.
  """
  if not len(targets):
    return Hints(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(0, np.float32), np.zeros(0, np.int16))
  seed = int(targets[0]) if seed_token is None else seed_token
  size = 1 + max(int(targets.max()), seed) if vocab_size is None else vocab_size
  stream = HintStream(config, size, expected=len(targets), threads=threads)
  return stream.add(np.concatenate([np.array([seed], targets.dtype), targets]))


def _cores() -> int:
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  return min(cores, 8)  # each thread goes over all contexts to find its own, so that many gain little


class HintCounter:
  """Hints of all targets of a stream, made in the order that the settings name.

  Attributes:
    ids_N: the token hinted at; 0 where the gate is shut.
    gate_N: whether the target's distribution is tilted; False until its hint is made.
    learns: whether strengths are learnt.
  """

  def __init__(self, settings: Settings, tokens_N1: Integer[np.ndarray, "N1"], documents: Sequence[Document]):
    self._config, self._vocab_size = settings.hints, settings.model.vocab_size
    self._tokens_N1, self._documents = np.ascontiguousarray(tokens_N1), tuple(documents)
    self._is_strict = settings.ttt.order == "strict"
    self._stream: HintStream | None = None
    targets = len(tokens_N1) - 1
    self.ids_N, self.gate_N = np.zeros(targets, np.int32), np.zeros(targets, bool)
    self.learns = self._config.enabled and self._config.strength == "mixture"
    if self.learns:
      self._boost_N, self._kind_N = np.zeros(targets, np.float32), np.zeros(targets, np.int16)
      self._strengths = Strengths(kinds(self._config))

  def prepare(self, documents: tuple[Document, ...]) -> tuple[Document, ...]:
    """Makes the hints of these documents, the next to be scored, and returns the documents that were counted for it."""
    if not self._config.enabled:
      return ()
    if self._is_strict:
      return self._count(documents)
    return self._count_everything()

  def _count(self, documents: tuple[Document, ...]) -> tuple[Document, ...]:
    if self._stream is None:
      self._stream = HintStream(self._config, self._vocab_size, expected=len(self.ids_N))
    for document in documents:
      hints = self._stream.add(self._tokens_N1[document.start : document.start + document.length])
      targets = document.target_slice
      self.ids_N[targets], self.gate_N[targets] = hints.ids, hints.gate
      if self.learns:
        self._kind_N[targets] = hints.kind
    return documents

  def _count_everything(self) -> tuple[Document, ...]:
    """The stream from left to right; its first target stands where its bos should be."""
    documents, self._documents = self._documents, ()
    if documents:
      hints = build_hints(self._tokens_N1[1:], self._config, vocab_size=self._vocab_size)
      self.ids_N, self.gate_N = hints.ids, hints.gate
    return documents

  def learn(self, documents: tuple[Document, ...], hint_nll_N: Float[np.ndarray, "N"]) -> None:
    """Learns the strengths of these documents' tilts, in the order in which their hints were made.

    Args:
      hint_nll_N: the model's nats of the hints, of the whole stream; those of these documents are read.
    """
    target_M = np.concatenate([np.arange(d.target_slice.start, d.target_slice.stop) for d in documents])
    target_M = target_M[self.gate_N[target_M]]
    is_right_M = self._is_right(target_M)
    self._boost_N[target_M] = self._strengths.learn(hint_nll_N[target_M], is_right_M, self._kind_N[target_M])

  def _is_right(self, target_M: np.ndarray) -> np.ndarray:
    return self.ids_N[target_M] == self._tokens_N1[target_M + 1]

  def tilt(
    self,
    target_M: Integer[np.ndarray, "M"],
    model_nll_M: Float[np.ndarray, "M"],
    hint_nll_M: Float[np.ndarray, "M"],
  ) -> Float32[np.ndarray, "M"]:
    """Returns the nats of targets after their tilts; where the gate is shut, the model's."""
    tilted_M = tilted(model_nll_M, hint_nll_M, self._is_right(target_M), self._boost_N[target_M])
    return np.where(self.gate_N[target_M], tilted_M, model_nll_M)

  def tilt_all(self, target: int, logp_V: Float[np.ndarray, "V"]) -> Float32[np.ndarray, "V"]:
    """Returns the log-probabilities of all tokens in a target's place after its tilt."""
    if not self.gate_N[target]:
      return logp_V
    hint = self.ids_N[target]
    is_hint_V = np.arange(len(logp_V)) == hint
    return -tilted(-logp_V, np.full(len(logp_V), -logp_V[hint]), is_hint_V, np.full(len(logp_V), self._boost_N[target]))


def tilt(
  nll: Float[Array, "..."],
  hint_logp: Float[Array, "..."],
  target: Int[Array, "..."],
  hint: Int[Array, "..."],
  gate: Bool[Array, "..."],
  boost: Float[Array, "..."],
) -> Float[Array, "..."]:
  """Returns NLL − β·[target = hint] + log(1 + q(e^β − 1)) where the gate is open, else NLL. All in fp32, nats.

  With q the model's probability of the hint h, the tilted distribution multiplies p(h) by e^β and divides everything by
  1 + q(e^β − 1), so that it is a full distribution again whatever the target is. Recipe section 6.

  Args:
    nll: −log p(target) under the model.
    hint_logp: log q, the model's log-probability of `hint`.
    target, hint: token ids.
    gate: whether the position is tilted.
    boost: β; of any size and sign.
  """
  nll, boost = nll.astype(jnp.float32), boost.astype(jnp.float32)
  hint_logp = jnp.minimum(hint_logp.astype(jnp.float32), 0.0)  # rounding can leave log q a little above 0
  # log((1 − q) + q·e^β): no term overflows for large β, and 1 − q keeps its digits where q is nearly 1.
  log_normalizer = jnp.logaddexp(jnp.log(-jnp.expm1(hint_logp)), hint_logp + boost)
  tilted = nll - jnp.where(target == hint, boost, 0.0) + log_normalizer
  return jnp.where(gate, tilted, nll)
