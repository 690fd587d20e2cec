"""A run folder: what each stage read and left, by hash, and files of it that are damaged."""

import dataclasses
import json

import pytest
from tiny_model import SETTINGS, write_data

from pgolf_jax import run_table
from pgolf_jax.cli import main
from pgolf_jax.data.folder import locate_prepared
from pgolf_jax.errors import UserError
from pgolf_jax.parity import compare
from pgolf_jax.run_folder import MetricsWriter, RunFolder, made_from, read_metrics
from pgolf_jax.runtime.files import file_hash
from pgolf_jax.settings import DataConfig

LINES = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25}]


@pytest.fixture
def data(tmp_path):
  write_data(tmp_path / "data")
  return tmp_path / "data"


@pytest.fixture
def run(tmp_path, data):
  """A run whose stages up to test-time training are complete."""
  run = RunFolder(tmp_path / "run", SETTINGS)
  (run.checkpoints / "3").mkdir(parents=True)
  (run.checkpoints / "3" / "arrays").write_bytes(b"weights")
  run.metrics.write_text('{"step": 1}\n')
  run.scores.mkdir()
  (run.scores / "nll.npy").write_bytes(b"scores")
  run.artifact.write_bytes(b"artifact")
  results = {
    "train": {"steps": 3, "weights": "w"},
    "plain": {"bpb": 1.5},
    "artifact": {"bpb": 1.6},
    "ttt": {"bpb": 1.4},
  }
  for stage, result in results.items():
    run.finish(stage, result, made_from(run, stage, data))
  return run


def changes(run, data):
  """Stage → what is not as it was."""
  stages = [stage for stage in ("train", "plain", "artifact", "ttt") if stage in run.results()]
  return {stage: names for stage in stages if (names := run.changes(stage, made_from(run, stage, data)))}


def test_a_stage_says_by_hash_what_it_read(run, data):
  read = run.results()["artifact"]["made_from"]
  shard = "fineweb_train_000001.bin"
  assert read[shard] == file_hash(data / shard) and read["weights"] == "w"
  assert read["fineweb_val_bytes_000000.bin"] == file_hash(data / "fineweb_val_bytes_000000.bin")
  assert run.results()["ttt"]["made_from"]["artifact.pgolf"] == file_hash(run.artifact)
  assert changes(run, data) == {}


@pytest.mark.parametrize(
  "file, stages",
  [
    ("data/fineweb_train_000000.bin", {"train", "artifact"}),
    ("data/fineweb_val_bytes_000000.bin", {"plain", "artifact", "ttt"}),
    ("data/manifest.json", {"train", "plain", "artifact", "ttt"}),
    ("run/artifact.pgolf", {"artifact", "ttt"}),
    ("run/checkpoints/3/arrays", {"train"}),
    ("run/scores/nll.npy", {"ttt"}),
  ],
)
def test_a_changed_file_makes_the_stages_stale_that_read_or_left_it(tmp_path, run, data, file, stages):
  (tmp_path / file).write_bytes(b"another")
  found = changes(run, data)
  assert set(found) == stages
  assert all(name in str(tmp_path / file) for names in found.values() for name in names)


def test_another_training_makes_what_was_made_of_it_stale(run, data):
  run.finish("train", {"steps": 3, "weights": "v"}, made_from(run, "train", data))
  assert changes(run, data) == {"plain": ["weights"], "artifact": ["weights"]}
  assert [*run.figures()] == ["train"]


def test_another_artifact_makes_later_stages_stale(run, data):
  run.artifact.write_bytes(b"by pgolf quantize")
  run.finish("artifact", {"bpb": 1.7}, made_from(run, "artifact", data))
  assert changes(run, data) == {"ttt": ["artifact.pgolf"]}


def test_figures_of_another_artifact_stand_beside_those_of_this_one_nowhere(run, data):
  audited = {"broken": [], "is_legal": True, "checks": []}
  run.finish("audit", audited, made_from(run, "audit", data))
  (whole,), _ = run_table.find(run.path)
  assert [*run.figures()] == ["train", "plain", "artifact", "ttt", "audit"]
  assert whole["ttt"] == 1.4 and whole["verdict"] == "legal"

  run.artifact.write_bytes(b"by pgolf quantize")
  run.finish("artifact", {"bpb": 1.7}, made_from(run, "artifact", data))

  (row,), _ = run_table.find(run.path)
  assert [*run.figures()] == ["train", "plain", "artifact"]
  assert row["artifact"] == 1.7 and row["ttt"] is None and row["verdict"] == "not audited"
  run.metrics.write_text("")
  assert compare.read(run.path).record.stages.keys() == {compare.AVERAGED, compare.ARTIFACT}


@pytest.mark.parametrize("text", ["", '{"train": {', "[]", "7", "[" * 5000, '{"train": 7}'])
def test_damaged_results_are_as_if_no_stage_had_reported(run, text, caplog):
  (run.path / "results.json").write_text(text)
  assert run.results() == {} == run.results()
  assert len(caplog.messages) == 1 and "results.json" in caplog.messages[0]
  run.finish("plain", {"bpb": 1.5}, {})
  assert list(run.results()) == ["plain"]


