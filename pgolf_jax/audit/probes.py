"""Probes of an evaluator: does it look ahead, is what it scores with a distribution, does it score each target once?

They know an evaluator only as a function from a token stream to an `Evaluation` with the distribution of every target.
A target's place in the order of scoring is taken from the evaluator's own trace.
"""

from collections.abc import Callable, Sequence

import numpy as np

from pgolf_jax.data.verify import Check
from pgolf_jax.scoring.documents import find_documents
from pgolf_jax.scoring.record import Evaluation
from pgolf_jax.scoring.trace import HintsEvent, ScoreEvent

Evaluate = Callable[[np.ndarray], Evaluation]

_NORMAL = 1e-5
_SCORE = 1e-4


def run(evaluate: Evaluate, tokens_N1: np.ndarray, *, bos_id: int, vocab_size: int, probes: int = 3, seed: int = 0):
  """All probes of an evaluator on a stream.

  Args:
    evaluate: tokens → scores, with `distributions` of all targets.
    probes: number of perturbations of each kind; each is an evaluation of the stream.

  Returns:
    A list of `Check`.
  """
  rng = np.random.default_rng(seed)
  tokens_N1 = np.asarray(tokens_N1, np.int32)
  base = evaluate(tokens_N1)
  after = _After(base, tokens_N1, bos_id)
  return [
    future(evaluate, base, after, tokens_N1, bos_id=bos_id, vocab_size=vocab_size, probes=probes, rng=rng),
    target(evaluate, base, after, tokens_N1, bos_id=bos_id, vocab_size=vocab_size, probes=probes, rng=rng),
    normalised(base, tokens_N1),
    once(base),
  ]


