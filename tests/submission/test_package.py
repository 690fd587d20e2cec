"""From an artifact to a submission folder: bytes counted, refused where over, and scored from the folder alone."""

import errno
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import SETTINGS, random_params, with_quantize, write_data

from pgolf_jax import cli
from pgolf_jax.errors import UserError
from pgolf_jax.model.gpt import bind, packed_nll
from pgolf_jax.quantize.artifact import load, read, writer
from pgolf_jax.quantize.artifact.tensors import Grid, Half, LogGrid, Rows
from pgolf_jax.quantize.make import make, portable, scaled
from pgolf_jax.run_folder import RunFolder
from pgolf_jax.settings import Settings
from pgolf_jax.settings.load import from_dict
from pgolf_jax.submission import bundle, package
from pgolf_jax.submission.evaluate import main, score


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  write_data(folder)
  return folder


@pytest.fixture(scope="module")
def artifact(data, tmp_path_factory):
  """The file of a quantised model."""
  path = tmp_path_factory.mktemp("artifact") / "artifact.pgolf"
  path.write_bytes(make(SETTINGS, random_params(), data).data)
  return path


@pytest.fixture(scope="module")
def scored(artifact, data):
  return score(artifact, data, ttt=False)


def code(size: int = 0) -> bundle.Code:
  return bundle.Code(starter=b"", archive=bytes(size), files=3, requirements=[])


def test_artifact_holds_the_settings_but_no_paths(artifact):
  config = read(artifact.read_bytes()).config
  assert from_dict(config).model == SETTINGS.model
  assert "path" not in config["data"]


def test_artifact_is_near_the_weights(artifact):
  params = random_params()
  settings, loaded = load(artifact)
  assert settings.model == SETTINGS.model
  assert set(loaded) == set(params)
  for name, value in params.items():
    assert loaded[name].shape == value.shape
    assert np.linalg.norm(loaded[name] - value) <= 0.2 * np.linalg.norm(value), name


def test_files_that_are_no_artifact_are_refused(artifact, tmp_path):
  with pytest.raises(UserError, match="There is no artifact"):
    load(tmp_path / "artifact.pgolf")
  stored = read(artifact.read_bytes())
  config = stored.config | {"model": stored.config["model"] | {"num_heads": 2, "num_kv_heads": 2, "rope_dims": 4}}
  (tmp_path / "other.pgolf").write_bytes(writer.write(config, stored.tensors, "zstd"))
  with pytest.raises(UserError, match=r"other\.pgolf: .* has shape .* the artifact's own config gives"):
    load(tmp_path / "other.pgolf")


def test_account_adds_up(artifact):
  data = artifact.read_bytes()
  account = package.count(data, code(110), tokenizer=7, budget=50)
  assert account.artifact == len(data)
  assert account.total == len(data) + 110
  assert account.over == account.total - 50
  header = account.by_stream["header"]
  assert sum(account.by_tensor.values()) == pytest.approx(len(data) - header)
  assert account.by_tensor["blocks.0.mlp.fc.weight"] > 30_000


def test_over_budget_is_refused_with_a_way_out(artifact):
  stored = read(artifact.read_bytes())
  zstd = writer.write(stored.config, stored.tensors, "zstd")
  account = package.count(zstd, code(), budget=len(zstd) - 1000)
  with pytest.raises(
    UserError, match=r"1,000 over the budget .*codec='entropy' saves .*times as wide would fit .*--fit"
  ):
    package.require_fit(account, zstd)
  package.require_fit(package.count(zstd, code(), budget=len(zstd)), zstd)


def test_suggested_clips_do_fit(artifact, data):
  stored = artifact.read_bytes()
  budget = int(len(stored) * 0.9)
  with pytest.raises(UserError) as refused:
    package.require_fit(package.count(stored, code(), budget=budget), stored)
  multiplier = float(str(refused.value).split("clips ")[1].split(" times")[0])
  again = make(with_quantize(**vars(scaled(SETTINGS.quantize, multiplier))), random_params(), data)
  assert len(again.data) == pytest.approx(budget, rel=0.01)


def over_by(number: int, tensors: dict, method: str) -> str:
  """What is said of an artifact that is over its budget by so many bytes."""
  data = writer.write(portable(with_quantize(method=method)), tensors)
  account = package.count(data, code(), budget=len(data) - number)
  with pytest.raises(UserError) as refused:
    package.require_fit(account, data)
  return str(refused.value)


def test_what_would_fit_is_named_by_the_settings_of_the_method():
  zeros = np.zeros(128, np.int32)
  q = np.rint(3 * np.random.default_rng(0).standard_normal((128, 128))).astype(np.int32)
  said = over_by(1000, {"tok_emb.weight": LogGrid(q, zeros - 30, zeros)}, "rate")
  step = SETTINGS.quantize.step * 2 ** (8000 / q.size)
  assert f"a step 1.403 times as wide would fit (quantize.step={step:.4g})" in said and "clip" not in said
  said = over_by(1000, {"tok_emb.weight": Grid(q.astype(np.int8), np.ones(128, np.float16))}, "gptq")
  assert "clips 1.403 times" in said and "quantize.matrix_clip_sigmas=" in said and "quantize.step" not in said


