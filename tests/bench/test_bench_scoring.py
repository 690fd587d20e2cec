"""The benchmark of ways of scoring on a set of two tiny runs: pairs by document, and going on from its file."""

import math
import shutil

import jax
import numpy as np
import pytest
import tomli_w
from ttt_case import SETTINGS, random_documents, random_params

from pgolf_jax.bench import scoring
from pgolf_jax.cli import main
from pgolf_jax.data.shards import shard_path, write_shard
from pgolf_jax.report.statistics import ratio
from pgolf_jax.run_folder import RunFolder
from pgolf_jax.runtime.distributed import data_mesh
from pgolf_jax.runtime.files import read_sealed
from pgolf_jax.scoring import ttt
from pgolf_jax.settings.load import changed, to_dict

LENGTHS = [40, 9, 75, 41, 22, 60]
GRID = ("--set", "boost=2.0,0.5")


@pytest.fixture(scope="module", autouse=True)
def weights():
  """Random weights of a seed stand for the average of a run, on one device."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(scoring.stages, "averaged_params", lambda run, mesh: random_params(run.settings.seed))
    patch.setattr(scoring, "data_mesh", lambda: data_mesh(jax.devices()[:1]))
    yield


def write_data(folder, seed: int = 0) -> None:
  for split, values in zip(("val", "val_bytes"), random_documents(LENGTHS, seed), strict=True):
    write_shard(shard_path(folder, split, 0), values)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """A set of two runs that say they are trained."""
  data, folder = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("set")
  write_data(data)
  for seed in (1, 2):
    changes = {"data.path": str(data), "seed": seed, "ttt.method": "cached"}
    settings = changed(SETTINGS, changes | {"train.seq_schedule": (), "train.seq_len": 64})
    (folder / f"seed={seed}").mkdir()
    (folder / f"seed={seed}" / "config.toml").write_text(tomli_w.dumps(to_dict(settings)))
  return folder


def bench(*words) -> int:
  return main(["bench", "scoring", *map(str, words), "--weights", "averaged", "--debug"])


def test_ways_are_compared_by_document_over_all_runs(runs, tmp_path, capsys, monkeypatch):
  file = tmp_path / "figures.json"
  assert bench(runs, "--json", file, "--documents", 5, *GRID) == 0
  rows = read_sealed(file)["rows"]
  first, second = ([row for key, row in rows.items() if f"boost={boost} " in key] for boost in ("2.0", "0.5"))
  assert len(rows) == 4 and len(first) == len(second) == 2
  bits = [np.mean([row["nats"] for row in way], axis=0) / math.log(2) for way in (first, second)]
  size = np.array(first[0]["bytes"])
  value, error, p, _ = ratio(bits[1] - bits[0], size)
  lines = capsys.readouterr().out.splitlines()
  assert "5 documents, 2 runs" in lines[-4]
  cells = [f"{bits[1].sum() / size.sum():.5f}", f"{value:+.5f}", f"{error:.5f}", f"{p:.1g}"]
  assert [cell for cell in cells if cell not in lines[-1].split()] == []
  assert "+" not in lines[-2] and f"{bits[0].sum() / size.sum():.5f}" in lines[-2].split()

  monkeypatch.setattr(ttt, "evaluate", None)  # cannot be called
  assert bench(runs, "--json", file, "--documents", 5, *GRID) == 0
  assert capsys.readouterr().out.splitlines()[-1] == lines[-1]


def test_one_run_in_the_way_it_is_configured(runs, capsys):
  assert bench(runs / "seed=1") == 0
  assert "as configured" in capsys.readouterr().out.splitlines()[-1]


def test_scores_of_other_weights_targets_or_settings_are_not_handed_out(runs, tmp_path, monkeypatch):
  """Though the run's name is the same; the same data in another place are the same."""
  config, file, scored = tmp_path / "seed=1" / "config.toml", tmp_path / "figures.json", []

  def score(*inputs):
    scored.append(inputs)
    return {"nats": [1.0], "nats_without_hints": [1.0], "bytes": [1], "targets": 1, "seconds": 1.0}

  def scores_anew(changes=(), seed=0) -> bool:
    before, settings = len(scored), RunFolder(runs / "seed=1").settings
    shutil.rmtree(config.parent, ignore_errors=True)
    config.parent.mkdir()
    write_data(config.parent, seed)
    config.write_text(tomli_w.dumps(to_dict(changed(settings, {"data.path": str(config.parent), **dict(changes)}))))
    assert bench(config.parent, "--json", file, "--documents", 2) == 0
    return len(scored) > before

  monkeypatch.setattr(scoring, "_score", score)
  assert bench(runs / "seed=1", "--json", file, "--documents", 2) == 0 and len(scored) == 1
  assert not scores_anew()
  assert scores_anew({"ttt.lora.lr": 0.5}) and scores_anew(seed=1)
  monkeypatch.setattr(scoring.stages, "averaged_params", lambda run, mesh: random_params(3))
  assert scores_anew() and not scores_anew()


@pytest.mark.parametrize(
  ("words", "message"),
  [(("--set", "model_dim=64"), "no setting of ttt or hints"), (("--set", "chunk_size=8"), "give the whole name")],
)
def test_what_changes_the_weights_is_refused(runs, words, message, capsys):
  assert main(["bench", "scoring", str(runs), *words]) == 1
  assert message in capsys.readouterr().err


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
  assert main(["bench", "scoring", str(tmp_path)]) == 1
  assert "neither a run nor a set of runs" in capsys.readouterr().err
