"""Run folders that lie: an honest run with something changed, and the check that has to catch it.

A careless liar changes a file. A thorough one puts all hashes, sums and tables right afterwards.
"""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tomli_w
from run_case import make_run

from pgolf_jax.audit import audit
from pgolf_jax.audit.verdict import rules, verdict
from pgolf_jax.cli import main
from pgolf_jax.data.shards import load_validation, read_shard, shard_path, write_shard
from pgolf_jax.errors import checks_table
from pgolf_jax.run_folder import RunFolder, made_from
from pgolf_jax.runtime.distributed import data_mesh
from pgolf_jax.runtime.files import seal, unsealed, write_json
from pgolf_jax.scoring.documents import find_documents
from pgolf_jax.settings.load import changed, to_dict


@dataclasses.dataclass
class Lie:
  """A copy of the honest run and of its data, to be changed."""

  run: RunFolder
  data: Path

  def edit_results(self, stage, **values):
    results = self.run.results()
    results[stage] |= values
    write_json(self.run.path / "results.json", {name: seal(result) for name, result in results.items()})

  def edit_array(self, name, change):
    path = self.run.scores / f"{name}.npy"
    np.save(path, change(np.load(path)))

  def edit_lines(self, path, change):
    lines = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

  def edit_trace(self, change):
    self.edit_lines(self.run.scores / "trace.jsonl", change)

  def edit_metrics(self, change):
    self.edit_lines(self.run.metrics, change)

  def edit_settings(self, **settings):
    settings = changed(self.run.settings, {name.replace("__", "."): value for name, value in settings.items()})
    (self.run.path / "config.toml").write_text(tomli_w.dumps(to_dict(settings)))
    self.run = RunFolder(self.run.path)

  def edit_shard(self, kind, change):
    path = shard_path(self.data, kind, 0)
    write_shard(path, change(read_shard(path).copy()))

  def put_sums_right(self):
    """Documents, results and the printed table follow from the scores and the sidecar, as they are now."""
    data, nll = load_validation(self.data), np.load(self.run.scores / "nll.npy").astype(np.float64)
    model = np.load(self.run.scores / "model_nll.npy").astype(np.float64)
    documents = {d.index: d for d in find_documents(data.tokens, 1)}

    def right(line):
      targets = documents[line["document"]].target_slice
      text_bytes = int(data.token_bytes[1:][targets].sum())
      return {**line, "bytes": text_bytes, "nats": nll[targets].sum(), "nats_untilted": model[targets].sum()}

    self.edit_lines(self.run.scores / "documents.jsonl", lambda lines: [right(line) for line in lines])
    text_bytes = int(data.token_bytes[1:].sum())
    bpb = nll.sum() / math.log(2) / text_bytes
    untilted = model.sum() / math.log(2) / text_bytes
    self.edit_results("ttt", loss=nll.mean(), bpb=bpb, bpb_without_hints=untilted, bytes=text_bytes)
    self.print_score(bpb)

  def print_score(self, bpb):
    log = self.run.log.read_text()
    self.run.log.write_text(re.sub(r"(?m)^(test-time training +)[\d.]+", rf"\g<1>{bpb:.5f}", log))

  def put_hashes_right(self):
    """Every stage says that it read and left the files as they are now."""
    for stage in ("train", "plain", "artifact", "ttt"):
      result = self.run.results()[stage]
      self.run.finish(stage, result, made_from(self.run, stage, self.data))


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
  return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def lie(honest, tmp_path):
  shutil.copytree(honest.path, tmp_path / "run")
  shutil.copytree(honest.settings.data.path, tmp_path / "data")
  return Lie(RunFolder(tmp_path / "run"), tmp_path / "data")


def checks_of(lie):
  return audit(lie.run, lie.data, data_mesh(jax.devices()[:1]))


def first_broken(lie):
  return next((check for check in checks_of(lie) if check.passed is False), None)


def test_an_honest_run_is_legal(lie, capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "300")  # so that no line of the table folds
  lie.put_sums_right()
  lie.put_hashes_right()
  before = {path: path.stat().st_mtime_ns for path in lie.run.path.rglob("*") if path.is_file()}
  assert main(["audit", str(lie.run.path), "--data", str(lie.data)]) == 0
  assert {path: path.stat().st_mtime_ns for path in lie.run.path.rglob("*") if path.is_file()} == before
  out = capsys.readouterr().out
  assert "BROKEN" not in out and "unproved" not in out
  assert out.endswith("Verdict: legal; everything that the rules require is proved.\n")
  assert [name for name in rules().required if not re.search(rf"^holds +{re.escape(name)} ", out, re.MULTILINE)] == []


