"""The library as a notebook uses it: import, settings, prepare, load, score, generate, evaluate, train."""

import ast
import copy
import dataclasses
import json
import pickle
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_model import MODEL, SETTINGS, random_params

import pgolf_jax
from pgolf_jax import UserError
from pgolf_jax.cli import main
from pgolf_jax.data.shards import load_validation
from pgolf_jax.judge import judge
from pgolf_jax.judge.child import COUNTED
from pgolf_jax.quantize import provenance
from pgolf_jax.quantize.artifact import read, read_origin, writer
from pgolf_jax.quantize.artifact.header import UNKNOWN
from pgolf_jax.quantize.make import make
from pgolf_jax.run_folder import RunFolder
from pgolf_jax.settings import LoRAConfig, PhaseConfig, ShortConfig, TTTConfig
from pgolf_jax.submission import package

ROOT = Path(__file__).parents[1]
CAPS = ["We meet AGAIN in Paris, mes AMIS – naïve café.", "The Union is strong; THE Union is STRONG."]


WORDS = ["the", "State", "of", "Union", "IS", "strong", "and", "we", "Meet", "in", "PEACE", "with", "liberty"]


def words(seed: int, count: int) -> str:
  rng = random.Random(seed)
  return " ".join(rng.choice(WORDS) for _ in range(count))


def text_folder(folder: Path, held_out: list[str], seed: int = 0) -> Path:
  """A folder of documents of which the first are those to be held out."""
  folder.mkdir()
  for i, text in enumerate([*held_out, *(words(seed + i, 150) for i in range(12))]):
    (folder / f"{i:02d}.txt").write_text(text)
  return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
  """data/: text under CaseOps with its tokenizer; run/: a run whose artifact is of that."""
  place = tmp_path_factory.mktemp("api")
  source = text_folder(place / "text", CAPS)
  pgolf_jax.prepare(place / "data", source, val_docs=len(CAPS), vocab_size=MODEL.vocab_size, workers=1)
  ttt = TTTConfig(
    batch_size=2,
    seq_len=32,
    chunk_size=8,
    lora=LoRAConfig(rank=2, lr=0.01),
    short=ShortConfig(score_first=False),
    phase=PhaseConfig(prefix_docs=0),
  )
  data = dataclasses.replace(SETTINGS.data, path=str(place / "data"))
  settings = dataclasses.replace(SETTINGS, ttt=ttt, data=data)
  run = RunFolder(place / "run", settings)
  run.artifact.write_bytes(make(settings, random_params(), place / "data").data)
  return place


@pytest.fixture(scope="module")
def model(place) -> pgolf_jax.Model:
  return pgolf_jax.load(place / "run")


def test_importing_costs_nothing():
  program = "import sys; before = set(sys.modules); import pgolf_jax; print(*sorted(set(sys.modules) - before))"
  said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
  assert said == ["pgolf_jax"]


