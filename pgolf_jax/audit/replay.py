"""The run's own stream scored again by the run's own code, with later tokens replaced: earlier scores must not move.

A cut goes through one batch. In each of its documents everything from some target on is replaced, and so is every
document of the batches after it; what was scored before has to come out equal to the bit. The target at the cut itself
becomes a token whose probability the run has already told: its hint, or a token of a distribution that was sampled. So
the score that the evaluator gives it shows whether there was one distribution, fixed before the target was looked at.

An evaluator cannot tell a replay from a run: the entry point, the path of the data, lengths, batches and flags are the
same, and the tokens put in are pieces of the stream's own text. Cuts are drawn when the audit is made, by chance that
nobody could know who made the scores, or try scores against.
"""

import contextlib
import dataclasses
import functools
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pgolf_jax.audit.recheck import Subject, tilts
from pgolf_jax.data.shards import ValidationData
from pgolf_jax.errors import Check
from pgolf_jax.model.params import Params
from pgolf_jax.scoring import ttt
from pgolf_jax.scoring.record import Record, ScoreEvent, Scores
from pgolf_jax.settings import Settings

Evaluate = Callable[[ValidationData, int], Scores]
"""(stream, count) → its scores, of which those of the first `count` batches are made."""

_OTHER_MACHINE = {"float32": 1e-3, "bfloat16": 0.1}
"""Nats, of one target: how far another machine's sums move a score by the end of an evaluation."""

_SAME_MACHINE = {"float32": 2e-4, "bfloat16": 0.05}
"""Nats, of one target: between programs that differ in what they return."""

_BIAS = {"float32": 1e-5, "bfloat16": 1e-3}
"""Nats, of a mean over many targets: rounding goes up as often as down. Between a CPU with AVX and the same without the
means over 9,872 targets were 2e-8 and 6e-5 apart, single scores 5e-6 and 0.04."""

_SUM_ERROR = 1e-5  # of a sum of probabilities, computed in float32
_EXTRA_SAMPLES = 1024  # distributions beside those at the cuts


class Cut(NamedTuple):
  """Where a stream is cut, and what stands after it.

  Attributes:
    batches: number of batches up to and with the one that is cut.
    targets: one in each document of that batch that is long enough; it and what follows are replaced.
    data: the stream with everything after the cut replaced.
    earlier_N: whether a target was scored before the cut.
  """

  batches: int
  targets: np.ndarray
  data: ValidationData
  earlier_N: np.ndarray

  @property
  def new_tokens(self) -> np.ndarray:
    """The tokens at the cut."""
    return self.data.tokens[self.targets + 1]


def chance() -> np.random.Generator:
  """Returns a generator that starts from what the operating system draws."""
  return np.random.default_rng()


def draw_cuts(subject: Subject, count: int, *, fast: bool = False) -> list[Cut]:
  """Returns cuts through batches drawn by chance, through the first of all and through the first after a global phase.

  Args:
    count: batches that are drawn, each as likely as it has targets, and none twice while there are others: a cheat in
      batches with a share f of all targets is missed with a probability of at most (1 − f) ** count.
    fast: cuts the first batch alone, that many times, so that nothing but that batch has to be scored again.
  """
  rng = chance()
  if fast:
    return [_cut(subject, 0, rng) for _ in range(count)]
  events = [event for event in subject.trace if isinstance(event, ScoreEvent)]
  after_phase = [i for i, event in enumerate(events) if i and event.weights > events[i - 1].weights]
  targets = np.array([sum(document.targets for document in batch) for batch in subject.batches])
  share, different = targets / targets.sum(), min(count, np.count_nonzero(targets))
  drawn = rng.choice(len(targets), different, replace=False, p=share).tolist()
  drawn += rng.choice(len(targets), count - different, p=share).tolist()  # more than batches: again, at other targets
  fixed = {0, *after_phase[:1]} - set(drawn)
  return [_cut(subject, batch, rng) for batch in sorted([*drawn, *fixed])]


