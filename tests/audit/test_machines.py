"""The audit on a machine that is not the run's, or is larger than any that this was written on."""

import dataclasses
import os

import jax
import numpy as np
import pytest
from case import DATA, STRICT, Run
from ttt_case import random_params

from pgolf_jax.audit import replays
from pgolf_jax.audit.recheck import Subject, as_scored
from pgolf_jax.audit.replay import Evaluator
from pgolf_jax.errors import UserError
from pgolf_jax.runtime.distributed import data_mesh
from pgolf_jax.scoring import ttt
from pgolf_jax.scoring.record import HintsEvent, Scores
from pgolf_jax.settings.load import changed


def test_hints_are_counted_again_on_a_machine_of_many_cores(monkeypatch):
  few = Subject(STRICT, DATA, None, [HintsEvent(tuple(range(7)))])
  expected = few.hints(DATA.tokens)
  monkeypatch.setattr(os, "cpu_count", lambda: 224)
  monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(224)), raising=False)
  for here, there in zip(expected, dataclasses.replace(few).hints(DATA.tokens), strict=True):
    np.testing.assert_array_equal(here, there)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def scored(request, tmp_path_factory):
  """A run, and its scores."""
  run, folder = Run(changed(STRICT, {"train.compute_dtype": request.param})), tmp_path_factory.mktemp("scores")
  run.score(folder)
  return run, Subject.read(folder, run.settings, run.data)


NOISE = {"float32": 2e-5, "bfloat16": 0.01}  # nats, as another machine rounds


CASES = [(1, 0, True), (500, 0, False), (0, 0.95, False), (1, 0.5, False)]


@pytest.mark.parametrize(("noises", "lower", "passes"), CASES)
def test_scores_of_another_machine_differ_both_ways(scored, noises, lower, passes):
  """Another machine rounds otherwise; the cuts are then held against a second run here, to the bit.

  Scores that are all a little lower, each by less than one may differ, are no rounding.
  """
  run, subject = scored
  dtype = run.settings.train.compute_dtype
  limit = {"float32": 1e-3, "bfloat16": 0.1}[dtype]
  noise = np.random.default_rng(0).normal(0, noises * NOISE[dtype], len(subject.scores.nll_N))
  arrays = [(x + noise - lower * limit).astype(np.float32) for x in subject.scores[:3]]
  elsewhere = dataclasses.replace(subject, scores=Scores(*arrays, subject.scores.times_N))
  moved, *others = replays(elsewhere, run.evaluator, cuts=2)
  assert moved.passed is passes, moved
  if passes:
    assert "on this machine" in moved.finding and all(check.passed for check in others), others
  elif lower:
    assert "in the mean of" in moved.finding


def test_ranks_of_a_run_are_those_that_it_had(tmp_path):
  """Settings that leave the ranks to the number of devices mean another evaluation on other devices."""
  settings = changed(STRICT, {"train.world_size": 0, "train.micro_batches": 2})
  ttt.evaluate(settings, random_params(), DATA, data_mesh(jax.devices()[:2]), ttt.Options(folder=tmp_path))
  here = as_scored(settings, tmp_path)
  assert (here.train.world_size, here.ttt.chains) == (2, 2)
  subject = Subject.read(tmp_path, settings, DATA)
  checks = list(replays(subject, Evaluator(here, random_params(), data_mesh(jax.devices()[:1]), DATA), cuts=1))
  assert [check.passed for check in checks] == [True] * 3, checks
  assert as_scored(STRICT, tmp_path / "nowhere") == STRICT  # they say it themselves


@pytest.mark.parametrize("text", ["[]", "{}", '{"chains": 1e9}', '{"chains": true}', '{"chains": -1}', "["])
def test_damaged_ranks_are_refused(text, tmp_path):
  (tmp_path / "identity.json").write_text(text)
  with pytest.raises(UserError, match="identity"):
    as_scored(changed(STRICT, {"train.world_size": 0, "ttt.phase.prefix_docs": 0}), tmp_path)
