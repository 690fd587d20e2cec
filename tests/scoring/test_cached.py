"""Cached evaluation: the same as the exact one where nothing is learnt, and legal where something is."""

import dataclasses

import jax
import numpy as np
import pytest
from ttt_case import SETTINGS, changed, random_documents, random_params

from pgolf_jax.runtime.distributed import data_mesh
from pgolf_jax.scoring import ttt

CACHED = changed(SETTINGS, method="cached")


def evaluate(settings, data):
  return ttt.evaluate(settings, random_params(), data, data_mesh(jax.devices()[:1]))


def test_without_learning_kept_keys_are_those_computed_again():
  # Within one window, that is: beyond it a kept key has seen tokens that have left the window since.
  data = random_documents([30, 9, 47, 41, 22])
  exact, cached = (evaluate(changed(s, lora__lr=0.0), data) for s in (SETTINGS, CACHED))
  np.testing.assert_allclose(cached.model_nll_N, exact.model_nll_N, atol=1e-5)


@pytest.mark.slow
def test_kept_values_are_those_with_the_first_layers_mixed_in():
  """Of a model with value residuals and dense skips."""
  model = dataclasses.replace(SETTINGS.model, value_residual=True, dense_skips=1)
  settings = [dataclasses.replace(changed(s, lora__lr=0.0), model=model) for s in (SETTINGS, CACHED)]
  rng = np.random.default_rng(0)
  new = {"value_shares": (2,), "dense_skip_weights": (2, 32), "dense_skip_biases": (2,)}
  params = random_params() | {name: rng.standard_normal(shape).astype(np.float32) for name, shape in new.items()}
  data, mesh = random_documents([30, 9, 47]), data_mesh(jax.devices()[:1])
  exact, cached = (ttt.evaluate(s, params, data, mesh) for s in settings)
  np.testing.assert_allclose(cached.model_nll_N, exact.model_nll_N, atol=1e-5)


def test_the_first_chunks_are_those_of_the_exact_evaluation_and_later_ones_differ():
  data = random_documents([30, 47])
  exact, cached = evaluate(SETTINGS, data), evaluate(CACHED, data)
  size = SETTINGS.ttt.chunk_size
  # The second chunk's update is the same, so the third is the first to see keys of older adapters.
  np.testing.assert_allclose(cached.model_nll_N[:size], exact.model_nll_N[:size], atol=1e-5)
  assert np.abs(cached.model_nll_N[3 * size : 29] - exact.model_nll_N[3 * size : 29]).max() > 1e-4