def test_a_changed_figure_in_the_results_is_seen(run, caplog):
  path = run.path / "results.json"
  path.write_text(path.read_text().replace("1.4", "1.3"))
  assert list(run.results()) == ["train", "plain", "artifact"]
  assert "what it says of ttt is damaged" in caplog.messages[0]


@pytest.mark.parametrize("damage", ["", '{"step": 1, "lo', "[]\n7\n", None])
def test_metrics_come_back_from_the_checkpoint(tmp_path, damage):
  run = RunFolder(tmp_path / "metrics", SETTINGS)
  path = run.metrics
  if damage is not None:
    path.write_text(damage)
  writer = MetricsWriter(run, LINES, lambda line: {"loss": line["loss"]}, writes=True)
  writer.write({"step": 3, "loss": 2.0})
  writer.close()
  assert read_metrics(path) == [*LINES, {"step": 3, "loss": 2.0}] == writer.lines


@pytest.mark.parametrize("text", ["", "seed = ", "\x00", None])
def test_a_damaged_config_is_written_again_where_settings_are_given(run, text, caplog):
  config = run.path / "config.toml"
  before = config.read_text()
  config.unlink()
  config.mkdir() if text is None else config.write_text(text)
  if text != "":  # an empty file is a config of defaults: other settings
    assert RunFolder(run.path, SETTINGS).settings == SETTINGS
    assert config.read_text() == before and len(caplog.messages) == 1


def test_a_folder_in_the_place_of_a_file_is_removed(run):
  run.artifact.unlink()
  run.artifact.mkdir()
  (run.path / ".submission.partial" / "logs").mkdir(parents=True)  # of a `pgolf package` that was killed
  (run.path / ".results.json.7.partial").write_text("{")
  RunFolder(run.path, SETTINGS)
  assert not run.artifact.exists() and not list(run.path.glob("*.partial"))


def test_results_are_sealed_by_stage(run):
  results = json.loads((run.path / "results.json").read_text())
  assert all(len(result["sha256"]) == 64 for result in results.values())
  assert RunFolder(run.path, dataclasses.replace(SETTINGS)).results()["ttt"]["bpb"] == 1.4


OTHER = dataclasses.replace(SETTINGS, seed=8)


def test_settings_may_be_corrected_as_long_as_nothing_is_made_with_them(tmp_path, run):
  with pytest.raises(UserError, match="was made with other settings \\(seed was 1337, now 8\\)"):
    RunFolder(run.path, OTHER)
  started = RunFolder(tmp_path / "started", SETTINGS)
  (started.path / "run.log").write_text("begun")
  assert RunFolder(tmp_path / "started", OTHER).settings.seed == 8
  assert RunFolder(tmp_path / "started").settings.seed == 8


def test_a_start_that_came_to_nothing_is_cleared_and_work_is_not(tmp_path, run):
  started = RunFolder(tmp_path / "started", SETTINGS)
  started.metrics.write_text("")
  started.clear_start()
  assert not started.path.exists()
  run.clear_start()
  assert run.results() and (run.path / "config.toml").exists()
  other = RunFolder(tmp_path / "other", SETTINGS)
  (other.path / "notes.txt").write_text("mine")
  other.clear_start()
  assert [path.name for path in other.path.iterdir()] == ["notes.txt"]


def test_relative_paths_are_seen_from_where_they_were_given(tmp_path, monkeypatch):
  write_data(tmp_path / "home" / "data")
  given = dataclasses.replace(SETTINGS, data=DataConfig(path="data"))
  monkeypatch.chdir(tmp_path / "home")
  assert RunFolder("runs/a", given).settings == given
  monkeypatch.chdir("/")
  elsewhere = RunFolder(tmp_path / "home/runs/a")
  assert locate_prepared(elsewhere.settings) == tmp_path / "home/data"
  assert elsewhere.given == given and RunFolder(elsewhere.path, given).settings == elsewhere.settings
  inputs = made_from(elsewhere, "train", tmp_path / "home/data")
  monkeypatch.chdir(tmp_path / "home")
  assert made_from(RunFolder("runs/a"), "train", "data") == inputs
  # The tree may be moved as a whole.
  monkeypatch.chdir("/")
  (tmp_path / "home").rename(tmp_path / "moved")
  assert locate_prepared(RunFolder(tmp_path / "moved/runs/a").settings) == tmp_path / "moved/data"
  # A path that leads somewhere from here counts, when it is given again.
  write_data(tmp_path / "here" / "data", seed=1)
  monkeypatch.chdir(tmp_path / "here")
  assert RunFolder(tmp_path / "moved/runs/a", given).settings == given


def test_a_run_that_finds_no_data_leaves_no_folder(tmp_path, capsys):
  out = tmp_path / "runs" / "new"
  config = ["demo", "--data.path", str(tmp_path / "nowhere"), "--out", str(out)]
  assert main(["run", *config]) == 1
  assert "There is no data folder" in capsys.readouterr().err
  assert not out.exists()
