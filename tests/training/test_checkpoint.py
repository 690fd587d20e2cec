"""A damaged checkpoint gives way to the one before, whichever of its files is damaged and however."""

import itertools
import shutil

import jax
import numpy as np
import pytest
from test_resume import SETTINGS

from pgolf_jax.model import params as parameters
from pgolf_jax.runtime.distributed import data_mesh
from pgolf_jax.runtime.files import Damaged
from pgolf_jax.training.checkpoint import Checkpoints
from pgolf_jax.training.step import TrainStep

PROGRESS = {"elapsed": 1.25, "metrics": [{"step": 1, "loss": 2.5}]}


@pytest.fixture(scope="module")
def step():
  return TrainStep(SETTINGS, data_mesh(jax.devices()[:1]))


@pytest.fixture(scope="module")
def states(step):
  """The states of steps 1 and 2."""
  initial = jax.jit(lambda key: parameters.init(SETTINGS.model, key))(jax.random.key(0))
  one = step.init(initial)
  return {1: one, 2: jax.tree.map(lambda x: x + 1, one)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, step, states):
  folder = tmp_path_factory.mktemp("run") / "checkpoints"
  checkpoints = Checkpoints(folder, step)
  for number, state in states.items():
    checkpoints.save(number, state, PROGRESS | {"elapsed": float(number)})
  checkpoints.close()
  return folder


def assert_is(newest, number, states):
  step, state, progress = newest
  assert step == number and progress["elapsed"] == number and progress["metrics"] == PROGRESS["metrics"]
  for found, expected in zip(jax.tree.leaves(state), jax.tree.leaves(states[number]), strict=True):
    np.testing.assert_array_equal(found, expected)


HOW = ("truncated", "flipped", "emptied", "removed", "a folder")


def damage(path, how):
  before = path.read_bytes()
  path.unlink()
  match how:
    case "truncated":
      path.write_bytes(before[: len(before) // 2])
    case "flipped":
      middle = len(before) // 2
      path.write_bytes(before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :] if before else b"x")
    case "emptied":
      path.write_bytes(b"")
    case "a folder":
      path.mkdir()


def test_any_damage_to_the_newest_gives_the_state_before_or_the_same_bits(tmp_path, step, states, saved, caplog):
  paths = sorted(path for path in (saved / "2").rglob("*") if path.is_file())
  # Data's names are drawn anew each time, and some data does not count any more: every second file by size.
  data = sorted((path for path in paths if path.parent.name == "d"), key=lambda path: path.stat().st_size)[::-2]
  files = [path.relative_to(saved) for path in [*(path for path in paths if path.parent.name != "d"), *data]]
  assert len(files) > 12
  fell_back = set()
  for number, (file, how) in enumerate(zip(files, itertools.cycle(HOW), strict=False)):
    folder = tmp_path / str(number) / "checkpoints"
    shutil.copytree(saved, folder)
    damage(folder / file, how)
    caplog.clear()
    checkpoints = Checkpoints(folder, step)
    newest = checkpoints.restore_newest()
    assert newest is not None, (file, how)
    assert_is(newest, newest[0], states)  # some files are beside the point, such as marks of success
    if newest[0] == 1:
      fell_back.add(file)
      said = [record.getMessage() for record in caplog.records if record.name == "pgolf"]
      assert ["Training goes on after step 1" in message for message in said] == [True]
      checkpoints.save(2, states[2], PROGRESS | {"elapsed": 2.0})  # its place is free
      checkpoints._manager.wait_until_finished()
      assert_is(checkpoints.restore_newest(), 2, states)
    checkpoints.close()
  assert len(fell_back) > 4


@pytest.mark.parametrize("name, new", [("elapsed", b'"elapsed": 2.5'), ("metrics", b'"loss": 2.25')])
def test_a_figure_changed_in_the_progress_is_damage(tmp_path, step, states, saved, name, new):
  shutil.copytree(saved, tmp_path / "checkpoints")
  file = tmp_path / "checkpoints/2/progress/metadata"
  old = {"elapsed": b'"elapsed": 2.0', "metrics": b'"loss": 2.5'}[name]
  assert old in file.read_bytes()
  file.write_bytes(file.read_bytes().replace(old, new))
  checkpoints = Checkpoints(tmp_path / "checkpoints", step)
  assert_is(checkpoints.restore_newest(), 1, states)
  checkpoints.close()


def test_with_none_left_training_begins_anew_and_the_average_is_refused(tmp_path, step, saved, caplog):
  folder = tmp_path / "checkpoints"
  shutil.copytree(saved, folder)
  (folder / "7").write_text("no folder")
  checkpoints = Checkpoints(folder, step)
  assert checkpoints.steps() == [1, 2]
  for number in (1, 2):
    shutil.rmtree(folder / str(number) / "average")
  with pytest.raises(Damaged, match="The checkpoint of step 2 is damaged"):
    checkpoints.restore_average(2)
  assert checkpoints.restore_newest() is None and checkpoints.steps() == []
  assert "Training goes on from the start" in caplog.messages[-1]
  checkpoints.close()
