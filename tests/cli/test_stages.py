"""Which stages run, and on how many devices."""

import dataclasses
import errno

import jax
import pytest
from tiny_model import SETTINGS, write_data

from pgolf_jax import stages
from pgolf_jax.errors import UserError
from pgolf_jax.quantize.make import Made
from pgolf_jax.run_folder import RunFolder, made_from
from pgolf_jax.runtime import files
from pgolf_jax.runtime.distributed import usable_devices
from pgolf_jax.settings import DataConfig


@pytest.mark.parametrize("micro_batches, devices", [(1, 1), (6, 6), (8, 8), (12, 6), (7, 7)])
def test_a_run_takes_as_many_devices_as_can_share_a_step(micro_batches, devices):
  assert jax.device_count() == 8
  assert len(usable_devices(micro_batches)) == devices


@pytest.fixture
def made(tmp_path, monkeypatch):
  """A run whose stages are complete, of which one runs in no time: (run, names of the stages that ran, run them)."""
  write_data(tmp_path / "data")
  settings = dataclasses.replace(SETTINGS, data=DataConfig(path=str(tmp_path / "data")))
  ran = []

  def stage(name, write):
    def act(run, mesh):
      ran.append(name)
      write(run)
      return {"bpb": 1.5, "steps": 1, "weights": "w"}

    return act

  writes = {
    "train": lambda run: run.metrics.write_text("{}\n"),
    "plain": lambda run: None,
    "artifact": lambda run: run.artifact.write_bytes(b"artifact"),
    "ttt": lambda run: None,
  }
  monkeypatch.setattr(stages, "STAGES", {name: stage(name, write) for name, write in writes.items()})
  monkeypatch.setattr(stages, "table", lambda run: "")

  def again():
    ran.clear()
    assert stages.run(settings, tmp_path / "run", list(writes)) == 0
    return list(ran)

  assert again() == list(writes)
  return RunFolder(tmp_path / "run"), again


def test_shards_that_a_later_stage_lacks_are_refused_before_the_first(tmp_path, monkeypatch):
  write_data(tmp_path / "data")
  (tmp_path / "data/fineweb_val_bytes_000000.bin").unlink()
  settings = dataclasses.replace(SETTINGS, data=DataConfig(path=str(tmp_path / "data")))
  ran = []
  monkeypatch.setattr(
    stages, "STAGES", {"train": lambda run, mesh: ran.append("train") or {"weights": "w", "steps": 0}}
  )
  monkeypatch.setattr(stages, "table", lambda run: "")
  with pytest.raises(UserError, match="no fineweb_val_bytes_"):
    stages.run(settings, tmp_path / "run", ["train", "plain"])
  assert not ran and not (tmp_path / "run").exists()
  assert stages.run(settings, tmp_path / "run", ["train"]) == 0 and ran == ["train"]


def test_a_budget_that_the_code_alone_fills_is_refused():
  settings = dataclasses.replace(SETTINGS, quantize=dataclasses.replace(SETTINGS.quantize, budget_bytes=50_000))
  with pytest.raises(UserError, match=r"budget_bytes=50,000 leaves no room for an artifact: the code alone takes 8\d,"):
    stages.make_artifact(None, settings, None, fit=True)


def test_complete_stages_are_skipped_and_stale_ones_done_again(made, tmp_path):
  run, again = made
  assert again() == []
  run.artifact.write_bytes(b"by pgolf quantize")
  run.finish("artifact", {"bpb": 1.7}, made_from(run, "artifact", tmp_path / "data"))
  assert again() == ["ttt"]
  assert again() == []
  run.artifact.unlink()
  assert again() == ["artifact", "ttt"]
  (run.path / "results.json").write_text("{")
  assert again() == ["train", "plain", "artifact", "ttt"]


def test_quantize_reports_on_its_artifact_and_leaves_the_old_one_until_then(made, monkeypatch, tmp_path):
  run, again = made
  monkeypatch.setattr(stages, "_score_artifact", lambda run, mesh, made: {"bpb": 1.25})
  new = Made(b"another artifact", run.settings.quantize, {})
  with monkeypatch.context() as patch:
    patch.setattr(stages, "write_bytes", lambda path, data: write_half(path))
    with pytest.raises(OSError, match="No space"):
      stages.replace_artifact(run, None, new)
  assert run.artifact.read_bytes() == b"artifact" and again() == []
  stages.replace_artifact(run, None, new)
  assert run.artifact.read_bytes() == b"another artifact" and run.results()["artifact"]["bpb"] == 1.25
  assert again() == ["ttt"]


def write_half(path):
  with files.replacing(path) as partial:
    partial.write_bytes(b"anoth")
    raise OSError(errno.ENOSPC, "No space left on device")
