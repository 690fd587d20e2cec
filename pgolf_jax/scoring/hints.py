"""Which token each target's context points to, and how much the model's distribution is to be tilted towards it.

Two ways through the text. `build_hints` goes over all targets from left to right, as the published procedure does
before it scores documents in another order. `HintStream` takes documents in the order in which they are scored, so
that a hint depends on nothing that is scored later. The text seen so far is the only state: a restarted evaluation
shows the stream its finished documents once more, at tens of millions of tokens a second, and goes on.

Recipe section 6. What decides whether to hint is the context alone, never the target.
"""

import dataclasses
import os

import numpy as np
from jaxtyping import Bool, Float32, Int32, Integer

from pgolf_jax.kernels.ngram import Mode, NgramState


@dataclasses.dataclass(frozen=True)
class Hints:
  """One entry per target; zeros where `gate` is shut."""

  ids: Int32[np.ndarray, "N"]  # the token hinted at
  gate: Bool[np.ndarray, "N"]  # whether the distribution is tilted at all
  boost: Float32[np.ndarray, "N"]  # β, nats


class HintStream:
  """Hints for documents in the order in which they come.

  A context may reach back into the documents before, as in running text. A document's own first token is in front
  of its targets: it closes the document before it as that one's last target, or else is put in as a seed.

  Args:
    order, threshold, mode, vocab_size, threads: as in `NgramState`; `threads=None` takes the cores of this process.
    boost: β of every gated target, nats.
    expected: targets of all documents together, if known.
  """

  def __init__(
    self,
    *,
    order: int,
    threshold: float,
    boost: float,
    mode: Mode = "exact",
    vocab_size: int,
    expected: int = 0,
    threads: int | None = None,
  ):
    self._state = NgramState(
      order,
      threshold=threshold,
      mode=mode,
      vocab_size=vocab_size,
      expected=expected,
      threads=_cores() if threads is None else threads,
    )
    self._boost = np.float32(boost)
    # As published, no hint means confidence 0, and a threshold of 0 lets that through, as a hint at token 0.
    self._always = mode == "reference" and threshold <= 0

  def add(self, document: Integer[np.ndarray, "N+1"]) -> Hints:
    """Hints for `document[1:]`, whose targets then count for the documents after it."""
    if len(document) and self._state.last != document[0]:
      self._state.seed(document[:1])
    ids, gate = self._state.update(document[1:])
    if self._always:
      gate[:] = True
    ids *= gate
    return Hints(ids.view(np.int32), gate, gate * self._boost)

  @property
  def nbytes(self) -> int:
    """Bytes of memory that the counts hold."""
    return self._state.nbytes


def build_hints(
  targets: Integer[np.ndarray, "N"],
  *,
  order: int,
  threshold: float,
  boost: float,
  mode: Mode = "exact",
  seed_token: int | None = None,
  vocab_size: int | None = None,
  threads: int | None = None,
) -> Hints:
  """Hints for all targets in one pass from left to right.

  Args:
    targets: the text without its first token.
    order, threshold, boost, mode, threads: as in `HintStream`.
    seed_token: the text's first token. None repeats the published procedure, which puts the first target in front.
    vocab_size: None stands for the largest target plus one.
  """
  if not len(targets):
    return Hints(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(0, np.float32))
  seed = int(targets[0]) if seed_token is None else seed_token
  stream = HintStream(
    order=order,
    threshold=threshold,
    boost=boost,
    mode=mode,
    vocab_size=1 + max(int(targets.max()), seed) if vocab_size is None else vocab_size,
    expected=len(targets),
    threads=threads,
  )
  return stream.add(np.concatenate([np.array([seed], targets.dtype), targets]))


def _cores() -> int:
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  return min(cores, 8)  # each thread goes over all contexts to find its own, so that many gain little
