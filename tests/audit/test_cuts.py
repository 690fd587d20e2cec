"""Where the audit cuts, and which distributions it asks for: nobody who made the scores can choose that."""

import dataclasses
import importlib

import numpy as np
import pytest
from case import STRICT, Run
from ttt_case import chained_documents

from pgolf_jax.audit import replays
from pgolf_jax.audit.recheck import Subject
from pgolf_jax.audit.replay import draw_cuts, full, sample_targets
from pgolf_jax.scoring.record import HintsEvent, ScoreEvent

LONG = chained_documents([40, 31, 52, 36, 45, 38, 47, 33, 34, 35, 37, 39])


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
  """A run of six batches with a phase after the second, and its scores."""
  run, folder = Run(STRICT, LONG), tmp_path_factory.mktemp("scores")
  run.score(folder)
  return run, Subject.read(folder, run.settings, run.data)


def stream_of(batches: int) -> Subject:
  """A stream of that many documents, each a batch of its own, with a phase after the third."""
  data = chained_documents(np.random.default_rng(1).integers(10, 60, batches).tolist())
  trace = [HintsEvent(tuple(range(batches)))]
  trace += [ScoreEvent(i, (i,), int(i > 2), "a", i) for i in range(batches)]
  return Subject(STRICT, data, None, trace)


def test_cuts_miss_a_share_of_the_targets_as_rarely_as_the_page_says(monkeypatch):
  subject, rng, draws = stream_of(20), np.random.default_rng(0), 300
  monkeypatch.setattr(importlib.import_module("pgolf_jax.audit.replay"), "chance", lambda: rng)
  drawn = [{cut.batches - 1 for cut in draw_cuts(subject, 2)} for _ in range(draws)]
  assert all({0, 3} <= batches and len(batches) in (2, 3, 4) for batches in drawn)
  targets = np.array([documents[0].targets for documents in subject.batches])
  for cheats in ({19}, set(range(10, 20)), set(range(4, 20))):
    share = targets[list(cheats)].sum() / targets.sum()
    missed = np.mean([not batches & cheats for batches in drawn])
    assert missed == pytest.approx((1 - share) ** 2, abs=3 * 0.5 / draws**0.5)


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_few_batches_are_cut_several_times(batches):
  cuts = draw_cuts(stream_of(batches), 3)
  assert len(cuts) == 3 and {cut.batches for cut in cuts} == set(range(1, batches + 1))


def test_lower_scores_long_after_the_phase_are_caught(scored):
  run, subject = scored
  late_N = np.zeros(len(LONG.tokens) - 1, bool)
  for documents in subject.batches[3:]:
    for document in documents:
      late_N[document.target_slice] = True
  late_N &= ~subject.hints(LONG.tokens).gate_N
  nll_N, model_N = (np.where(late_N, x * np.float32(0.3), x) for x in subject.scores[:2])
  lie = dataclasses.replace(subject, scores=subject.scores._replace(nll_N=nll_N, model_nll_N=model_N))
  moved, *_ = replays(lie, run.evaluator)
  assert moved.passed is False and "it did not make these scores" in moved.finding


def test_a_distribution_may_be_left_out_only_for_one_before_it_in_the_chunk(scored):
  run, subject = scored
  cuts = draw_cuts(subject, 2)
  wanted = sample_targets(subject, cuts)
  samples = run.evaluator.sample(wanted, max(cut.batches for cut in cuts))
  assert len(samples) < len(wanted) and full(subject, samples, wanted).passed
  for left_out in (min(samples), max(samples)):
    fewer = {t: logp for t, logp in samples.items() if abs(t - left_out) >= STRICT.ttt.chunk_size}
    check = full(subject, fewer, wanted)
    assert check.passed is False and "the evaluator left out" in check.finding
  assert not full(subject, {}, wanted).passed


def test_scores_may_not_all_be_lower_than_their_distributions_say(scored):
  """By less than one of them may, for a program that returns distributions rounds otherwise."""
  run, subject = scored
  cuts = draw_cuts(subject, 2)
  wanted = sample_targets(subject, cuts)
  samples = run.evaluator.sample(wanted, max(cut.batches for cut in cuts))
  lower = dataclasses.replace(subject, scores=subject.scores._replace(nll_N=subject.scores.nll_N - np.float32(1.8e-4)))
  check = full(lower, samples, wanted)
  assert check.passed is False and "in the mean of" in check.finding
