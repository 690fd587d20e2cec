"""Each comparison fails when the tensor it judges is wrong, or missing."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from pgolf_jax.cli import main
from pgolf_jax.errors import UserError
from pgolf_jax.parity.case import Case
from pgolf_jax.parity.check import check, check_caseops, table


@pytest.fixture
def case(tmp_path):
  def make(kind, inputs, expected, **about):
    (tmp_path / "case.json").write_text(json.dumps({"kind": kind, "settings": {}, **about}))
    save_file(inputs, tmp_path / "inputs.safetensors")
    save_file(expected, tmp_path / "expected.safetensors")
    return Case.load(tmp_path)

  return make


X = np.arange(1.0, 13.0).reshape(3, 4)


@pytest.mark.parametrize(
  "kind, name, value, slip",
  [
    ("forward", "loop1/logits", X, 1e-4),
    ("forward", "loop0/grads/kv_bank", X, 1e-3),
    ("train", "train_loss", X[0], 0.01),
    ("train", "val_bpb_ema", X[0, :1], 0.001),
    ("e2e", "val_bpb_ttt", X[0, :1], 0.006),
    ("ttt", "nll", X[0], 0.01),
    ("ttt", "hint_ids", np.arange(5), 1),
    ("ngram", "gate_mask", np.zeros(5, np.uint8), 1),
    ("quantize", "dequantized/skip_gates", X, 1e-3),
  ],
)
def test_a_slip_is_caught(case, kind, name, value, slip):
  found = case(kind, {"x": X}, {name: value})
  assert all(row.ok for row in check(found, {name: value}))
  wrong = value.copy()
  wrong.flat[0] += slip * max(1.0, np.linalg.norm(value)) if kind == "forward" else slip
  assert not all(row.ok for row in check(found, {name: wrong}))
  assert not all(row.ok for row in check(found, {}))
  broken = value.astype(np.float64)
  broken.flat[0] = np.nan
  assert not all(row.ok for row in check(found, {name: broken}))


def test_a_target_that_neither_scored_agrees(case):
  wanted = np.array([1.0, np.nan])
  found = case("ttt", {"x": X}, {"nll": wanted})
  assert all(row.ok for row in check(found, {"nll": wanted}))
  assert not all(row.ok for row in check(found, {"nll": np.zeros(2)}))


@pytest.mark.parametrize(
  "dtype, slip, ok", [("float32", 0.01, False), ("bfloat16", 0.01, True), ("bfloat16", 0.1, False)]
)
def test_an_optimizer_step_is_judged_by_its_own_size(case, dtype, slip, ok):
  before = 100.0 + np.ones((2, 3, 3))
  steps = [before + 0.5, before + 1.0]
  expected = {"params/0/qo_bank": steps[0], "params/1/qo_bank": steps[1]}
  found = case("optimizer", {"params/qo_bank": before}, expected, muon_dtype=dtype)
  ours = {"params/0/qo_bank": steps[0], "params/1/qo_bank": steps[1] + 0.5 * slip}
  assert all(row.ok for row in check(found, ours)) is ok


def test_a_lower_score_after_ttt_is_no_fault(case):
  found = case("e2e", {"x": X}, {"val_bpb_ttt": np.array([2.0])})
  assert all(row.ok for row in check(found, {"val_bpb_ttt": np.array([1.9])}))


def test_caseops_documents_are_compared_one_by_one():
  documents = [{"ids": [1, 2], "bytes": [0, 3]}, {"ids": [4], "bytes": [1]}]
  assert all(row.ok for row in check_caseops(documents, documents))
  assert not all(row.ok for row in check_caseops(documents[:1], documents))
  assert not all(row.ok for row in check_caseops([documents[0], {"ids": [4], "bytes": [2]}], documents))


def test_the_table_shows_the_worst_first(case):
  found = case("forward", {"x": X}, {"a": X, "b": X})
  text = table(check(found, {"a": X, "b": X + 1}))
  assert "FAIL" in text.splitlines()[1] and text.endswith("1 agree, 1 do not")


def test_the_exit_status_tells(case, capsys, tmp_path):
  case("ngram", {"x": X}, {"hint_ids": np.arange(4)})
  save_file({"hint_ids": np.arange(4)}, tmp_path / "same.safetensors")
  save_file({"hint_ids": np.arange(4)[::-1].copy()}, tmp_path / "other.safetensors")
  assert main(["parity", "check", str(tmp_path), "--ours", str(tmp_path / "same.safetensors")]) == 0
  assert main(["parity", "check", str(tmp_path), "--ours", str(tmp_path / "other.safetensors")]) == 1
  assert "entries that differ" in capsys.readouterr().out


def test_what_is_not_a_case_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"no case.json"):
    Case.load(tmp_path)
  (tmp_path / "case.json").write_text('{"kind": "forward", "settings": {"MODLE_DIM": "3"}}')
  with pytest.raises(UserError, match="did you mean MODEL_DIM"):
    _ = Case.load(tmp_path).settings
