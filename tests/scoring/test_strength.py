"""Strengths of tilts learnt online: against the definition target by target, and what must hold of them."""

import jax.nn
import numpy as np
import pytest

from pgolf_jax.scoring.strength import SHIFTS, SLOPES, Strengths, tilted

KINDS = 3


def hints(count=400, seed=0):
  """Nats, hits and kinds of hints; of the first kind nine of ten are right, of the last one of ten."""
  rng = np.random.default_rng(seed)
  kind = rng.integers(0, KINDS, count)
  nll = np.clip(rng.gamma(1.0, 2.0, count), 1e-6, 15).astype(np.float32)
  return nll, rng.random(count) < np.array([0.9, 0.5, 0.1])[kind], kind


def one_by_one(nll, is_right, kind):
  """The definition: every expert's probability of each target, weights by Bayes' rule, and the mixture's odds."""
  experts = [(a, b) for a in SLOPES for b in SHIFTS]
  weights = np.full((KINDS, len(experts)), 1 / len(experts))
  strengths = []
  for h, right, k in zip(nll.astype(float), is_right, kind, strict=True):
    q = np.exp(-h)
    odds = np.log(q / (1 - q))
    told = np.array([1 / (1 + np.exp(-(a * odds + b))) for a, b in experts])
    mixed = weights[k] @ told
    strengths.append(np.log(mixed / (1 - mixed)) - odds)
    weights[k] *= told if right else 1 - told
    weights[k] /= weights[k].sum()
  return np.array(strengths)


@pytest.mark.parametrize("sizes", [(400,), (1, 0, 99, 300)])
def test_strengths_are_those_of_the_definition_however_the_targets_are_divided(sizes):
  strengths, cuts = Strengths(KINDS), np.cumsum(sizes)[:-1]
  parts = zip(*(np.split(x, cuts) for x in hints()), strict=True)
  np.testing.assert_allclose(np.concatenate([strengths.learn(*p) for p in parts]), one_by_one(*hints()), atol=2e-5)


def test_a_strength_depends_on_earlier_targets_of_its_kind_alone():
  nll, is_right, kind = hints()
  before = Strengths(KINDS).learn(nll, is_right, kind)
  for at in (0, 57, 399):
    other = is_right.copy()
    other[at:] ^= True
    np.testing.assert_array_equal(Strengths(KINDS).learn(nll, other, kind)[: at + 1], before[: at + 1])
  other = is_right ^ (kind == 1)
  after = Strengths(KINDS).learn(nll, other, kind)
  np.testing.assert_array_equal(after[kind != 1], before[kind != 1])
  assert not np.array_equal(after[kind == 1], before[kind == 1])


def test_no_expert_is_better_than_the_mixture_by_more_than_the_logarithm_of_their_number():
  nll, is_right, kind = hints(5000)
  model = np.where(is_right, nll, -np.log(-np.expm1(-nll)))  # two tokens: the hint and the other
  losses = tilted(model, nll, is_right, Strengths(KINDS).learn(nll, is_right, kind))
  odds = -nll - np.log(-np.expm1(-nll))
  for k in range(KINDS):
    best = min(
      np.logaddexp(0, np.where(is_right, -1, 1) * (a * odds + b))[kind == k].sum() for a in SLOPES for b in SHIFTS
    )
    assert losses[kind == k].sum() <= best + np.log(len(SLOPES) * len(SHIFTS)) + 1e-3
  assert losses.sum() < 0.8 * model.sum()


def test_hints_that_are_certain_or_impossible_leave_everything_finite():
  nll = np.array([0.0, -1e-6, 1e-9, 40.0, 120.0] * 2, np.float32)
  is_right = np.arange(10) < 5
  strengths = Strengths(1).learn(nll, is_right, np.zeros(10, int))
  model = np.where(is_right, nll, 3.0)
  assert np.isfinite(strengths).all() and np.isfinite(tilted(model, nll, is_right, strengths)).all()


@pytest.mark.parametrize("boost", [-3.0, 0.0, 1.5, 20.0])
def test_a_tilt_on_the_host_is_a_full_distribution(boost):
  logp = np.asarray(jax.nn.log_softmax(np.random.default_rng(0).normal(0, 3, 64).astype(np.float32)))
  hint = np.arange(64) == 7
  after = -tilted(-logp, np.full(64, -logp[7]), hint, np.full(64, boost))
  assert np.exp(after.astype(float)).sum() == pytest.approx(1, abs=1e-6)
  assert after[7] - after[8] == pytest.approx(logp[7] - logp[8] + boost, abs=1e-5)