@pytest.mark.parametrize("over", [500, 10_000])
def test_where_grids_cannot_save_enough_a_smaller_model_is_asked_for(over):
  """All matrices are fp16, and the gates' integers have steps that no setting makes coarser."""
  values = np.random.default_rng(0).standard_normal((1024, 64)).astype(np.float16)
  gate = Rows(np.ones((4, 12), np.int8), np.ones(4, np.float16))
  said = over_by(over, {"tok_emb.weight": Half(values), "blocks.0.attn.attn_gate_w": gate}, "gptq")
  assert f"{over:,} over the budget" in said and "train a smaller model" in said and "--fit" not in said


def test_folder_scores_from_itself_alone(artifact, data, scored, tmp_path):
  log = tmp_path / "run.log"
  log.write_text("trained")
  folder = tmp_path / "submission"
  stored = artifact.read_bytes()
  package.build(folder, stored, package.Contents("tiny", logs=[log], score=scored))
  assert package.verify(folder, data, expected_bpb=scored["bpb"])["targets"] == 399
  summary = json.loads((folder / "submission.json").read_text())
  shipped = sum((folder / name).stat().st_size for name in ("artifact.pgolf", "code.tar.xz", "evaluate.py"))
  assert summary["bytes_total"] == shipped
  assert (folder / "logs" / "run.log").read_text() == "trained"
  assert f"{scored['bpb']:.5f} bits per byte, {shipped:,} of" in (folder / "README.md").read_text()


@pytest.fixture
def small_code(monkeypatch):
  """Packing the code takes seconds, and is not looked at here."""
  monkeypatch.setattr(bundle, "code", code)


def test_a_submission_stays_until_the_new_one_is_whole(artifact, tmp_path, small_code):
  folder, stored = tmp_path / "submission", artifact.read_bytes()
  package.build(folder, stored, package.Contents("old"))
  before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

  def refuse(built):
    assert (built / "submission.json").is_file() and built != folder
    raise OSError(errno.ENOSPC, "No space left on device")

  with pytest.raises(OSError, match="No space"):
    package.build(folder, stored, package.Contents("new"), verify=refuse)
  assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
  (tmp_path / ".submission.partial").mkdir()  # of a process that was killed
  (tmp_path / ".submission.before").mkdir()
  package.build(folder, stored, package.Contents("new"))
  assert json.loads((folder / "submission.json").read_text())["name"] == "new"
  assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_of_something_else_is_left_alone(artifact, tmp_path, small_code):
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(UserError, match="not empty"):
    package.build(tmp_path, artifact.read_bytes(), package.Contents("tiny"))
  with pytest.raises(UserError, match="is a file"):
    package.build(tmp_path / "notes.txt", artifact.read_bytes(), package.Contents("tiny"))
  assert (tmp_path / "notes.txt").read_text() == "mine"


def test_other_scores_and_damaged_folders_are_refused(data, tmp_path):
  """A starter that stands in for the evaluator: what it prints is compared, and what it complains of is passed on."""
  starter = tmp_path / "evaluate.py"
  starter.write_text("print('{\"bpb\": 1.5}')")
  with pytest.raises(UserError, match="but the run reported 1"):
    package.verify(tmp_path, data, expected_bpb=1.0)
  starter.write_text("raise SystemExit('The artifact is damaged.')")
  with pytest.raises(UserError, match="does not score from its own folder; it said: The artifact is damaged"):
    package.verify(tmp_path, data, expected_bpb=None)


def test_a_damaged_artifact_ends_the_evaluation_with_its_reason(artifact, data, tmp_path):
  (tmp_path / "artifact.pgolf").write_bytes(artifact.read_bytes()[:-1])
  with pytest.raises(SystemExit, match="checksum does not match"):
    main(tmp_path, ["--data", str(data)])


def test_score_is_that_of_the_dequantised_weights(artifact, data, scored):
  params = {name: jnp.asarray(v) for name, v in load(artifact)[1].items()}
  tokens = np.fromfile(data / "fineweb_val_000000.bin", "<u2")[512:].astype(np.int32)
  nll = jax.jit(
    lambda params, row: packed_nll(
      bind(SETTINGS.model, params), row, looping=True, seq_len=32, evaluation=True, dtype=jnp.float32
    )
  )
  nats = 0.0
  for first in range(0, 399, 64):
    row = tokens[first : min(first + 64, 399) + 1][None]
    nats += float(nll(params, row).sum())
  assert scored["loss"] == pytest.approx(nats / 399, rel=1e-5)


@pytest.mark.parametrize("verb", ["quantize", "package", "generate"])
def test_help_has_an_example(verb):
  done = subprocess.run(
    [sys.executable, "-c", f"from pgolf_jax.cli import main; main(['{verb}', '--help'])"],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0
  assert f"Example: pgolf {verb}" in " ".join(done.stdout.split())


def test_an_artifact_that_no_finished_stage_reports_is_not_packaged(tmp_path, capsys):
  """As a kill between writing the artifact and reporting it leaves it; a submission of it would have no score."""
  run = RunFolder(tmp_path / "run", Settings())
  run.artifact.write_bytes(b"made, and not yet scored")
  assert cli.main(["package", str(run.path)]) == 1
  assert "was not made by a finished stage" in capsys.readouterr().err
