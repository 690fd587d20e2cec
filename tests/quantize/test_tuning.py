"""Tuning between the stages of rounding: what moves, what it is worth, and that devices do not matter."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_model import SETTINGS, random_params, with_quantize, write_data

from pgolf_jax.data.shards import list_shards
from pgolf_jax.quantize import make, tuning
from pgolf_jax.quantize.artifact import read
from pgolf_jax.quantize.artifact.tensors import unbank
from pgolf_jax.quantize.calibrate import draw_rows
from pgolf_jax.quantize.fisher import Curvature, Statistics
from pgolf_jax.quantize.rate import STAGES, Solver
from pgolf_jax.quantize.tuning import Tuner
from pgolf_jax.runtime.distributed import AXIS, data_mesh
from pgolf_jax.scoring import plain
from pgolf_jax.settings import QuantizeConfig

FREE = "mlp.proj"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  write_data(folder)
  return folder


def with_errors() -> dict[str, np.ndarray]:
  """All matrices before the MLP's second one with errors, as rounding makes them."""
  rng = np.random.default_rng(3)
  weights = {name: np.array(value, np.float32) for name, value in unbank(random_params()).items()}
  for name in (n for n in weights if ".attn.c_" in n or ".mlp.fc" in n):
    weights[name] += 0.01 * rng.standard_normal(weights[name].shape).astype(np.float32)
  return weights


def divergence(weights: dict[str, np.ndarray], data) -> float:
  """From the model without errors, on rows that tuning does not draw."""
  rows_BxT = draw_rows(list_shards(data, "train"), seq_len=SETTINGS.train.seq_len, count=16, seed=99)
  params = {name: np.array(value, np.float32) for name, value in random_params().items()}
  banked = {
    n: np.stack([weights[m] for m in tuning.names_in(n, 2)]) if n in tuning.BANKS else weights[n] for n in params
  }
  return plain.divergence(SETTINGS, params, banked, rows_BxT, data_mesh())


def tuned(data, steps: int = 12) -> dict[str, np.ndarray]:
  settings = with_quantize(calibration_micro_batches=2)
  error = {name: 0.01 for name in with_errors() if FREE in name}
  return Tuner(settings, random_params(), data).tune(with_errors(), error, steps=steps, stage=0)


def test_free_weights_make_up_for_the_errors_of_others_and_nothing_else_moves(data):
  before, after = with_errors(), tuned(data)
  assert before.keys() == after.keys()
  for name, value in before.items():
    moved = np.abs(after[name] - value).max()
    # Twelve steps of at most 0.02 of the error, falling to 0, and Adam's first moment behind them.
    assert (0 < moved < 12 * 0.02 * 0.01) if FREE in name else moved == 0, name
  assert divergence(after, data) < 0.9 * divergence(before, data)


def test_other_rows_are_read_at_every_stage_and_the_same_ones_again(data):
  settings, error = SETTINGS, {"blocks.0.mlp.proj.weight": 0.01}
  tuner = Tuner(settings, random_params(), data)
  first, again, other = (tuner.tune(with_errors(), error, steps=2, stage=s) for s in (0, 0, 1))
  name = next(iter(error))
  np.testing.assert_array_equal(first[name], again[name])
  assert np.any(first[name] != other[name])


def test_devices_do_not_matter(data, monkeypatch):
  many = tuned(data, steps=3)
  one = jax.sharding.Mesh(np.array(jax.devices()[:1]), (AXIS,))
  monkeypatch.setattr(tuning, "data_mesh", lambda: one)
  for name, value in tuned(data, steps=3).items():
    # Adam's first step has the gradient's sign: an element whose gradient is rounding noise may go either way.
    assert np.mean(np.abs(value - many[name]) > 1e-6) < 1e-3, name


def test_stages_are_rounded_one_after_another_from_what_tuning_left():
  rng = np.random.default_rng(0)
  names = ["blocks.0.mlp.proj.weight", "blocks.0.mlp.fc.weight", "blocks.0.attn.c_q.weight", "tok_emb.weight"]
  weights = {name: rng.standard_normal((16, 8)).astype(np.float32) for name in names} | {
    "scale": np.ones(4, np.float32)
  }
  curvature = Curvature(np.eye(8) / 8, np.ones(16))
  solver = Solver(
    weights,
    Statistics(dict.fromkeys(names, curvature), {"scale": 1.0}, 0.0, 0),
    QuantizeConfig(method="rate", trellis=False),
  )
  step, calls = 0.2, []
  plainly = solver.solve(step)

  class Halving:
    def divergence(self, given):
      """The parts that come later are said to cost more, but for the last."""
      changed = [n for n in given if np.any(given[n] != weights[n])]
      return next(names.index(n) for n in changed if n != "scale") % 3

    def tune(self, given, error, *, steps, stage):
      assert steps == 5
      calls.append((stage, sorted(error)))
      for name, size in error.items():
        assert size == pytest.approx(np.sqrt(np.mean((plainly[name].dequantize() - weights[name]) ** 2)), rel=1e-4)
      return {name: value / 2 if name in error else value for name, value in given.items()}

  made = solver.solve(step, Halving(), tune_steps=5)
  order = [names[2], names[1], names[0], names[3]]
  assert calls == [(stage, sorted([*order[stage + 1 :], "scale"])) for stage in range(len(STAGES) - 1)]
  for halvings, name in enumerate(order):
    worst = np.abs(made[name].dequantize() - weights[name] / 2**halvings).max()
    np.testing.assert_array_less(worst, 0.6 * np.abs(np.diff(np.unique(made[name].dequantize()))).max())
  assert made["scale"].dequantize() == pytest.approx(np.full(4, 1 / 8), rel=0.1)
  np.testing.assert_array_equal(made[order[0]].q_MxN, plainly[order[0]].q_MxN)


def test_an_artifact_of_tuned_weights_loses_less_in_as_many_bytes(data):
  settings = with_quantize(method="rate", calibration_micro_batches=2, calibration_batches=1, step=0.0005)
  maker = make.Maker(settings, random_params(), data)
  without, tuned = (maker.artifact(dataclasses.replace(settings.quantize, tune_steps=steps)) for steps in (0, 4))
  assert len(tuned) == pytest.approx(len(without), rel=0.01)
  losses = [divergence(unbank(read(artifact).params()), data) for artifact in (without, tuned)]
  assert losses[1] < 0.85 * losses[0]


def test_the_step_is_sought_before_anything_is_tuned(data, monkeypatch):
  monkeypatch.setattr(make, "_rounder", lambda *arguments: None)
  tried = []

  def artifact(maker, config):
    tried.append(config)
    # A bit a parameter for each halving, and tuned weights take a little more.
    bits = 4 - np.log2(config.step / 0.01) + 0.001 * (config.tune_steps > 0)
    return bytes(int(bits * maker._parameters / 8))

  monkeypatch.setattr(make.Maker, "artifact", artifact)
  config = QuantizeConfig(method="rate", step=0.001, tune_steps=7)
  maker = make.Maker(dataclasses.replace(SETTINGS, quantize=config), random_params(), data)
  budget = maker._parameters // 2
  made, fitted = maker.fit(config, budget)
  assert made.tune_steps == 7
  assert 0.999 * budget <= len(fitted) <= budget
  steps = [config.tune_steps for config in tried]
  assert steps == sorted(steps)
  assert steps.count(7) <= 2
  tried.clear()
  made, _ = maker.fit(config, 10**9)  # more than the finest step takes
  assert min(each.step for each in tried) == made.step == pytest.approx(config.step * make.SCALES["rate"].least)
  assert [each.tune_steps for each in tried].count(7) == 1