def _cut(subject: Subject, batch: int, rng: np.random.Generator) -> Cut:
  tokens_N1, bytes_N1 = subject.data
  bos, targets = subject.settings.model.bos_id, len(tokens_N1) - 1
  hint_N, gate_N, _ = subject.hints(tokens_N1)
  is_wrong_N = gate_N & (hint_N != tokens_N1[1:]) & (hint_N != bos)
  later_N, earlier_N, cut = np.zeros(targets, bool), np.zeros(targets, bool), []
  for documents in subject.batches[:batch]:
    for document in documents:
      earlier_N[document.target_slice] = True
  for document in subject.batches[batch]:
    first, stop = document.target_slice.start, document.target_slice.stop
    earlier_N[first:stop] = True
    places = np.arange(first + 1, stop)
    places = places[tokens_N1[places + 1] != bos]
    if len(places):
      wrong = places[is_wrong_N[places]]
      at = int(rng.choice(wrong if len(wrong) and rng.random() < 0.5 else places))
      cut.append(at)
      later_N[at:stop], earlier_N[at:stop] = True, False
  for documents in subject.batches[batch + 1 :]:
    for document in documents:
      later_N[document.target_slice] = True
  cut = np.array(cut, np.int64)
  tokens_N1, bytes_N1 = tokens_N1.copy(), bytes_N1.copy()
  replaced = np.flatnonzero(later_N & (tokens_N1[1:] != bos)) + 1
  text = np.flatnonzero(subject.data.tokens != bos)
  pieces = _pieces(len(replaced), len(text), rng)
  tokens_N1[replaced], bytes_N1[replaced] = (x[text[pieces]] for x in subject.data)
  for at in cut:
    if is_wrong_N[at]:
      tokens_N1[at + 1] = hint_N[at]
    elif len(others := text[subject.data.tokens[text] != subject.data.tokens[at + 1]]):
      tokens_N1[at + 1] = subject.data.tokens[rng.choice(others)]
  return Cut(batch + 1, cut, ValidationData(tokens_N1, bytes_N1), earlier_N)


