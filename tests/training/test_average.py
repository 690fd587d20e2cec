"""The weights that training gives: the average, or its mixture with the last step's."""

import dataclasses

import jax
import numpy as np
import pytest
from test_resume import ONE_LENGTH, SETTINGS, data  # noqa: F401

from pgolf_jax.model import params as parameters
from pgolf_jax.run_folder import RunFolder
from pgolf_jax.runtime.distributed import data_mesh
from pgolf_jax.settings.load import changed
from pgolf_jax.training.checkpoint import Checkpoints
from pgolf_jax.training.loop import Trainer
from pgolf_jax.training.step import TrainStep

SHORT = dataclasses.replace(SETTINGS, train=dataclasses.replace(ONE_LENGTH, iterations=4, checkpoint_every_steps=0))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):  # noqa: F811
  """(run, its last state, its result)."""
  run = RunFolder(tmp_path_factory.mktemp("whole") / "run", SHORT)
  return run, *Trainer(run, data_mesh(jax.devices()[:1]), data).train()


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_the_weights_that_training_gives_are_a_mixture(whole, share):
  run, state, result = whole
  step = TrainStep(changed(SHORT, {"train.average_share": share}), data_mesh(jax.devices()[:1]))
  checkpoints = Checkpoints(run.checkpoints, step, writes=False)
  given = checkpoints.restore_average(4)
  checkpoints.close()
  assert (parameters.content_hash(given) == result["weights"]) == (share == 1)
  for name in given:
    wanted = share * np.asarray(state.average[name]) + (1 - share) * np.asarray(state.params[name])
    np.testing.assert_allclose(given[name], wanted, rtol=1e-5, atol=1e-7)