def test_a_lying_run_is_broken(lie, capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "300")
  a_target_scored_twice(lie)
  lie.put_hashes_right()
  assert main(["audit", str(lie.run.path), "--data", str(lie.data)]) == 1
  out = capsys.readouterr().out
  assert re.search(r"^BROKEN +every target scored exactly once ", out, re.MULTILINE)
  assert "Verdict: BROKEN.\n  broken: every target scored exactly once (C4)" in out
  assert "not proved: later tokens change no score" in out


def test_the_command_asks_for_a_run(capsys):
  assert main(["audit"]) == 2
  assert "pgolf audit needs RUNS" in capsys.readouterr().err


# Careless lies: a file that is not the one that was read or written.


def flip_a_byte(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


FILES = {
  "artifact.pgolf": lambda lie: lie.run.artifact,
  "nll.npy": lambda lie: lie.run.scores / "nll.npy",
  "trace.jsonl": lambda lie: lie.run.scores / "trace.jsonl",
  "documents.jsonl": lambda lie: lie.run.scores / "documents.jsonl",
  "identity.json": lambda lie: lie.run.scores / "identity.json",
  "metrics.jsonl": lambda lie: lie.run.metrics,
  "tokenizer.model": lambda lie: lie.data / "tokenizer.model",
  "manifest.json": lambda lie: lie.data / "manifest.json",
  "fineweb_train_000000.bin": lambda lie: shard_path(lie.data, "train", 0),
  "fineweb_val_000000.bin": lambda lie: shard_path(lie.data, "val", 0),
  "fineweb_val_bytes_000000.bin": lambda lie: shard_path(lie.data, "val_bytes", 0),
}


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_named(lie, name):
  flip_a_byte(FILES[name](lie))
  broken = first_broken(lie)
  assert broken.name == "files are those that were scored" and name in broken.finding


def test_a_changed_config_is_named(lie):
  lie.edit_settings(train__log_every=7)
  assert "config" in first_broken(lie).finding


# Thorough lies.


def one_score_lower(lie):
  lie.edit_array("nll", lambda x: np.where(np.arange(len(x)) == 77, x / 2, x))


def all_scores_lower(lie):
  lie.edit_array("nll", lambda x: x * np.float32(0.99))


def scores_and_model_lower_where_there_is_no_hint(lie):
  nll, model = (np.load(lie.run.scores / f"{name}.npy") for name in ("nll", "model_nll"))
  for name in ("nll", "model_nll"):
    lie.edit_array(name, lambda x: np.where(nll == model, x * np.float32(0.95), x))


def a_score_that_is_no_number(lie):
  lie.edit_array("nll", lambda x: np.where(np.arange(len(x)) == 77, np.float32(np.nan), x))


def a_target_scored_twice(lie):
  lie.edit_array("times", lambda x: x + (np.arange(len(x)) == 77).astype(np.uint8))


def scores_cut_short(lie):
  path = lie.run.scores / "nll.npy"
  path.write_bytes(path.read_bytes()[:-400])


def scores_of_another_type(lie):
  lie.edit_array("nll", lambda x: x.astype(np.float64))


def no_scores(lie):
  (lie.run.scores / "model_nll.npy").unlink()


def a_document_left_out_of_the_trace(lie):
  lie.edit_trace(
    lambda events: [{**e, "documents": e["documents"][:1]} if e["event"] == "score" else e for e in events]
  )


def hints_counted_in_another_order(lie):
  lie.edit_trace(
    lambda events: [e for e in events if e["event"] == "hints"][::-1] + [e for e in events if e["event"] != "hints"]
  )


def a_trace_without_its_phases(lie):
  lie.edit_trace(lambda events: [e for e in events if e["event"] != "weights"])


def a_phase_over_everything(lie):
  lie.edit_trace(lambda events: [{**e, "documents": list(range(7))} if e["event"] == "weights" else e for e in events])


def documents_that_do_not_exist(lie):
  lie.edit_trace(lambda events: [{**e, "documents": [99]} if e["event"] == "hints" else e for e in events])


def a_trace_of_something_else(lie):
  (lie.run.scores / "trace.jsonl").write_text('{"event": "hint"}\n')


def a_document_line_left_out(lie):
  lie.edit_lines(lie.run.scores / "documents.jsonl", lambda lines: lines[1:])


def bytes_of_a_document_inflated(lie):
  lie.edit_lines(
    lie.run.scores / "documents.jsonl", lambda lines: [{**lines[0], "bytes": lines[0]["bytes"] + 50}, *lines[1:]]
  )


def a_better_score_in_the_results(lie):
  lie.edit_results("ttt", bpb=lie.run.results()["ttt"]["bpb"] - 0.01)


def more_bytes_in_the_results(lie):
  lie.edit_results("ttt", bytes=lie.run.results()["ttt"]["bytes"] + 1)


def a_score_without_hints_that_is_better(lie):
  lie.edit_results("ttt", bpb_without_hints=1.0)


def fewer_targets_in_the_results(lie):
  lie.edit_results("ttt", targets=5)


def fewer_hints_in_the_results(lie):
  lie.edit_results("ttt", gated=3)


def another_order_in_the_results(lie):
  lie.edit_results("ttt", order="reference")


def more_training_tokens_in_the_results(lie):
  lie.edit_results("train", tokens=10**9)


def a_smaller_artifact_in_the_results(lie):
  lie.edit_results("artifact", artifact_bytes=1000)


def a_better_score_printed(lie):
  lie.print_score(1.05)


def another_threshold_in_the_config(lie):
  lie.edit_settings(hints__threshold=0.9)


def another_boost_in_the_config(lie):
  lie.edit_settings(hints__boost=2.0)


def another_rank_in_the_config(lie):
  lie.edit_settings(ttt__lora__rank=5)


def another_seed_in_the_config(lie):
  lie.edit_settings(seed=7)


def a_sidecar_with_one_more_byte_on_every_token(lie):
  lie.edit_shard("val_bytes", lambda x: x + (x > 0).astype(x.dtype))


def a_sidecar_with_one_more_byte_on_one_token(lie):
  lie.edit_shard("val_bytes", lambda x: x + (np.arange(len(x)) == 50).astype(x.dtype))


def a_validation_document_in_the_training_shards(lie):
  val = read_shard(shard_path(lie.data, "val", 0))
  end = np.flatnonzero(val == 1)[1]
  lie.edit_shard("train", lambda train: np.concatenate([train, val[:end]]))


def training_on_other_text(lie):
  lie.edit_shard("train", lambda x: np.concatenate([x[:1], x[1:][::-1]]))


def no_first_step(lie):
  lie.edit_metrics(lambda lines: lines[1:])


def a_step_left_out(lie):
  lie.edit_metrics(lambda lines: lines[:5] + lines[6:])


def a_step_twice(lie):
  lie.edit_metrics(lambda lines: lines[:5] + lines[4:])


def more_steps_in_the_results(lie):
  lie.edit_metrics(lambda lines: lines[:-1])


def time_that_runs_back(lie):
  lie.edit_metrics(lambda lines: [*lines[:-1], {**lines[-1], "seconds": 0.0}])


def a_log_that_ends_after_the_training(lie):
  lie.edit_metrics(lambda lines: [*lines[:-1], {**lines[-1], "seconds": 599.0}])


def a_loss_that_is_no_number(lie):
  lie.edit_metrics(lambda lines: [*lines[:-1], {**lines[-1], "loss": float("nan")}])


def a_length_that_the_schedule_does_not_have(lie):
  lie.edit_metrics(lambda lines: [*lines[:-1], {**lines[-1], "seq_len": 32}])


def another_first_loss(lie):
  lie.edit_metrics(lambda lines: [{**lines[0], "loss": lines[0]["loss"] - 0.1}, *lines[1:]])


def lower_losses_later_on(lie):
  lie.edit_metrics(lambda lines: [*lines[:1], *({**line, "loss": line["loss"] - 0.1} for line in lines[1:])])


def lower_losses_in_the_checkpoints_too(lie):
  lower_losses_later_on(lie)
  lines = [json.loads(line) for line in lie.run.metrics.read_text().splitlines()]
  for path in lie.run.checkpoints.glob("*/progress/metadata"):
    progress = unsealed(json.loads(path.read_text()))
    path.write_text(json.dumps(seal({**progress, "metrics": lines[: len(progress["metrics"])]})))


def training_beyond_the_limit(lie):
  lie.edit_results("train", seconds=640.0)


def training_beyond_the_limit_as_the_config_allows(lie):
  lie.edit_settings(train__max_wallclock_seconds=5000.0)
  lie.edit_results("train", seconds=4000.0)


def training_that_took_no_time(lie):
  lie.edit_results("train", seconds="0.8")


def scoring_beyond_the_limit(lie):
  lie.edit_results("ttt", seconds=600.5)


def compilations_inside_the_clock(lie):
  lie.edit_results("ttt", recompilations_in_clock=2)


def an_artifact_too_large(lie):
  with lie.run.artifact.open("r+b") as file:
    file.truncate(16_000_000)
  lie.edit_results("artifact", artifact_bytes=16_000_000)


def an_artifact_too_large_as_the_config_allows(lie):
  lie.edit_settings(quantize__budget_bytes=40_000_000)
  an_artifact_too_large(lie)


THOROUGH = {
  "every target scored exactly once": [
    a_score_that_is_no_number,
    a_target_scored_twice,
    scores_cut_short,
    scores_of_another_type,
    no_scores,
    a_document_left_out_of_the_trace,
    documents_that_do_not_exist,
    a_trace_of_something_else,
  ],
  "one order explains every score": [
    a_trace_without_its_phases,
    a_phase_over_everything,
    hints_counted_in_another_order,
  ],
  "hints and tilts recomputed": [
    one_score_lower,
    all_scores_lower,
    another_threshold_in_the_config,
    another_boost_in_the_config,
  ],
  "sums of the results": [
    a_document_line_left_out,
    bytes_of_a_document_inflated,
    a_better_score_in_the_results,
    more_bytes_in_the_results,
    a_score_without_hints_that_is_better,
    fewer_targets_in_the_results,
    fewer_hints_in_the_results,
    another_order_in_the_results,
  ],
  "the printed table": [a_better_score_printed],
  "later tokens change no score": [
    scores_and_model_lower_where_there_is_no_hint,
    another_rank_in_the_config,
    another_seed_in_the_config,
  ],
  "data: sidecar": [a_sidecar_with_one_more_byte_on_every_token, a_sidecar_with_one_more_byte_on_one_token],
  "data: overlap": [a_validation_document_in_the_training_shards],
  "training log": [
    no_first_step,
    a_step_left_out,
    a_step_twice,
    more_steps_in_the_results,
    more_training_tokens_in_the_results,
    time_that_runs_back,
    a_log_that_ends_after_the_training,
    a_loss_that_is_no_number,
    a_length_that_the_schedule_does_not_have,
  ],
  "step 1 is of this data": [another_first_loss, training_on_other_text],
  "a step after each checkpoint": [lower_losses_later_on, lower_losses_in_the_checkpoints_too],
  "clock: training": [
    training_beyond_the_limit,
    training_beyond_the_limit_as_the_config_allows,
    training_that_took_no_time,
  ],
  "clock: evaluation": [scoring_beyond_the_limit, compilations_inside_the_clock],
  "artifact and code": [
    an_artifact_too_large,
    an_artifact_too_large_as_the_config_allows,
    a_smaller_artifact_in_the_results,
  ],
}

LEAVES_SUMS_WRONG = {"sums of the results", "every target scored exactly once", "the printed table"}


@pytest.mark.parametrize(
  ("name", "tell"), [(n, t) for n, lies in THOROUGH.items() for t in lies], ids=lambda x: getattr(x, "__name__", "")
)
def test_a_thorough_lie_is_caught(lie, name, tell):
  tell(lie)
  if name not in LEAVES_SUMS_WRONG:
    lie.put_sums_right()
  lie.put_hashes_right()
  broken = first_broken(lie)
  assert broken is not None and broken.name == name, broken


# What is missing is not proved, and so the run is not legal.


@pytest.mark.parametrize(
  ("remove", "name"),
  [
    (lambda lie: (lie.data / "tokenizer.model").unlink(), "data: sidecar"),
    (lambda lie: lie.run.metrics.unlink(), "training log"),
    (lambda lie: shutil.rmtree(lie.run.checkpoints), "a step after each checkpoint"),
    (lambda lie: lie.edit_settings(train__max_wallclock_seconds=0.0), "clock: training"),
  ],
  ids=["tokenizer", "training log", "checkpoints", "cap of the training time"],
)
def test_what_is_missing_is_not_proved(lie, remove, name):
  remove(lie)
  lie.put_hashes_right()
  checks = []
  for check in checks_of(lie):
    checks.append(check)
    if check.name == name:
      break
  assert checks[-1].passed is None, checks_table(checks)
  assert not verdict(checks).is_legal and (name in verdict(checks).unproved or name not in rules().required)
