"""Every check of the evidence that a run left, with evidence that is wrong."""

import dataclasses
import json

import numpy as np
import pytest
from ttt_case import SETTINGS, changed

from pgolf_jax import audit
from pgolf_jax.audit import one_config
from pgolf_jax.data.shards import read_shard, shard_path, write_shard
from pgolf_jax.errors import Check, checks_summary, checks_table
from pgolf_jax.run_folder import RunFolder


def by_name(checks):
  return {check.name: check.passed for check in checks}


def copy(folder, to):
  for path in folder.iterdir():
    (to / path.name).write_bytes(path.read_bytes())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  from pgolf_jax.data.folder import ensure_default_data

  return ensure_default_data(tmp_path_factory.mktemp("data"), 600, is_caseops=True)


@pytest.fixture
def damaged(prepared, tmp_path):
  """A copy of the prepared data that a test may damage."""
  copy(prepared, tmp_path)
  return tmp_path


def test_prepared_data_holds(prepared):
  checks = list(audit.data_checks(prepared))
  assert [check.passed for check in checks] == [True] * 3, checks_table(checks)


def test_a_wrong_sidecar_is_caught(damaged):
  path = shard_path(damaged, "val_bytes", 0)
  values = read_shard(path).copy()
  values[np.flatnonzero(values > 1)[0]] += 1
  write_shard(path, values)
  assert not by_name(audit.data_checks(damaged))["data: text"]


def test_a_validation_document_in_training_is_caught(damaged):
  train, val = (read_shard(shard_path(damaged, split, 0)) for split in ("train", "val"))
  end = np.flatnonzero(val == 1)[1]
  write_shard(shard_path(damaged, "train", 0), np.concatenate([train, val[:end]]))
  assert not by_name(audit.data_checks(damaged))["data: overlap"]


def test_an_artifact_over_the_budget_is_caught(tmp_path):
  artifact = tmp_path / "artifact.pgolf"
  artifact.write_bytes(b"x" * 1000)
  assert not audit.size(artifact, 1000).passed
  assert audit.size(artifact, 16_000_000).passed


def test_clocks():
  settings = dataclasses.replace(SETTINGS, train=dataclasses.replace(SETTINGS.train, max_wallclock_seconds=600.0))
  good = {"train": {"seconds": 599.9, "recompilations_in_clock": 0}, "ttt": {"seconds": 550.0}}
  assert by_name(audit.clocks(good, settings)) == {"clock: train": True, "clock: ttt": True}
  late = {"train": {"seconds": 640.0}, "ttt": {"seconds": 650.0}}
  assert by_name(audit.clocks(late, settings)) == {"clock: train": False, "clock: ttt": False}
  recompiled = {"ttt": {"seconds": 10.0, "recompilations_in_clock": 2}}
  assert by_name(audit.clocks(recompiled, settings)) == {"clock: train": None, "clock: ttt": False}


def test_a_first_loss_of_other_data_is_caught(tmp_path):
  rng = np.random.default_rng(0)
  tokens = np.concatenate([[1], rng.integers(2, 48, 2000)])
  write_shard(shard_path(tmp_path, "train", 0), tokens)
  run = RunFolder(tmp_path / "run", SETTINGS)
  line = {"step": 1, "loss": 3.8712, "seq_len": 512, "looping": False}
  run.metrics.write_text(json.dumps(line) + "\n")
  expected = float(audit.first_step(run, tmp_path).finding.split()[-1])
  run.metrics.write_text(json.dumps({**line, "loss": expected}) + "\n")
  assert audit.first_step(run, tmp_path).passed
  run.metrics.write_text(json.dumps({**line, "loss": expected + 0.1}) + "\n")
  assert not audit.first_step(run, tmp_path).passed


def test_runs_of_a_set_share_a_config(tmp_path):
  runs = [RunFolder(tmp_path / str(seed), dataclasses.replace(SETTINGS, seed=seed)) for seed in (1, 2)]
  assert one_config(runs).passed
  other = RunFolder(tmp_path / "other", changed(dataclasses.replace(SETTINGS, seed=3), chunk_size=16))
  assert not one_config([*runs, other]).passed
  again = RunFolder(tmp_path / "again", dataclasses.replace(SETTINGS, seed=2))
  assert not one_config([*runs, again]).passed


def test_a_summary_tells_outcomes_apart():
  held, broken, unmade = (Check(name, passed, "") for name, passed in (("a", True), ("b", False), ("c", None)))
  assert checks_summary([held, held]) == "2 of 2 checks hold"
  assert checks_summary([held, unmade]) == "1 of 2 checks hold; 1 could not be made"
  assert checks_summary([held, broken, unmade]) == "1 of 3 checks hold; broken: b; 1 could not be made"
