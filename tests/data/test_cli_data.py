"""The verbs of `pgolf data`, from their arguments to what they print and return."""

import dataclasses

import pytest

from pgolf_jax.bench.data import COMMAND as bench
from pgolf_jax.cli import commands
from pgolf_jax.data.folder import ensure_prepared
from pgolf_jax.data.manifest import Manifest
from pgolf_jax.errors import UserError
from pgolf_jax.settings import ModelConfig, Settings
from pgolf_jax.settings.arguments import call

TEXTS = [f"Document No. {i}: " + "congress of the States " * 20 for i in range(30)]


def run(*arguments):
  verb, *rest = map(str, arguments)
  return call(f"pgolf data {verb}", commands("data")[verb], rest)


@pytest.fixture
def docs(write_jsonl):
  return write_jsonl("docs.jsonl", TEXTS)


@pytest.fixture
def model(tmp_path, lossless):
  path = tmp_path / "some.model"
  path.write_bytes(lossless.model)
  return path


def test_prepare_inspect_verify(docs, model, tmp_path, capsys):
  out = tmp_path / "out"
  assert run("prepare", "--train", docs, "--val-docs", 4, "--tokenizer", model, "--workers", 1, "--out", out) is None
  assert "600 pieces, lossless" in capsys.readouterr().out
  assert run("inspect", out) is None
  printed = " ".join(capsys.readouterr().out.split())
  assert "the first 4 documents of docs.jsonl" in printed and "Document No. 0" in printed
  assert run("verify", out) == 0
  (out / "tokenizer.model").write_bytes(b"")
  assert run("verify", out) == 1
  assert "FAILED" in capsys.readouterr().out


def test_a_tokenizer_is_trained_when_none_is_given(docs, tmp_path):
  run(
    "prepare",
    "--train",
    docs,
    "--val-every",
    10,
    "--vocab-size",
    300,
    "--workers",
    1,
    "--no-caseops",
    "--out",
    tmp_path / "o",
  )
  manifest = Manifest.read(tmp_path / "o")
  assert (manifest.vocab_size, manifest.val.documents, manifest.markers) == (300, 3, "none")


def test_markers_before_spaces(docs, tmp_path, capsys):
  out = tmp_path / "out"
  options = ["--val-every", 10, "--vocab-size", 300, "--workers", 1, "--caseops-markers", "before-space"]
  run("prepare", "--train", docs, *options, "--out", out)
  manifest = Manifest.read(out)
  assert (manifest.markers, manifest.text_transform) == ("before-space", "lossless_caps_caseops_before_space_v1")
  assert manifest.val.counted_bytes == manifest.val.text_bytes == sum(len(text.encode()) for text in TEXTS[9::10])
  printed = capsys.readouterr().out
  assert "with markers before spaces" in printed and "Document No. 9: congress of the States congress" in printed
  assert run("verify", out) == 0
  data = dataclasses.replace(Settings().data, path=str(out), caseops_markers="before-space")
  settings = dataclasses.replace(Settings(), data=data, model=ModelConfig(vocab_size=300))
  assert ensure_prepared(settings) == out
  for change in ({"caseops_markers": "published"}, {"caseops": False}):
    with pytest.raises(UserError, match=r"with markers before spaces, the settings say .*; set data.caseops and"):
      ensure_prepared(dataclasses.replace(settings, data=dataclasses.replace(data, **change)))
  for transform in ("lossless_caps_caseops_v1", "identity"):
    dataclasses.replace(manifest, text_transform=transform).write(out)
    capsys.readouterr()
    assert run("verify", out) == 1
    assert "FAILED" in next(line for line in capsys.readouterr().out.splitlines() if " text " in line)


def test_validation_file(docs, model, write_jsonl, tmp_path):
  val = write_jsonl("val.jsonl", ["one", "two"])
  run("prepare", "--train", docs, "--val", val, "--tokenizer", model, "--workers", 1, "--out", tmp_path / "o")
  assert Manifest.read(tmp_path / "o").val.documents == 2


def test_how_many_are_held_out_must_be_said(docs, model, tmp_path):
  with pytest.raises(UserError, match="--val-docs 50000"):
    run("prepare", "--train", docs, "--tokenizer", model, "--out", tmp_path / "o")


def test_a_tokenizer_of_another_size_is_refused(docs, model, tmp_path):
  with pytest.raises(UserError, match="600 pieces where 8192"):
    run(
      "prepare", "--train", docs, "--val-docs", 1, "--tokenizer", model, "--vocab-size", 8192, "--out", tmp_path / "o"
    )


def test_inspecting_nothing(tmp_path):
  with pytest.raises(UserError, match="no shards"):
    run("inspect", tmp_path)


def test_every_verb_has_help_with_an_example(capsys):
  for verb in commands("data"):
    assert run(verb, "--help") == 0
    assert f"Example: pgolf data {verb}" in " ".join(capsys.readouterr().out.split())


def test_bench_prints_a_rate_for_each_part(docs, model, capsys):
  arguments = ["--train", docs, "--tokenizer", model, "--workers", 1, "--sample-mb", 0.001, "--repeats", 1]
  call("pgolf bench data", bench, list(map(str, arguments)))
  printed = capsys.readouterr().out
  for what in ("prepare", "floor", "CaseOps", "tokenize", "SentencePiece, batch", "sidecar"):
    assert what in printed


def test_a_preparation_that_fails_leaves_nothing_in_the_way_of_the_corrected_command(docs, tmp_path):
  out = tmp_path / "out"
  with pytest.raises(UserError, match="no tokenizer of 60000 pieces"):
    run("prepare", "--train", docs, "--val-docs", 4, "--vocab-size", 60000, "--workers", 1, "--out", out)
  assert not out.exists()
  run("prepare", "--train", docs, "--val-docs", 4, "--vocab-size", 290, "--workers", 1, "--out", out)
  assert (out / "manifest.json").exists()
