"""The average of the tail, and its mixture with the last weights."""

import dataclasses

import jax
import numpy as np
import pytest
from test_resume import ONE_LENGTH, SETTINGS, data  # noqa: F401

from pgolf_jax.model import params as parameters
from pgolf_jax.run_folder import RunFolder
from pgolf_jax.runtime.distributed import data_mesh
from pgolf_jax.settings.load import changed
from pgolf_jax.training import Schedule
from pgolf_jax.training.checkpoint import Checkpoints
from pgolf_jax.training.loop import Trainer
from pgolf_jax.training.step import TrainStep

TAIL = dataclasses.replace(
  SETTINGS,
  train=dataclasses.replace(
    ONE_LENGTH, iterations=10, checkpoint_every_steps=0, val_loss_every=1, ema_decay=0.999, average_from=0.5
  ),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):  # noqa: F811
  """(run, its last state, its result, the weights after each step)."""
  run, weights = RunFolder(tmp_path_factory.mktemp("whole") / "run", TAIL), []

  def keep(step, params):
    weights.append(jax.tree.map(np.array, params))
    return {}

  state, result = Trainer(run, data_mesh(jax.devices()[:1]), data, validate=keep).train()
  return run, state, result, weights


def test_the_tail_counts_alike_and_nothing_before_it(whole):
  _, state, _, weights = whole
  for name, average in state.average.items():
    np.testing.assert_allclose(average, np.mean([w[name] for w in weights[5:]], axis=0), rtol=1e-5, atol=1e-6)


def test_the_decay_takes_over_where_it_is_less():
  train = dataclasses.replace(TAIL.train, iterations=100, ema_decay=0.75, average_from=0.9)
  schedule = Schedule(dataclasses.replace(TAIL, train=train))
  decays = [schedule.plan(step, 0.0).ema_decay for step in range(100)]
  assert decays[:90] == [0.75] * 90 and decays[90:] == pytest.approx([0, 1 / 2, 2 / 3, *[0.75] * 7])


def test_a_run_that_stops_in_the_tail_goes_on_with_the_same_average(tmp_path, data, whole):  # noqa: F811
  run = RunFolder(tmp_path / "run", changed(TAIL, {"train.stop_step": 7, "train.val_loss_every": 0}))
  mesh = data_mesh(jax.devices()[:1])
  Trainer(run, mesh, data).train()
  config = run.path / "config.toml"
  config.write_text(config.read_text().replace("stop_step = 7", "stop_step = 10"))
  resumed, _ = Trainer(RunFolder(run.path), mesh, data).train()
  for a, b in zip(jax.tree.leaves(whole[1].average), jax.tree.leaves(resumed.average), strict=True):
    np.testing.assert_array_equal(a, b)


def test_an_older_checkpoint_knows_of_no_tail():
  schedule = Schedule(TAIL)
  schedule.restore({"seq_len": 16, "changed_at": -1, "looping": 0})
  assert schedule.averaged_since is None and schedule.plan(7, 0.0).ema_decay == 0.0


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_the_weights_that_training_gives_are_a_mixture(whole, share):
  run, state, result, _ = whole
  step = TrainStep(changed(TAIL, {"train.average_share": share}), data_mesh(jax.devices()[:1]))
  checkpoints = Checkpoints(run.checkpoints, step, writes=False)
  given = checkpoints.restore_average(10)
  checkpoints.close()
  assert (parameters.content_hash(given) == result["weights"]) == (share == 1)
  for name in given:
    wanted = share * np.asarray(state.average[name]) + (1 - share) * np.asarray(state.params[name])
    np.testing.assert_allclose(given[name], wanted, rtol=1e-5, atol=1e-7)