class _After:
  """What lies after a target in every order that the evaluator goes by."""

  def __init__(self, base: Evaluation, tokens_N1: np.ndarray, bos_id: int):
    documents = {d.index: d for d in find_documents(tokens_N1, bos_id)}
    scored = [documents[i] for event in base.trace if isinstance(event, ScoreEvent) for i in event.documents]
    counted = [documents[i] for event in base.trace if isinstance(event, HintsEvent) for i in event.documents]
    self._ranks = []
    for order in filter(None, (scored, counted)):
      rank = np.full(len(tokens_N1) - 1, -1)
      at = 0
      for document in order:
        rank[document.target_slice] = np.arange(at, at + document.targets)
        at += document.targets
      self._ranks.append(rank)
    # Targets of the middle of the order, which has a past and a future, with and without an open gate.
    first, last = int(0.2 * len(self._ranks[0])), int(0.9 * len(self._ranks[0]))
    inner = np.flatnonzero((self._ranks[0] >= first) & (self._ranks[0] < last) & (tokens_N1[1:] != bos_id))
    self.gated = inner[base.gate_N[inner]]
    self.open = inner

  def later(self, t: int) -> np.ndarray:
    """[N] whether a target comes after t in all orders."""
    return np.logical_and.reduce([rank > rank[t] for rank in self._ranks])

  def earlier(self, t: int) -> np.ndarray:
    """Targets that come before t, or are t, in all orders."""
    return np.flatnonzero(np.logical_and.reduce([(rank <= rank[t]) & (rank >= 0) for rank in self._ranks]))

  def draw(self, count: int, rng: np.random.Generator) -> list[int]:
    """Targets to probe at, half of them with an open gate where there are any."""
    gated = min(len(self.gated), -(-count // 2))
    chosen = [*rng.choice(self.gated, gated, replace=False), *rng.choice(self.open, count - gated, replace=False)]
    return [int(t) for t in chosen]


def _others(tokens: np.ndarray, *, bos_id: int, vocab_size: int, rng: np.random.Generator) -> np.ndarray:
  """A different token, not bos, in the place of each that is not bos."""
  shift = rng.integers(1, vocab_size, len(tokens))
  other = (tokens + shift) % vocab_size
  other = np.where(other == bos_id, (other + 1) % vocab_size, other)
  other = np.where(other == tokens, (other + 1) % vocab_size, other)
  other = np.where(other == bos_id, (other + 1) % vocab_size, other)
  return np.where(tokens == bos_id, tokens, other).astype(tokens.dtype)


def _changed(base: Evaluation, other: Evaluation, targets: Sequence[int]) -> list[int]:
  """Targets whose distribution is not the same to the bit."""
  return [int(t) for t in targets if not np.array_equal(base.distributions[t], other.distributions[t])]


def future(evaluate, base, after: _After, tokens_N1, *, bos_id, vocab_size, probes, rng) -> Check:
  """All tokens after a target replaced: its distribution and all earlier ones stay the same, to the bit."""
  name, compared = "future tokens change nothing", 0
  for t in after.draw(probes, rng):
    changed = tokens_N1.copy()
    at = np.flatnonzero(after.later(t)) + 1
    changed[at] = _others(tokens_N1[at], bos_id=bos_id, vocab_size=vocab_size, rng=rng)
    earlier = after.earlier(t)
    if moved := _changed(base, evaluate(changed), earlier):
      return Check(name, False, f"{len(at)} tokens after target {t} replaced: {_named(moved, earlier, t)} changed")
    compared += len(earlier)
  return Check(name, True, f"{probes} cuts, {compared} distributions equal to the bit")


def target(evaluate, base, after: _After, tokens_N1, *, bos_id, vocab_size, probes, rng) -> Check:
  """One target replaced: the distribution that it was scored with stays the same, to the bit; hint and gate too."""
  name, gated = "a target does not change its own distribution", 0
  for t in after.draw(probes, rng):
    changed = tokens_N1.copy()
    changed[t + 1] = _others(tokens_N1[t + 1 : t + 2], bos_id=bos_id, vocab_size=vocab_size, rng=rng)[0]
    found = evaluate(changed)
    if moved := _changed(base, found, after.earlier(t)):
      gate = " (gate open)" if base.gate_N[t] else ""
      return Check(name, False, f"target {t}{gate} replaced: {_named(moved, after.earlier(t), t)} changed")
    if (base.hint_N[t], base.gate_N[t]) != (found.hint_N[t], found.gate_N[t]):
      return Check(name, False, f"target {t} replaced: its hint or gate changed")
    gated += bool(base.gate_N[t])
  return Check(name, True, f"{probes} targets swapped, {gated} of them with an open gate")


def normalised(base: Evaluation, tokens_N1: np.ndarray) -> Check:
  """After the tilt the probabilities of all tokens sum to 1, and the score is that of the distribution."""
  name = "a full distribution, and the score is its target's"
  targets = np.array(sorted(base.distributions))
  logp = np.stack([base.distributions[int(t)] for t in targets]).astype(np.float64)
  off = np.abs(np.exp(logp).sum(axis=1) - 1)
  worst = int(off.argmax())
  if not off[worst] <= _NORMAL:
    return Check(name, False, f"the probabilities at target {targets[worst]} miss 1 by {off[worst]:.2e}")
  apart = np.abs(base.nll_N[targets] + np.take_along_axis(logp, tokens_N1[targets + 1][:, None], axis=1)[:, 0])
  worst = int(apart.argmax())
  if not apart[worst] <= _SCORE:
    return Check(name, False, f"target {targets[worst]} is scored {apart[worst]:.2e} nats from its distribution")
  gates = int(base.gate_N[targets].sum())
  return Check(
    name, True, f"{len(targets)} targets ({gates} tilted): |Σp − 1| ≤ {off.max():.1e}, scores within {apart.max():.1e}"
  )


def once(base: Evaluation) -> Check:
  """Every target is scored exactly once."""
  return count_once(base.times_N)


def count_once(times_N: np.ndarray) -> Check:
  """Whether all counts are 1."""
  name = "every target scored exactly once"
  wrong = np.flatnonzero(times_N != 1)
  if len(wrong):
    return Check(name, False, f"{len(wrong)} targets were not: target {wrong[0]} was scored {times_N[wrong[0]]} times")
  return Check(name, True, f"{len(times_N):,} targets")


def _named(moved: list[int], of: np.ndarray, t: int) -> str:
  itself = ", its own among them," if t in moved else ""
  return f"{len(moved)} of {len(of)} distributions up to it{itself}"
