"""The tilted distribution: normalised, the recipe's formula, and exact where the gate is shut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf_jax.scoring.hints import tilt


def tilted_logp(logits_NxV, hint_N, gate_N, boost_N):
  """Log-probability of every token of the vocabulary in turn as the target."""
  logp_NxV = jax.nn.log_softmax(logits_NxV)
  hint_logp_N = jnp.take_along_axis(logp_NxV, hint_N[:, None], axis=1)[:, 0]

  def of_token(token, logp_N):
    return -tilt(-logp_N, hint_logp_N, jnp.full_like(hint_N, token), hint_N, gate_N, boost_N)

  return jax.vmap(of_token, in_axes=(0, 1), out_axes=1)(jnp.arange(logits_NxV.shape[1]), logp_NxV)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), boost=st.floats(-20, 200), scale=st.sampled_from([0.0, 1.0, 10.0, 80.0]))
def test_sums_to_one_over_the_whole_vocabulary(seed, boost, scale):
  N, V = 8, 300
  rng = np.random.default_rng(seed)
  logits_NxV = jnp.asarray(scale * rng.standard_normal((N, V)), jnp.float32)
  gate_N = jnp.asarray(np.arange(N) % 4 != 0)
  logp_NxV = tilted_logp(logits_NxV, jnp.asarray(rng.integers(0, V, N)), gate_N, gate_N * jnp.float32(boost))
  np.testing.assert_allclose(np.exp(np.asarray(logp_NxV, np.float64)).sum(axis=1), 1, atol=1e-5)


def test_is_the_recipes_formula():
  rng = np.random.default_rng(0)
  N, beta = 1000, 2.625
  q = rng.uniform(size=N)
  nll = rng.exponential(3, size=N)
  target, hint = rng.integers(0, 4, (2, N))
  nll = np.where(target == hint, -np.log(q), nll)
  got = tilt(
    *(jnp.asarray(x, jnp.float32) for x in (nll, np.log(q))),
    *(jnp.asarray(x, jnp.int32) for x in (target, hint)),
    jnp.ones(N, bool),
    jnp.full(N, beta, jnp.float32),
  )
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(
    got, nll - beta * (target == hint) + np.log(1 + q * (np.exp(beta) - 1)), rtol=1e-6, atol=2e-6
  )


def test_leaves_a_shut_position_as_it_is_to_the_bit():
  nll = jnp.asarray([0.1, 3.7, 25.0], jnp.float32)
  shut, boost = jnp.zeros(3, bool), jnp.full(3, 2.625)
  same = jnp.zeros(3, jnp.int32)
  for hint_logp in (0.0, -0.5, -200.0):
    np.testing.assert_array_equal(tilt(nll, jnp.full(3, hint_logp), same, same, shut, boost), nll)


@pytest.mark.parametrize(
  ("hint_logp", "expected_hit", "expected_miss"),
  [
    (0.0, 0.0, 30 + 2.625),  # the model is sure of the hint: a hit stays free, a miss costs β more
    (-1e-9, 0.0, 30 + 2.625),
    (1e-7, 0.0, 30 + 2.625),  # log q above 0 by rounding
    (-1000.0, 1000 - 2.625, 30.0),  # q underflows: no mass to move, yet a hit still gains β
    (-np.inf, np.inf, 30.0),
  ],
)
def test_is_finite_at_the_ends(hint_logp, expected_hit, expected_miss):
  def one(nll, target):
    args = (jnp.asarray([x]) for x in (nll, hint_logp))
    return tilt(*args, jnp.asarray([target]), jnp.asarray([7]), jnp.asarray([True]), jnp.asarray([2.625]))[0]

  np.testing.assert_allclose(one(-min(hint_logp, 0.0), 7), expected_hit, atol=2e-6)
  np.testing.assert_allclose(one(30.0, 3), expected_miss, atol=2e-6)


def test_works_in_low_precision_inputs_and_under_jit():
  nll = jnp.asarray([1.0], jnp.bfloat16)
  args = (jnp.asarray([-0.5], jnp.bfloat16), jnp.asarray([3]), jnp.asarray([3]), jnp.asarray([True]))
  got = jax.jit(tilt)(nll, *args, jnp.asarray([2.625], jnp.float32))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got[0], 1 - 2.625 + np.log(1 + np.exp(-0.5) * (np.exp(2.625) - 1)), rtol=1e-6)
