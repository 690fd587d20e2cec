"""Calibration: the moments are those of the inputs of one plain forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import MODEL, SETTINGS, random_params, with_quantize, write_data

from pgolf_jax.data.shards import list_shards
from pgolf_jax.errors import UserError
from pgolf_jax.model import packed, segments
from pgolf_jax.model.gpt import bind
from pgolf_jax.quantize.calibrate import draw_rows, moments, row_count


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  write_data(folder)
  return list_shards(folder, "train")


def inputs_of_matrices(params, rows, respect_documents: bool) -> dict[str, list[np.ndarray]]:
  """Every matrix's inputs, once for each of its uses, in one plain forward pass."""
  length, form = rows.shape[1], {"looping": True, "dtype": jnp.float32}
  if respect_documents:
    context = packed(rows, bos_id=1, seq_len=length, **form)
  else:
    context = segments(jnp.zeros_like(rows), max_segment=length, **form)

  def forward(params):
    inputs: dict[str, list] = {}

    def keep(name: str, x) -> None:
      inputs.setdefault(name, []).append(x.reshape(-1, x.shape[-1]))

    def watch(name, x, y):
      if name != "tok_emb.weight" and not name.endswith(("c_k.weight", "c_v.weight")):
        keep(name, x)
      return y

    keep("tok_emb.weight", bind(MODEL, params)(rows, context, watch=watch).hidden)
    return inputs

  return {name: [np.asarray(x, np.float64) for x in uses] for name, uses in jax.jit(forward)(params).items()}


@pytest.fixture(scope="module")
def rows(shards):
  return draw_rows(shards, seq_len=32, count=11, seed=3)  # no multiple of the 8 devices


@pytest.fixture(scope="module")
def calibrations(rows):
  """By whether attention stays within documents."""
  settings = {respect: with_quantize(calibration_respect_documents=respect) for respect in (False, True)}
  return {respect: moments(settings[respect], random_params(), rows, step_tokens=64) for respect in settings}


@pytest.mark.parametrize("respect_documents", [False, True])
def test_moments_are_those_of_the_inputs(rows, calibrations, respect_documents):
  calibration = calibrations[respect_documents]
  inputs = inputs_of_matrices(random_params(), jnp.asarray(rows), respect_documents)
  assert len(inputs["blocks.0.attn.c_q.weight"]) == 2  # a looped layer adds up its uses
  for name, uses in inputs.items():
    x = np.concatenate(uses)
    np.testing.assert_allclose(calibration.hessian[name], x.T @ x / 5, rtol=1e-4, atol=1e-4 * np.abs(x.T @ x / 5).max())
    np.testing.assert_allclose(calibration.act_rms[name], np.sqrt(np.mean(x**2, axis=0)), rtol=1e-4)
  for layer in range(2):
    for other in ("c_k", "c_v"):
      shared = calibration.hessian[f"blocks.{layer}.attn.{other}.weight"]
      assert np.array_equal(shared, calibration.hessian[f"blocks.{layer}.attn.c_q.weight"])


def test_documents_change_the_moments_only_if_respected(calibrations):
  apart, joined = (calibrations[respect].hessian["tok_emb.weight"] for respect in (True, False))
  assert not np.allclose(apart, joined, rtol=1e-3)


def test_rows_are_stretches_of_the_shards_without_repetition(shards):
  streams = [np.fromfile(path, "<u2")[512:] for path in shards]
  windows = {tuple(s[i : i + 32]): (n, i) for n, s in enumerate(streams) for i in range(len(s) - 31)}
  rows = draw_rows(shards, seq_len=32, count=20, seed=1)
  places = [windows[tuple(row)] for row in rows]
  assert len(set(places)) == 20
  assert {shard for shard, _ in places} == {0, 1}
  assert np.array_equal(rows, draw_rows(shards, seq_len=32, count=20, seed=1))
  assert not np.array_equal(rows, draw_rows(shards, seq_len=32, count=20, seed=2))


def test_rows_are_drawn_again_once_all_have_been_drawn(shards):
  assert draw_rows(shards, seq_len=100, count=40, seed=0).shape == (40, 100)


def test_shards_shorter_than_a_row_are_refused(shards):
  with pytest.raises(UserError, match="rows of 4096 tokens"):
    draw_rows(shards, seq_len=4096, count=1, seed=0)


def test_row_count_follows_the_scope():
  assert row_count(SETTINGS, world=4) == 5 * 2
  assert row_count(with_quantize(calibration_scope="all"), world=4) == 5 * 2 * 4
  record = dataclasses.replace(SETTINGS, train=dataclasses.replace(SETTINGS.train, batch_tokens=786432, seq_len=3072))
  assert row_count(record, world=8) == 5 * 32
