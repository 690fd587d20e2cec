"""Probes of an evaluator: does it look ahead, is what it scores with a distribution, does it score each target once?

To a probe, an evaluator is a function from a token stream to an `Evaluation` with the distribution of every target. The
evaluator's own trace tells the order in which targets were scored.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from pgolf_jax.data.shards import ValidationData
from pgolf_jax.errors import Check
from pgolf_jax.model.params import Params
from pgolf_jax.scoring import ttt
from pgolf_jax.scoring.documents import find_documents
from pgolf_jax.scoring.record import Evaluation, HintsEvent, ScoreEvent
from pgolf_jax.settings import Settings

Evaluate = Callable[[np.ndarray], Evaluation]

_PROBABILITY_ERROR = 1e-5  # of a sum of probabilities, computed in float32
_SCORE_ERROR = 1e-4  # nats, between a score and its distribution


def run(
  evaluate: Evaluate, tokens_N1: np.ndarray, *, bos_id: int, vocab_size: int, probes: int = 3, seed: int = 0
) -> list[Check]:
  """Makes all probes of an evaluator on a stream.

  Args:
    evaluate: tokens → scores, with `distributions` of all targets.
    probes: number of perturbations of each kind; each is an evaluation of the stream.
    seed: of the choice of targets and of the tokens put in place of others.
  """
  tokens_N1 = np.asarray(tokens_N1, np.int32)
  base = evaluate(tokens_N1)
  subject = Subject(evaluate, base, tokens_N1, bos_id, vocab_size, Order(base, tokens_N1, bos_id))
  rng = np.random.default_rng(seed)
  return [
    future(subject, probes, rng),
    target(subject, probes, rng),
    normalised(base, tokens_N1),
    count_once(base.times_N),
  ]


class Order:
  """What comes before and after a target, in the order of scoring and in that of counting n-grams."""

  def __init__(self, base: Evaluation, tokens_N1: np.ndarray, bos_id: int):
    documents = {d.index: d for d in find_documents(tokens_N1, bos_id)}
    scored = [documents[i] for event in base.trace if isinstance(event, ScoreEvent) for i in event.documents]
    counted = [documents[i] for event in base.trace if isinstance(event, HintsEvent) for i in event.documents]
    self._ranks = []
    for order in filter(None, (scored, counted)):
      rank_N = np.full(len(tokens_N1) - 1, -1)
      first = 0
      for document in order:
        rank_N[document.target_slice] = np.arange(first, first + document.targets)
        first += document.targets
      self._ranks.append(rank_N)
    # The middle of the order has a past and a future.
    rank_N = self._ranks[0]
    first, last = int(0.2 * len(rank_N)), int(0.9 * len(rank_N))
    self._middle = np.flatnonzero((rank_N >= first) & (rank_N < last) & (tokens_N1[1:] != bos_id))
    self._gated = self._middle[base.gate_N[self._middle]]

  def later(self, t: int) -> np.ndarray:
    """Returns the targets that come after t in both orders."""
    return np.flatnonzero(np.logical_and.reduce([rank > rank[t] for rank in self._ranks]))

  def earlier(self, t: int) -> np.ndarray:
    """Returns t and the targets that come before it in both orders."""
    return np.flatnonzero(np.logical_and.reduce([(rank <= rank[t]) & (rank >= 0) for rank in self._ranks]))

  def draw(self, count: int, rng: np.random.Generator) -> list[int]:
    """Draws targets from the middle, half of them with an open gate where there are enough."""
    gated = min(len(self._gated), -(-count // 2))
    drawn = [*rng.choice(self._gated, gated, replace=False), *rng.choice(self._middle, count - gated, replace=False)]
    return [int(t) for t in drawn]


@dataclasses.dataclass(frozen=True)
class Subject:
  """An evaluator under test, the stream it is tested on, and its scores of that stream."""

  evaluate: Evaluate
  base: Evaluation
  tokens_N1: np.ndarray
  bos_id: int
  vocab_size: int
  order: Order

  def with_other_targets(self, targets: np.ndarray, rng: np.random.Generator) -> Evaluation:
    """Scores the stream with another token in the place of each of these targets; bos stays, and none is put in."""
    tokens = self.tokens_N1[targets + 1]
    # Shifting a token's rank among the V − 1 others by 1 to V − 2 gives another one of them.
    others = np.delete(np.arange(self.vocab_size), self.bos_id)
    rank = tokens - (tokens > self.bos_id)
    shifted = others[(rank + rng.integers(1, len(others), len(tokens))) % len(others)]
    changed = self.tokens_N1.copy()
    changed[targets + 1] = np.where(tokens == self.bos_id, tokens, shifted)
    return self.evaluate(changed)

  def moved(self, other: Evaluation, targets: np.ndarray) -> list[int]:
    """Returns the targets whose distribution is not the same to the bit."""
    before, after = self.base.distributions, other.distributions
    return [int(t) for t in targets if not np.array_equal(before[t], after[t])]


def future(subject: Subject, probes: int, rng: np.random.Generator) -> Check:
  """With all tokens after a target replaced, its distribution and all earlier ones stay the same, to the bit."""
  name, compared = "future tokens change nothing", 0
  for t in subject.order.draw(probes, rng):
    later, earlier = subject.order.later(t), subject.order.earlier(t)
    if moved := subject.moved(subject.with_other_targets(later, rng), earlier):
      return Check(name, False, f"{len(later)} tokens after target {t} replaced: {_changes(moved, earlier, t)}")
    compared += len(earlier)
  return Check(name, True, f"{probes} cuts, {compared} distributions equal to the bit")


def target(subject: Subject, probes: int, rng: np.random.Generator) -> Check:
  """With one target replaced, the distribution that scored it stays the same, to the bit; so do its hint and gate."""
  name, gated, base = "a target does not change its own distribution", 0, subject.base
  for t in subject.order.draw(probes, rng):
    other, earlier = subject.with_other_targets(np.array([t]), rng), subject.order.earlier(t)
    if moved := subject.moved(other, earlier):
      gate = " (gate open)" if base.gate_N[t] else ""
      return Check(name, False, f"target {t}{gate} replaced: {_changes(moved, earlier, t)}")
    if (base.hint_N[t], base.gate_N[t]) != (other.hint_N[t], other.gate_N[t]):
      return Check(name, False, f"target {t} replaced: its hint or gate changed")
    gated += bool(base.gate_N[t])
  return Check(name, True, f"{probes} targets replaced, {gated} of them with an open gate")


def normalised(base: Evaluation, tokens_N1: np.ndarray) -> Check:
  """After the tilt the probabilities of all tokens sum to 1, and the score is that of the distribution."""
  name = "a full distribution, and the score is its target's"
  targets = np.array(sorted(base.distributions))
  logp = np.stack([base.distributions[int(t)] for t in targets]).astype(np.float64)
  off = np.abs(np.exp(logp).sum(axis=1) - 1)
  worst = int(off.argmax())
  if not off[worst] <= _PROBABILITY_ERROR:
    return Check(name, False, f"the probabilities at target {targets[worst]} miss 1 by {off[worst]:.2e}")
  apart = np.abs(base.nll_N[targets] + np.take_along_axis(logp, tokens_N1[targets + 1][:, None], axis=1)[:, 0])
  worst = int(apart.argmax())
  if not apart[worst] <= _SCORE_ERROR:
    return Check(name, False, f"target {targets[worst]} is scored {apart[worst]:.2e} nats from its distribution")
  gates = int(base.gate_N[targets].sum())
  return Check(
    name, True, f"{len(targets)} targets ({gates} tilted): |Σp − 1| ≤ {off.max():.1e}, scores within {apart.max():.1e}"
  )


def count_once(times_N: np.ndarray) -> Check:
  """Every target was scored exactly once."""
  name = "every target scored exactly once"
  wrong = np.flatnonzero(times_N != 1)
  if len(wrong):
    return Check(name, False, f"{len(wrong)} targets were not: target {wrong[0]} was scored {times_N[wrong[0]]} times")
  return Check(name, True, f"{len(times_N):,} targets")


def _changes(moved: list[int], compared: np.ndarray, t: int) -> str:
  itself = ", its own among them," if t in moved else ""
  return f"{len(moved)} of {len(compared)} distributions up to it{itself} changed"


def probe(
  settings: Settings, params: Params, data: ValidationData, mesh: Mesh, *, tokens: int, count: int
) -> list[Check]:
  """Probes the evaluator that scored a run, on a small stream of its validation text.

  Args:
    tokens: of the stream, about.
    count: perturbations of each kind.
  """
  sample = probe_stream(data, settings, tokens)
  fitted = probe_settings(settings, sample)
  options, programs = ttt.Options(distributions=True), ttt.Programs(fitted, mesh, distributions=True)

  def evaluate(stream_N1):
    return ttt.evaluate(fitted, params, ValidationData(stream_N1, sample.token_bytes), mesh, options, programs)

  model = settings.model
  return run(
    evaluate, sample.tokens, bos_id=model.bos_id, vocab_size=model.vocab_size, probes=count, seed=settings.seed
  )


def probe_settings(settings: Settings, sample: ValidationData) -> Settings:
  """Fits batches and the global phase to a small stream: there are several batches, and a phase if the run has one."""
  documents = len(find_documents(sample.tokens, settings.model.bos_id))
  small = dataclasses.replace(
    settings.ttt,
    batch_size=min(settings.ttt.batch_size, max(2, documents // 3)),
    phase=dataclasses.replace(
      settings.ttt.phase,
      prefix_docs=documents // 2 if settings.ttt.phase.prefix_docs else 0,
      chunk_tokens=min(settings.ttt.phase.chunk_tokens, max(len(sample.tokens) // 8, 16)),
    ),
    eval_batches=(),
  )
  seq_len = min(settings.eval.seq_len, small.phase.chunk_tokens)
  return dataclasses.replace(
    settings, ttt=small, eval=dataclasses.replace(settings.eval, seq_len=seq_len, doc_fraction=1.0)
  )


def probe_stream(data: ValidationData, settings: Settings, tokens: int) -> ValidationData:
  """Joins the beginnings of documents; every other one repeats a stretch of the one before, so that hints occur."""
  documents = find_documents(data.tokens, settings.model.bos_id)
  each = max(tokens // 8, 2 * settings.hints.order + 8)
  parts: list[np.ndarray] = []
  for document in documents[: max(tokens // each, 4)]:
    # Different lengths, so that documents end at different chunks.
    length = min(document.targets, each - len(parts) % 4 * (each // 8))
    part = data.tokens[document.start : document.start + length].copy()
    if len(parts) % 2 and len(part) > 8:
      stretch = parts[-1][1 : 1 + max(len(part) - 4, 1)]
      part[1 : 1 + len(stretch)] = stretch
    parts.append(part)
  stream = np.concatenate(parts)
  return ValidationData(stream, np.where(stream == settings.model.bos_id, 0, 1).astype(np.int32))
