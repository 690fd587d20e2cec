"""From weights to a submission folder: bytes counted, refused where over, and scored from the folder alone."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import SETTINGS, random_params, with_quantize, write_data

from pgolf_jax.errors import UserError
from pgolf_jax.quantize import stage
from pgolf_jax.quantize.artifact import format
from pgolf_jax.settings.config import QuantizeConfig
from pgolf_jax.settings.load import from_dict
from pgolf_jax.submission import accounting, package
from pgolf_jax.submission.rescore import score


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  write_data(folder)
  return folder


@pytest.fixture(scope="module")
def made(data):
  return stage.make(SETTINGS, random_params(), data)


def test_artifact_holds_the_settings_but_no_paths(made):
  config = format.read(made.data).config
  assert from_dict(config).model == SETTINGS.model
  assert "path" not in config["data"]


def test_artifact_is_near_the_weights(made):
  params = random_params()
  _, found = format.dequantize(made.data)
  assert set(found) == set(params)
  for name, value in params.items():
    assert found[name].shape == value.shape
    assert np.linalg.norm(found[name] - value) <= 0.2 * np.linalg.norm(value), name


def test_account_adds_up(made):
  found = accounting.account(made.data, starter=b"s" * 10, archive=b"a" * 100, files=3, tokenizer=7, budget=50)
  assert found.artifact == len(made.data)
  assert found.total == len(made.data) + 110
  assert found.over == found.total - 50
  header = found.by_stream["header"]
  assert sum(found.by_tensor.values()) == pytest.approx(len(made.data) - header)
  assert found.by_tensor["blocks.0.mlp.fc.weight"] > 30_000


def test_needed_code_reaches_kernels_and_sources_but_not_training_loops():
  modules = accounting.needed_modules()
  needed = {"pgolf_jax.quantize.artifact.format", "pgolf_jax.model.gpt", "pgolf_jax.kernels.segment_attention.xla"}
  assert needed <= set(modules)
  assert not {"pgolf_jax.cli", "pgolf_jax.training.loop", "pgolf_jax.quantize.gptq", "pgolf_jax.data.prepare"} & set(
    modules
  )
  code, files = accounting.archive(modules)
  assert files > len(modules)  # C sources
  assert accounting.archive(modules)[0] == code
  assert len(code) < 200_000


def test_over_budget_is_refused_with_a_way_out(made):
  plain = format.read(made.data)
  zstd = format.write(plain.config, plain.tensors, "zstd")
  found = accounting.account(zstd, starter=b"", archive=b"", files=0, tokenizer=0, budget=len(zstd) - 1000)
  with pytest.raises(
    UserError, match=r"1,000 over the budget .*codec='entropy' saves .*times as wide would fit .*--fit"
  ):
    package.require_fit(found, zstd)
  package.require_fit(accounting.account(zstd, starter=b"", archive=b"", files=0, tokenizer=0, budget=len(zstd)), zstd)


def test_suggested_clips_do_fit(made, data):
  budget = int(len(made.data) * 0.9)
  found = accounting.account(made.data, starter=b"", archive=b"", files=0, tokenizer=0, budget=budget)
  with pytest.raises(UserError) as refused:
    package.require_fit(found, made.data)
  multiplier = float(str(refused.value).split("clips ")[1].split(" times")[0])
  again = stage.make(
    with_quantize(**vars(stage.scaled(QuantizeConfig(calibration_batches=5), multiplier))), random_params(), data
  )
  assert len(again.data) == pytest.approx(budget, rel=0.01)


def test_folder_scores_from_itself_alone(made, data, tmp_path):
  wanted = score(made.data, data, ttt=False)
  log = tmp_path / "run.log"
  log.write_text("trained")
  folder = tmp_path / "submission"
  package.build(folder, made.data, tokenizer=None, logs=[log], score=wanted, name="tiny")
  found = package.verify(folder, data, expected_bpb=wanted["bpb"])
  assert found["targets"] == 399
  summary = json.loads((folder / "submission.json").read_text())
  shipped = sum((folder / name).stat().st_size for name in ("format.pgolf", "code.tar.xz", "evaluate.py"))
  assert summary["bytes_total"] == shipped
  assert (folder / "logs" / "run.log").read_text() == "trained"
  with pytest.raises(UserError, match="not empty"):
    package.build(folder, made.data, tokenizer=None, logs=[], score=None, name="tiny")
  with pytest.raises(UserError, match="but the run reported 1"):
    package.verify(folder, data, expected_bpb=1.0)
  (folder / "format.pgolf").write_bytes(made.data[:-1])
  with pytest.raises(UserError, match="does not score from its own folder"):
    package.verify(folder, data, expected_bpb=None)


def test_score_is_that_of_the_dequantised_weights(made, data):
  from pgolf_jax.model.gpt import bind
  from pgolf_jax.model.loss import packed_nll

  _, params = format.dequantize(made.data)
  tokens = np.fromfile(data / "fineweb_val_000000.bin", "<u2")[512:].astype(np.int32)
  params = {name: jnp.asarray(v) for name, v in params.items()}
  nats = 0.0
  for first in range(0, 399, 64):
    row = tokens[first : min(first + 64, 399) + 1][None]
    nll = packed_nll(bind(SETTINGS.model, params), row, looping=True, seq_len=32, evaluation=True, dtype=jnp.float32)
    nats += float(nll.sum())
  found = score(made.data, data, ttt=False)
  assert found["loss"] == pytest.approx(nats / 399, rel=1e-5)


def sized(bytes_at_one: float, parameters: int):
  """Artifacts as long as the rule of thumb says, a little off."""
  tried = []

  def attempt(config: QuantizeConfig) -> bytes:
    multiplier = config.mlp_clip_sigmas / QuantizeConfig().mlp_clip_sigmas
    tried.append(multiplier)
    return bytes(int(bytes_at_one - 0.9 * parameters / 8 * np.log2(multiplier)))

  return attempt, tried


@pytest.mark.parametrize("budget", [300_000, 410_000, 520_000])
def test_fit_fills_the_budget(budget):
  attempt, tried = sized(400_000, 800_000)
  config, found = stage.fit(QuantizeConfig(), attempt, budget, 800_000)
  assert 0.9995 * budget <= len(found) <= budget
  assert len(attempt(config)) == len(found)
  assert len(tried) <= 6


def test_fit_takes_the_finest_grids_where_all_fit_and_refuses_where_none_does():
  attempt, _ = sized(400_000, 800_000)
  config, _ = stage.fit(QuantizeConfig(), attempt, 10**7, 800_000)
  assert config.mlp_clip_sigmas == pytest.approx(0.2 * QuantizeConfig().mlp_clip_sigmas)
  with pytest.raises(UserError, match="below 50,000 bytes"):
    stage.fit(QuantizeConfig(), attempt, 50_000, 800_000)


@pytest.mark.parametrize("verb", ["quantize", "package", "generate"])
def test_help_has_an_example(verb):
  done = subprocess.run(
    [sys.executable, "-c", f"from pgolf_jax.cli import main; main(['{verb}', '--help'])"],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0
  assert f"Example: pgolf {verb}" in " ".join(done.stdout.split())
