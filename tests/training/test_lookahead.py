"""Nesterov's momentum on the average of the parameters' changes: its arithmetic, its state, its cost."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_resume import ONE_LENGTH, SETTINGS, data  # noqa: F401
from test_step import SEQ_LEN, params, rows, settings  # noqa: F401

from pgolf_jax.errors import UserError
from pgolf_jax.model import params as parameters
from pgolf_jax.plan import estimate
from pgolf_jax.run_folder import RunFolder, read_metrics
from pgolf_jax.runtime.distributed import data_mesh
from pgolf_jax.settings import check
from pgolf_jax.settings.load import changed
from pgolf_jax.training import Schedule
from pgolf_jax.training.loop import Trainer
from pgolf_jax.training.optimizer import Hyper, LookaheadState, ahead, with_lookahead
from pgolf_jax.training.step import TrainStep


def steps(given, params, rows, devices, betas=(0.0, 0.6, 0.4)):  # noqa: F811
  """The state after one step for each β, on the host."""
  step = TrainStep(given, data_mesh(jax.devices()[:devices]))
  program, state = step.lower(SEQ_LEN, looping=True).compile(), step.init(params)
  for beta in betas:
    state, _ = program(state, step.inputs(rows, 0.7, 0.9, lookahead=beta))
  for x, declared in zip(jax.tree.leaves(state), jax.tree.leaves(step.abstract), strict=True):
    assert (x.shape, x.dtype, x.sharding) == (declared.shape, declared.dtype, declared.sharding)
  return jax.tree.map(np.asarray, state)


def test_the_gradient_is_taken_ahead_and_the_way_there_is_part_of_the_change():
  """Against the algorithm as published: buffers of the last weights and of the direction, weights changed in place."""
  curvature, rate, decay = np.array([1.0, 30.0]), 0.02, 0.9
  betas = [0.0, 0.0, 0.7, 0.5, 0.6, 0.0, 0.3]
  w = last = np.array([3.0, -2.0])
  direction, wanted = np.zeros(2), []
  for beta in betas:
    w = w + beta * direction
    w = w - rate * curvature * w
    direction = decay * direction + (1 - decay) * (w - last)
    last = w
    wanted.append(w)

  inner = optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), lambda g, state, params, **_: (jax.tree.map(lambda x: -rate * x, g), state)
  )
  optimizer = with_lookahead(inner)
  hyper = Hyper.of(dataclasses.replace(SETTINGS.optimizer, lookahead_decay=decay))
  params = {"w": jnp.array([3.0, -2.0])}  # noqa: F811
  state = optimizer.init(params)
  for beta, expected in zip(betas, wanted, strict=True):
    grads = {"w": curvature * ahead(params, state, beta)["w"]}
    updates, state = optimizer.update(grads, state, params, hyper=hyper, lookahead=beta)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], expected, rtol=1e-5)


@pytest.mark.slow
def test_without_a_distance_every_bit_is_the_recipes(params, rows):  # noqa: F811
  recipe = steps(settings(), params, rows, 1, betas=(0.0, 0.0))
  still = steps(settings(lookahead=0.5), params, rows, 1, betas=(0.0, 0.0))
  for a, b in zip(
    jax.tree.leaves(recipe), jax.tree.leaves(still._replace(opt_state=still.opt_state.inner)), strict=True
  ):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_eight_devices_look_ahead_like_one(params, rows):  # noqa: F811
  given = settings(lookahead=0.5, lookahead_decay=0.5, clip_scope="global")
  one, eight = (steps(given, params, rows, devices) for devices in (1, 8))
  elsewhere = steps(given, params, rows, 1, betas=(0.0, 0.0, 0.0))
  assert isinstance(eight.opt_state, LookaheadState)
  for name, before in params.items():
    change = np.linalg.norm(one.params[name] - before)
    assert np.linalg.norm(eight.params[name] - one.params[name]) <= 1e-3 * change, name
    if change:
      assert np.linalg.norm(elsewhere.params[name] - one.params[name]) > 1e-2 * change, name


def test_it_costs_one_copy_of_the_parameters():
  size = 4 * sum(math.prod(shape) for shape in parameters.shapes(settings().model).values())
  recipe, looking = (
    estimate.memory(TrainStep(settings(lookahead=beta), data_mesh()).trace(SEQ_LEN, True)) for beta in (0.0, 0.5)
  )
  assert looking["arguments"] - recipe["arguments"] == size


@pytest.mark.slow
def test_a_run_that_stopped_goes_on_with_the_same_bits(tmp_path, data):  # noqa: F811
  train = dataclasses.replace(ONE_LENGTH, iterations=12, checkpoint_every_steps=0)
  looking = dataclasses.replace(SETTINGS.optimizer, lookahead=0.6, lookahead_decay=0.8)
  given = dataclasses.replace(SETTINGS, train=train, optimizer=looking)
  mesh = data_mesh(jax.devices()[:1])
  whole = Trainer(RunFolder(tmp_path / "whole", given), mesh, data).train()[0]
  halves = RunFolder(tmp_path / "halves", changed(given, {"train.stop_step": 6}))
  Trainer(halves, mesh, data).train()
  config = halves.path / "config.toml"
  config.write_text(config.read_text().replace("stop_step = 6", "stop_step = 12"))
  resumed = Trainer(RunFolder(halves.path), mesh, data).train()[0]
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
    np.testing.assert_array_equal(a, b)
  still = changed(given, {"optimizer.lookahead_from": 0.99, "optimizer.lookahead_until": 1.0})
  Trainer(RunFolder(tmp_path / "still", still), mesh, data).train()
  losses = [[x["loss"] for x in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("whole", "still")]
  assert losses[0][:2] == losses[1][:2] and losses[0][2] != losses[1][2]  # the third step is the first that looks


def test_the_distance_follows_the_learning_rate_between_its_ends():
  given = changed(SETTINGS, {"optimizer.lookahead": 0.6, "train.iterations": 100, "train.seq_change_warmup_steps": 0})
  plans = [Schedule(given).plan(step, 0.0) for step in range(100)]
  assert [plan.lookahead > 0 for plan in plans] == [15 <= step < 75 for step in range(100)]
  assert plans[40].lookahead == pytest.approx(0.6 * plans[40].lr_scale) and plans[40].lr_scale < 0.8


def test_ends_in_the_wrong_order_are_refused():
  given = changed(SETTINGS, {"optimizer.lookahead": 0.6, "optimizer.lookahead_from": 0.8})
  with pytest.raises(UserError, match=r"lookahead_from=0\.8 must be less than optimizer\.lookahead_until=0\.75"):
    check.check(given)