def test_every_public_name_is_there_typed_and_documented():
  stub = ast.parse((ROOT / "pgolf_jax" / "__init__.pyi").read_text())
  typed = {alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
  assert typed | {"__version__"} == set(pgolf_jax.__all__) <= set(dir(pgolf_jax))
  for name in typed - {"settings"}:
    assert getattr(pgolf_jax, name).__doc__, name
  with pytest.raises(AttributeError, match="no attribute 'scores'"):
    _ = pgolf_jax.scores


def test_settings_is_a_function_whatever_was_imported_before_and_needs_no_jax():
  program = (
    "import sys, pgolf_jax; first = pgolf_jax.settings('demo', seed=5); import pgolf_jax.settings.load; "
    "print(first == pgolf_jax.settings('demo', seed=5), pgolf_jax.settings.Settings.__name__, 'jax' in sys.modules)"
  )
  said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
  assert said == "True Settings False\n"


def test_settings_come_from_names_paths_dicts_and_overrides(tmp_path):
  demo = pgolf_jax.settings("demo", train__iterations=7, **{"ttt.lora.rank": 3, "train.seq_schedule": "64@0.5,128@1"})
  assert (demo.train.iterations, demo.ttt.lora.rank, demo.train.seq_schedule[1].seq_len) == (7, 3, 128)
  (tmp_path / "own.toml").write_text("seed = 3\n")
  assert pgolf_jax.settings(tmp_path / "own.toml").seed == 3
  assert pgolf_jax.settings({"model": {"model_dim": 256}}, seed=2).model.model_dim == 256
  assert pgolf_jax.settings(demo, seed=8) == dataclasses.replace(demo, seed=8)


def test_settings_may_be_paths_and_numbers_of_numpy(tmp_path):
  given = {"data.path": tmp_path, "train.iterations": np.int64(7), "optimizer.matrix_lr": np.float32(0.5)}
  assert pgolf_jax.settings("demo", **given) == pgolf_jax.settings(
    "demo", data__path=str(tmp_path), train__iterations=7, optimizer__matrix_lr=0.5
  )
  with pytest.raises(UserError, match="must be finite"):
    pgolf_jax.settings("demo", optimizer__matrix_lr=np.float32("nan"))


@pytest.mark.parametrize(
  ("config", "overrides", "says"),
  [
    ("dmo", {}, "did you mean demo"),
    ("demo", {"train__iteration": 5}, "did you mean train.iterations"),
    ("demo", {"train__iterations": "many"}, "whole number"),
    ("demo", {"train__iterations": "3"}, "iterations=3 must be a whole number, 0 or more, not text"),
    ("demo", {"train__iterations": np.True_}, "whole number"),
    ("demo", {"model__num_heads": 3}, "must divide"),
    ({"modl": {}}, {}, "did you mean model"),
  ],
)
def test_settings_that_cannot_be_are_refused(config, overrides, says):
  with pytest.raises(UserError, match=says):
    pgolf_jax.settings(config, **overrides)


def test_options_and_stages_that_do_not_exist_are_refused(tmp_path):
  with pytest.raises(UserError, match=r"no option .?docs"):
    pgolf_jax.prepare(tmp_path / "data", docs=3)
  for stages in (["trian"], "trian"):
    with pytest.raises(UserError, match=r"no stage .?trian"):
      pgolf_jax.train("demo", tmp_path / "run", stages)


@pytest.mark.parametrize(
  ("option", "says"),
  [
    ({"val_docs": "2"}, "val_docs='2' must be a whole number"),
    ({"val_docs": 2.0}, r"val_docs=2\.0 must be a whole number"),
    ({"caseops": "0"}, "caseops='0' must be true or false"),
    ({"caseops_markers": "after"}, "must be one of published, before-space"),
    ({"workers": -1}, "--workers -1 must be 1 or more"),
  ],
)
def test_options_of_another_kind_are_refused(tmp_path, option, says):
  source = text_folder(tmp_path / "text", CAPS)
  with pytest.raises(UserError, match=says):
    pgolf_jax.prepare(tmp_path / "data", source, **{"val_docs": 1, "vocab_size": 300, "workers": 1} | option)


def test_options_may_be_numbers_of_numpy(tmp_path):
  source = text_folder(tmp_path / "text", CAPS)
  made = pgolf_jax.prepare(tmp_path / "data", source, val_docs=np.int64(1), vocab_size=np.int32(300), workers=1)
  assert made.vocab_size == 300 and made.val.documents == 1


@pytest.mark.parametrize("ttt", [False, True])
def test_the_score_of_texts_is_that_of_pgolf_eval_on_data_of_the_same_documents(place, model, ttt, capsys):
  score = model.score(CAPS, ttt=ttt)
  figures = pgolf_jax.evaluate(place / "run", ttt=ttt)
  assert (score.bpb, score.tokens, score.bytes) == (figures["bpb"], figures["targets"], figures["bytes"])
  assert score.bytes == sum(len(text.encode()) for text in CAPS)
  if not ttt:
    assert main(["eval", str(place / "run"), "--no-ttt"]) == 0
    assert f"{'bpb':<28}{score.bpb:.5f}" in capsys.readouterr().out
    alone = pgolf_jax.evaluate(place / "run" / "artifact.pgolf", place / "data", ttt=False, documents=1)
    assert alone["bytes"] == len(CAPS[0].encode())


def test_the_parts_of_a_score_add_up(model):
  score = model.score(CAPS)
  assert len(score.documents) == 2 and score.loss == pytest.approx(score.nats / score.tokens)
  for text, document in zip(CAPS, score.documents, strict=True):
    assert document.bytes == document.token_bytes.sum() == len(text.encode())
    assert document.nats == pytest.approx(float(document.token_nats.sum()), rel=1e-6)
    assert len(document.tokens) == len(document.token_nats) == len(document.token_bytes)
  assert score.nats == pytest.approx(sum(document.nats for document in score.documents))
  np.testing.assert_array_equal(score.documents[0].tokens[:-1], model.tokenizer.encode(_coded(CAPS[0])))


def _coded(text: str) -> str:
  from pgolf_jax.data import caseops

  return caseops.encode(text)


def test_a_text_has_the_score_that_it_has_among_texts_after_it(model):
  """But for the bos that the model has to predict between the two."""
  alone, together = model.score(CAPS[0]).documents[0], model.score(CAPS).documents[0]
  np.testing.assert_allclose(together.token_nats[:-1], alone.token_nats, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
  ("texts", "says"),
  [
    ("", "text 0: an empty document"),
    (["a", ""], "text 1: an empty"),
    ([], "no text"),
    ("\ud800", "text 0"),
    ([3], "text 0"),
  ],
)
def test_what_is_no_text_is_refused(model, texts, says):
  with pytest.raises(UserError, match=says):
    model.score(texts)


def test_text_is_generated_in_pieces_and_as_the_program_prints_it(place, model, capsys):
  pieces = list(model.generate("The Union", tokens=12, temperature=0))
  assert pieces and all(isinstance(piece, str) for piece in pieces)
  assert main(["generate", str(place / "run"), "--prompt", "The Union", "--tokens", "12", "--temperature", "0"]) == 0
  assert capsys.readouterr().out == "The Union" + "".join(pieces) + "\n"
  for wrong, says in (
    ({"top_p": 2.0}, "top_p"),
    ({"seed": -1}, "seed=-1"),
    ({"prompt": "\udcff"}, "The prompt is no text"),
  ):
    with pytest.raises(UserError, match=says):
      model.generate(**wrong)
  with pytest.raises(TypeError):
    model.generate("x", tokens=1.5)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_that_has_scored_can_be_copied(model, copied):
  assert copied(model).score(CAPS).nats == model.score(CAPS).nats


def test_a_mesh_that_the_caller_has_set_is_no_obstacle(place, model):
  def results(model):
    scores = model.score(CAPS), model.score(CAPS, ttt=True)
    return *scores, pgolf_jax.evaluate(place / "run", ttt=False)["bpb"], "".join(model.generate("The", tokens=3))

  expected = results(model)
  with jax.set_mesh(jax.make_mesh((1,), ("theirs",))):
    assert results(model) == results(pgolf_jax.load(place / "run")) == expected
    assert jax.sharding.get_abstract_mesh().axis_names == ("theirs",)


def test_a_model_is_not_used_where_jax_computes_otherwise(model):
  with jax.enable_x64(True):
    for use in model.score, model.generate:
      with pytest.raises(UserError, match="jax_enable_x64"):
        use("The Union")


def test_weights_that_do_not_exist_are_refused(place):
  with pytest.raises(UserError, match="no 'average' weights; choose among artifact, averaged"):
    pgolf_jax.load(place / "run", weights="average")
  with pytest.raises(UserError, match="no 'average' weights"):
    pgolf_jax.evaluate(place / "run", ttt=False, weights="average")


def test_a_library_prints_nothing(place, capfd):
  pgolf_jax.load(place / "run").score(CAPS[0])
  pgolf_jax.evaluate(place / "run", ttt=False)
  assert capfd.readouterr() == ("", "")


def test_an_artifact_says_where_it_comes_from(place):
  origin, tokenizer = read_origin(place / "run" / "artifact.pgolf")
  manifest = json.loads((place / "data" / "manifest.json").read_text())
  assert origin.pgolf_jax == pgolf_jax.__version__ and origin.pieces == MODEL.vocab_size
  assert origin.tokenizer == manifest["tokenizer_sha256"] and "first 2 documents" in origin.data
  assert origin.validation == load_validation(place / "data").tokens_sha256
  assert tokenizer == (place / "data" / "tokenizer.model").read_bytes()


def test_no_artifact_is_made_with_another_tokenizer_than_its_data(place, tmp_path):
  shutil.copytree(place / "data", tmp_path / "data")
  (tmp_path / "data" / "tokenizer.model").write_bytes(b"another")
  with pytest.raises(UserError, match=r"\(sha256 .{8}\) is not the tokenizer that .* was prepared with \(.{8}\)"):
    provenance.origin_of(RunFolder(place / "run").settings, tmp_path / "data")


def test_the_bytes_of_an_artifact_are_the_same_each_time_and_in_each_folder(place, tmp_path):
  settings = RunFolder(place / "run").settings
  (tmp_path / "elsewhere").symlink_to(place / "data")
  again = make(settings, random_params(), tmp_path / "elsewhere").data
  assert again == (place / "run" / "artifact.pgolf").read_bytes()


def bare(place: Path, folder: Path, **parts) -> Path:
  """The artifact alone in a folder, with other parts beside its weights."""
  whole = read((place / "run" / "artifact.pgolf").read_bytes())
  parts = {"origin": whole.origin, "tokenizer": whole.tokenizer} | parts
  folder.mkdir(exist_ok=True)
  path = folder / "artifact.pgolf"
  path.write_bytes(writer.write(whole.config, whole.tensors, whole.codec, parts["origin"], parts["tokenizer"]))
  return path


def test_three_lines_score_a_text_with_an_artifact_alone(place, model, tmp_path):
  path = bare(place, tmp_path)
  assert pgolf_jax.load(path).score(CAPS).nats == model.score(CAPS).nats


def test_an_artifact_without_data_asks_for_them(place, tmp_path):
  path = bare(place, tmp_path)
  with pytest.raises(UserError, match=r"without its run: say which .* --data .* first 2 documents"):
    pgolf_jax.evaluate(path)


def test_other_data_are_refused_by_both_names_unless_asked_for(place, tmp_path, capsys):
  path = bare(place, tmp_path)
  source = text_folder(tmp_path / "text", ["Another TEXT of the Union."], seed=100)
  own = place / "data" / "tokenizer.model"
  pgolf_jax.prepare(tmp_path / "other", source, val_docs=1, tokenizer=own, workers=1)
  command = ["eval", str(path), "--data", str(tmp_path / "other"), "--no-ttt"]
  assert main(command) == 1
  said = capsys.readouterr().err
  assert "first 1 documents" in said and "first 2 documents" in said and "--any-text" in said and "tokens " in said
  assert main([*command, "--any-text"]) == 0
  assert f"{'bytes':<28}26" in capsys.readouterr().out


def test_the_environment_may_name_other_data_but_no_other_model(place, tmp_path, monkeypatch, capsys):
  command = ["eval", str(place / "run"), "--no-ttt"]
  monkeypatch.setenv("DATA_PATH", str(tmp_path / "nowhere"))
  assert main(command) == 1 and str(tmp_path / "nowhere") in capsys.readouterr().err
  monkeypatch.delenv("DATA_PATH")
  monkeypatch.setenv("MLP_MULT", "3")
  assert main(command) == 1
  assert re.search(r"settings from the environment: mlp_\w+ has the shape", capsys.readouterr().err)


def test_another_tokenizer_is_refused_by_both_names(place, tmp_path, capsys):
  path = bare(place, tmp_path, tokenizer=None)
  source = text_folder(tmp_path / "text", ["Another TEXT of the Union."], seed=100)
  pgolf_jax.prepare(tmp_path / "other", source, val_docs=1, vocab_size=MODEL.vocab_size, workers=1)
  own, other = (
    json.loads((folder / "manifest.json").read_text())["tokenizer_sha256"][:8]
    for folder in (place / "data", tmp_path / "other")
  )
  for command in (
    ["eval", str(path), "--data", str(tmp_path / "other"), "--no-ttt", "--any-text"],
    ["generate", str(path), "--tokenizer", str(tmp_path / "other" / "tokenizer.model")],
  ):
    assert main(command) == 1
    said = capsys.readouterr().err
    assert own in said and other in said and "320 pieces" in said
  for name in COUNTED[:2]:  # as in a submission
    if not (path.parent / name).exists():
      (path.parent / name).touch()
  with pytest.raises(UserError, match="was made with a tokenizer of 320 pieces"):
    judge(path.parent, tmp_path / "other")
  contents = package.Contents("other", tokenizer=tmp_path / "other" / "tokenizer.model")
  with pytest.raises(UserError, match="the artifact was made with one of 320 pieces"):
    package.build(tmp_path / "submission", path.read_bytes(), contents)
  model = pgolf_jax.load(path)  # its weights can be read without a tokenizer
  assert model.params["tok_emb.weight"].shape == (MODEL.vocab_size, MODEL.model_dim)
  with pytest.raises(UserError, match=f"no tokenizer in .* its own of 320 pieces .*{own}"):
    model.score("text")
  assert pgolf_jax.load(path, tokenizer=place / "data" / "tokenizer.model").score(CAPS[0]).bytes == len(
    CAPS[0].encode()
  )


def test_an_artifact_that_does_not_know_its_origin_is_held_against_its_sizes(place, tmp_path, caplog):
  path = bare(place, tmp_path, origin=UNKNOWN, tokenizer=None)
  pgolf_jax.evaluate(path, place / "data", ttt=False)
  assert "does not say which data" in caplog.text
  source = text_folder(tmp_path / "text", ["Another TEXT of the Union."], seed=100)
  pgolf_jax.prepare(tmp_path / "other", source, val_docs=1, vocab_size=MODEL.vocab_size + 1, workers=1)
  with pytest.raises(UserError, match="321 pieces"):
    pgolf_jax.evaluate(path, tmp_path / "other", ttt=False)


def test_a_tokenizer_is_embedded_when_small_or_asked_for(place, monkeypatch):
  settings, folder = RunFolder(place / "run").settings, place / "data"
  never = pgolf_jax.settings(settings, quantize__embed_tokenizer="never")
  without = read(make(never, random_params(), folder).data)
  assert without.tokenizer is None and "tokenizer" not in without.stream_bytes and without.origin.tokenizer
  assert read((place / "run" / "artifact.pgolf").read_bytes()).stream_bytes["tokenizer"] > 500
  monkeypatch.setattr(provenance, "SMALL_TOKENIZER", 100)
  assert provenance.tokenizer_to_embed(settings, folder) is None
  always = pgolf_jax.settings(settings, quantize__embed_tokenizer="always")
  assert provenance.tokenizer_to_embed(always, folder) == (folder / "tokenizer.model").read_bytes()
  with pytest.raises(UserError, match="cannot be read"):
    provenance.tokenizer_to_embed(always, folder / "nowhere")


@pytest.mark.slow
def test_training_prints_nothing_and_returns_the_figures(place, tmp_path, capfd):
  settings = pgolf_jax.settings(
    RunFolder(place / "run").settings, train__iterations=2, train__warmup_steps=1, train__max_wallclock_seconds=0.0
  )
  figures = pgolf_jax.train(settings, tmp_path / "run", ["train", "plain"])
  assert figures["train"]["steps"] == 2 and figures["plain"]["bpb"] > 0
  assert capfd.readouterr() == ("", "")
  assert "step 2 | loss" in (tmp_path / "run" / "run.log").read_text()
  averaged = pgolf_jax.load(tmp_path / "run", weights="averaged")
  assert averaged.score(CAPS).bpb == pytest.approx(figures["plain"]["bpb"], rel=1e-6)
  with pytest.raises(UserError, match="no artifact"):
    pgolf_jax.load(tmp_path / "run")