def _pieces(count: int, length: int, rng: np.random.Generator) -> np.ndarray:
  """Places in a text of some length, in runs of up to 256 from anywhere: other words, and other counts of them."""
  sizes = rng.integers(1, 257, count // 64 + 8)
  while sizes.sum() < count:
    sizes = np.concatenate([sizes, sizes])
  starts = np.repeat(rng.integers(0, max(length, 1), len(sizes)), sizes)
  within = np.arange(len(starts)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
  return ((starts + within) % max(length, 1))[:count]


class Outcome(NamedTuple):
  """The scores of a replay beside its cut."""

  cut: Cut
  scores: Scores


def replay(subject: Subject, evaluate: Evaluate, cuts: Sequence[Cut]) -> tuple[Check, list[Outcome], Subject]:
  """Scores the stream once for each cut; everything before a cut has to be as in the run, to the bit.

  If it is not, the stream itself is scored again: on another machine than the run's the same code gives other bits, and
  then cuts are held against that second run, and this one against the first within the tolerance of the type.

  Returns:
    The check, what came of each cut, and the subject with scores that this machine repeats to the bit.
  """
  name, began = "later tokens change no score", time.monotonic()
  outcomes = [Outcome(cut, evaluate(cut.data, cut.batches)) for cut in cuts]
  base, where = subject.scores, "to the bit"
  if any(_moved(subject, base, outcome).any() for outcome in outcomes):
    again = evaluate(subject.data, max(cut.batches for cut in cuts))
    made_N, dtype = np.isfinite(again.nll_N), subject.settings.train.compute_dtype
    apart_N = np.where(made_N, again.nll_N.astype(np.float64) - base.nll_N, 0)
    worst, text = int(np.abs(apart_N).argmax()), _biased(apart_N[made_N], _OTHER_MACHINE[dtype], dtype)
    if not abs(apart_N[worst]) <= _OTHER_MACHINE[dtype]:
      text = f"the run's code scores target {worst} {again.nll_N[worst]:.5f}, the run {base.nll_N[worst]:.5f}"
    if text:
      text += "; it did not make these scores, or it does not repeat them"
      return Check(name, False, text), outcomes, subject
    base, where = again, f"to the bit on this machine, which is within {abs(apart_N[worst]):.0e} nats of the run's"
    where += f", {abs(apart_N[made_N].mean()):.0e} in the mean"
  here = subject if base is subject.scores else dataclasses.replace(subject, scores=base)
  for cut, scores in outcomes:
    moved = np.flatnonzero(_moved(subject, base, Outcome(cut, scores)))
    if len(moved):
      t = moved[0]
      text = f"after a cut in batch {cut.batches}, {len(moved)} of {int(cut.earlier_N.sum())} earlier scores changed"
      is_model = scores.model_nll_N[t] != base.model_nll_N[t]
      was, became = (x.model_nll_N[t] if is_model else x.nll_N[t] for x in (base, scores))
      values = f"target {t}: {was:.6f} became {became:.6f} {'before' if is_model else 'after'} the tilt"
      return Check(name, False, f"{text}, {values}"), outcomes, here
    is_fixed_N = cut.earlier_N.copy()
    is_fixed_N[cut.targets] = True  # their hints come from earlier tokens, too
    tilted = tilts(subject, scores, is_fixed_N, cut.data.tokens)
    if not tilted.passed:
      return Check(name, False, f"after a cut in batch {cut.batches}: {tilted.finding}"), outcomes, here
  compared = sum(int(cut.earlier_N.sum()) for cut in cuts)
  seconds = time.monotonic() - began
  text = f"{len(cuts)} cuts, {compared:,} earlier scores equal {where}; {seconds:.1f} s"
  return Check(name, True, text), outcomes, here


def _biased(apart_M: np.ndarray, limit: float, dtype: str) -> str | None:
  """Says so if scores differ by more in the mean than rounding explains, which goes both ways.

  Args:
    apart_M: differences, each of which may be as large as `limit`: their mean by chance up to limit / √M.
  """
  mean, allowed = float(apart_M.mean()), _BIAS[dtype] + limit / math.sqrt(len(apart_M))
  if abs(mean) <= allowed:
    return None
  return f"the run's code gives {mean:+.6f} nats a target beside the run, in the mean of {len(apart_M):,}"


def _moved(subject: Subject, base: Scores, outcome: Outcome) -> np.ndarray:
  """Returns which earlier scores are not equal to the bit; tilted ones where hint and strength are the same."""
  cut, scores = outcome
  (hint_N, gate_N, _), (other_N, opened_N, _) = subject.hints(subject.data.tokens), subject.hints(cut.data.tokens)
  same_N = (gate_N == opened_N) & (hint_N == other_N)
  same_N &= subject.boosts(base, subject.data.tokens) == subject.boosts(scores, cut.data.tokens)
  moved_N = scores.model_nll_N != base.model_nll_N
  moved_N |= same_N & (scores.nll_N != base.nll_N)
  moved_N |= same_N & gate_N & (scores.hint_nll_N != base.hint_nll_N)
  return moved_N & cut.earlier_N


def sample_targets(subject: Subject, cuts: Sequence[Cut]) -> np.ndarray:
  """Returns targets for whole distributions: those at the cuts, and others up to the last cut, half of them tilted."""
  rng = chance()
  documents = [document for batch in subject.batches[: max(cut.batches for cut in cuts)] for document in batch]
  places = np.concatenate([np.arange(d.target_slice.start, d.target_slice.stop) for d in documents])
  at_cuts = np.concatenate([cut.targets for cut in cuts])
  # Of the targets of one chunk a scan returns one distribution: those at the cuts come first.
  is_near = np.zeros(len(subject.scores.nll_N), bool)
  for target in at_cuts:
    is_near[max(target - _largest_chunk(subject.settings), 0) : target + _largest_chunk(subject.settings)] = True
  places = places[~is_near[places]]
  gate_N = subject.hints(subject.data.tokens).gate_N
  tilted = places[gate_N[places]]
  extra = [rng.choice(x, min(len(x), _EXTRA_SAMPLES // 2), replace=False) for x in (tilted, places) if len(x)]
  return np.unique(np.concatenate([at_cuts, *extra]))


def put_likely_tokens(subject: Subject, cuts: Sequence[Cut], samples: dict[int, np.ndarray]) -> list[Cut]:
  """Returns cuts with the most probable token in place of every other target: where a cheat gains most, if it is so."""
  hint_N, gate_N, _ = subject.hints(subject.data.tokens)
  changed = []
  for cut in cuts:
    tokens_N1, bytes_N1 = cut.data.tokens.copy(), cut.data.token_bytes
    free = [t for t in cut.targets.tolist() if t in samples and not (gate_N[t] and tokens_N1[t + 1] == hint_N[t])]
    for t in free[::2]:
      order = samples[t].argsort()[::-1]
      tokens_N1[t + 1] = next(x for x in order if x not in (subject.data.tokens[t + 1], subject.settings.model.bos_id))
    changed.append(cut._replace(data=ValidationData(tokens_N1, bytes_N1)))
  return changed


def _largest_chunk(settings: Settings) -> int:
  config = settings.ttt
  others = (
    [config.short.chunk_size, *(size for _, size in config.short.score_first_steps)] if config.short.score_first else []
  )
  return max(config.chunk_size, *others, 1)


def full(subject: Subject, samples: dict[int, np.ndarray], wanted: np.ndarray) -> Check:
  """All that were asked for are there, sum to 1, and give target and hint the scores that the run gave them.

  Args:
    samples: of the targets that were asked for.
    wanted: these targets, ascending.
  """
  name, dtype = "distributions are full", subject.settings.train.compute_dtype
  targets, limit = np.array(sorted(samples), np.int64), _SAME_MACHINE[dtype]
  # Of several in one chunk the evaluator returns one: in the place of a target only one shortly before may stand.
  before = np.concatenate([[-math.inf], targets])[np.searchsorted(targets, wanted, side="right")]
  if len(missing := wanted[wanted - before >= _largest_chunk(subject.settings)]):
    return Check(name, False, f"the evaluator left out {len(missing)} of {len(wanted)}, first at target {missing[0]}")
  logp = np.stack([samples[int(t)] for t in targets]).astype(np.float64)
  token = subject.data.tokens[targets + 1]
  hint_N, gate_N, _ = subject.hints(subject.data.tokens)
  hint, gate = hint_N[targets], gate_N[targets]
  at = np.arange(len(targets))
  off = np.abs(np.exp(logp).sum(axis=1) - 1)
  worst = int(np.nan_to_num(off, nan=np.inf).argmax())
  if logp.shape[1] != subject.settings.model.vocab_size or not off[worst] <= _SUM_ERROR:
    return Check(name, False, f"the probabilities at target {targets[worst]} miss 1 by {off[worst]:.1e}")
  tilted_hint = _tilted_hint(subject, subject.scores, targets)
  expected = {
    "its target": (token, subject.scores.nll_N[targets], np.ones(len(targets), bool)),
    "its hint": (hint, tilted_hint, gate),
  }
  apart = 0.0
  for what, (tokens, nll, where) in expected.items():
    differs = np.where(where, np.abs(nll + logp[at, tokens]), 0)
    worst = int(np.nan_to_num(differs, nan=np.inf).argmax())
    if not differs[worst] <= limit:
      text = f"the distribution at target {targets[worst]} gives {what} {-logp[worst, tokens[worst]]:.5f} nats"
      return Check(name, False, f"{text}, the run {nll[worst]:.5f}")
    apart = max(apart, float(differs[worst]))
  if biased := _biased(-logp[at, token] - subject.scores.nll_N[targets], limit, dtype):
    return Check(name, False, biased)
  top = int((gate & (logp.argmax(axis=1) == hint)).sum())
  text = (
    f"{len(targets)} targets, {int(gate.sum())} tilted, {top} of them with the hint on top: |Σp − 1| ≤ {off.max():.0e}"
  )
  return Check(name, True, f"{text}, scores within {apart:.0e} nats")


def fixed_before(subject: Subject, samples: dict[int, np.ndarray], outcomes: Sequence[Outcome]) -> Check:
  """A token put in place of a target is scored with the probability that the run had given it before."""
  name, limit = "a score is that of a distribution fixed before", _SAME_MACHINE[subject.settings.train.compute_dtype]
  hint_N, gate_N, _ = subject.hints(subject.data.tokens)
  beta_N, compared, tilted, apart = subject.boosts(subject.scores, subject.data.tokens), 0, 0, 0.0
  for cut, scores in outcomes:
    for t, token in zip(cut.targets.tolist(), cut.new_tokens.tolist(), strict=True):
      is_hint = gate_N[t] and token == hint_N[t]
      if is_hint:
        expected = float(subject.scores.hint_nll_N[t])
      elif t in samples:
        expected = -float(samples[t][token])
        if gate_N[t]:
          expected -= _log_normalizer(float(subject.scores.hint_nll_N[t]), beta_N[t])
      else:
        continue
      compared, tilted = compared + 1, tilted + bool(gate_N[t])
      differs = abs(float(scores.model_nll_N[t]) - expected)
      if not differs <= limit:
        what = "its hint" if is_hint else f"token {token}"
        text = f"{what} in place of target {t} is scored {scores.model_nll_N[t]:.5f} nats"
        return Check(name, False, f"{text}, the distribution that scored the target gave it {expected:.5f}")
      apart = max(apart, differs)
  if not compared:
    return Check(name, None, "not checked: no document is long enough for a cut")
  return Check(name, True, f"{compared} targets replaced, {tilted} of them with a hint; within {apart:.0e} nats")


def _tilted_hint(subject: Subject, scores: Scores, targets: np.ndarray) -> np.ndarray:
  """Nats of the hint after the tilt towards it."""
  beta = subject.boosts(scores, subject.data.tokens)[targets]
  hint_nll = scores.hint_nll_N[targets].astype(np.float64)
  return hint_nll - beta + np.array([_log_normalizer(*pair) for pair in zip(hint_nll, beta, strict=True)])


def _log_normalizer(hint_nll: float, beta: float) -> float:
  q = math.exp(-max(hint_nll, 0.0))
  return math.log((1 - q) + q * math.exp(beta))


class _EnoughError(Exception):
  pass


@dataclasses.dataclass
class Evaluator:
  """The evaluator that scored a run, called as the run calls it; replays share what is compiled.

  Args:
    settings: of the run.
    params: of its artifact.
    mesh: has the axis `data`.
    data: the run's stream.
  """

  settings: Settings
  params: Params
  mesh: Mesh
  data: ValidationData

  def __post_init__(self):
    self._params = {name: jnp.asarray(value) for name, value in self.params.items()}

  @functools.cached_property
  def _programs(self) -> ttt.Programs:
    return ttt.Programs(self.settings, self.mesh)

  @functools.cached_property
  def _sampling(self) -> ttt.Programs:
    return self._programs.sampling()

  def evaluate(self, data: ValidationData, batches: int) -> Scores:
    """See `Evaluate`; the evaluation ends after the last batch that is asked for."""
    return self._score(data, batches, ttt.Options(), self._programs)[0]

  def sample(self, targets: np.ndarray, batches: int) -> dict[int, np.ndarray]:
    """Returns log-probabilities of all tokens at targets of the run's stream, as far as its first `batches` batches."""
    return self._score(self.data, batches, ttt.Options(sample=targets), self._sampling)[1]

  def _score(
    self, data: ValidationData, batches: int, options: ttt.Options, programs: ttt.Programs
  ) -> tuple[Scores, dict[int, np.ndarray]]:
    last: Record | None = None

    def after_batch(done: int, record: Record) -> None:
      nonlocal last
      last = record
      if done >= batches:
        raise _EnoughError

    with tempfile.TemporaryDirectory(prefix="pgolf-") as folder:
      options = dataclasses.replace(options, folder=Path(folder), after_batch=after_batch)
      with contextlib.suppress(_EnoughError):
        ttt.evaluate(self.settings, self._params, data, self.mesh, options, programs)
      # Copies: the arrays may be those of files in the folder.
      arrays = [np.array(x) for x in (last.nll_N, last.model_nll_N, last.hint_nll_N, last.times_N)]
    return Scores(*arrays), last.distributions
