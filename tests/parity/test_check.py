"""Every tolerance refuses a tensor that is wrong or missing; in other arithmetic it follows from the measured floor."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from pgolf_jax.cli import main
from pgolf_jax.errors import UserError
from pgolf_jax.parity import Case
from pgolf_jax.parity.check import Column, Report, agrees, check, distances, with_storing
from pgolf_jax.parity.run import run
from pgolf_jax.parity.table import text
from pgolf_jax.parity.tolerances import PERTURBATION, TOLERANCES, tolerance_for


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
  golden = case(kind, {"x": X}, {name: value})
  assert agrees(check(golden, {name: value}))
  wrong = value.copy()
  wrong.flat[0] += slip * max(1.0, np.linalg.norm(value)) if kind == "forward" else slip
  assert not agrees(check(golden, {name: wrong}))
  assert not agrees(check(golden, {}))
  broken = value.astype(np.float64)
  broken.flat[0] = np.nan
  assert not agrees(check(golden, {name: broken}))


def test_a_target_that_neither_scored_agrees(case):
  nll = np.array([1.0, np.nan])
  golden = case("ttt", {"x": X}, {"nll": nll})
  assert agrees(check(golden, {"nll": nll}))
  assert not agrees(check(golden, {"nll": np.zeros(2)}))


@pytest.mark.parametrize(
  "dtype, slip, ok", [("float32", 0.01, False), ("bfloat16", 0.01, True), ("bfloat16", 0.1, False)]
)
def test_an_optimizer_step_is_judged_by_its_own_size(case, dtype, slip, ok):
  before = 100.0 + np.ones((2, 3, 3))
  steps = [before + 0.5, before + 1.0]
  expected = {"params/0/qo_bank": steps[0], "params/1/qo_bank": steps[1]}
  golden = case("optimizer", {"params/qo_bank": before}, expected, muon_dtype=dtype)
  ours = {"params/0/qo_bank": steps[0], "params/1/qo_bank": steps[1] + 0.5 * slip}
  assert agrees(check(golden, ours)) is ok


def test_a_lower_score_after_ttt_is_no_fault(case):
  golden = case("e2e", {"x": X}, {"val_bpb_ttt": np.array([2.0])})
  assert agrees(check(golden, {"val_bpb_ttt": np.array([1.9])}))


def test_caseops_documents_are_compared_one_by_one(tmp_path):
  documents = [{"ids": [1, 2], "bytes": [0, 3]}, {"ids": [4], "bytes": [1]}]
  (tmp_path / "case.json").write_text('{"kind": "caseops"}')
  (tmp_path / "expected.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
  golden = Case.load(tmp_path)
  assert agrees(check(golden, documents))
  assert not agrees(check(golden, documents[:1]))
  assert not agrees(check(golden, [documents[0], {"ids": [4], "bytes": [2]}]))


def report(golden, ours, floors=None) -> str:
  return text(Report(golden, [Column("float32", check(golden, ours, floors), [])], None, 0.0))


def test_the_table_shows_the_worst_tensor_of_a_quantity_and_those_that_fail(case):
  golden = case("forward", {"x": X}, {f"loop0/grads/{name}": X for name in "abcd"})
  ours = {"loop0/grads/a": X, "loop0/grads/b": X * (1 + 1e-5), "loop0/grads/c": X + 1, "loop0/grads/d": X + 2}
  told = report(golden, ours)
  assert "2 of 4 do not agree" in told and "First to diverge, in forward order: loop0/grads/c" in told
  assert told.count("FAIL") == 1 and "grads/d: error" in told
  told = report(golden, dict.fromkeys(ours, ours["loop0/grads/b"]) | {"loop0/grads/a": X})
  assert "all 4 agree" in told and "1.0e-05" in told and "FAIL" not in told
  assert all(len(line) <= 80 for line in told.splitlines())


def test_every_tensor_of_the_small_cases_is_compared(small_golden):
  kinds = {tolerance.kind for tolerance in TOLERANCES} - {"e2e"}
  for kind in kinds:
    golden = Case.load(small_golden(kind))
    skipped = [name for name in golden.expected if tolerance_for(golden, name) is None]
    assert all(name.startswith("quantized/") for name in skipped), skipped


def measure_floors(case):
  """Tensor → the perturbation floor of our own outputs, in the measure of its tolerance."""
  single = dataclasses.replace(case, dtype="float32")
  moved, base = run(dataclasses.replace(single, perturbation=PERTURBATION)), run(single)
  return with_storing(single, distances(single, moved, base), base)


def test_limits_in_bfloat16_follow_from_the_floor_and_refuse_a_fault(small_golden):
  golden = Case.load(small_golden("optimizer"), dtype="bfloat16")
  floors = measure_floors(golden)
  rows = check(golden, run(golden), floors)
  assert agrees(rows), [row for row in rows if not row.ok]
  banks = [row for row in rows if row.quantity == "Muon steps"]
  assert all(row.error > 1e-3 for row in banks)  # more than float32 would be allowed
  for row in banks:
    floor = floors[row.name]
    assert row.limit == pytest.approx(max(5e-2, 6 * floor.moved * 2**-8 / 1e-7, 6 * floor.stored * 2**-24 / 1e-7))
  forgotten = {**run(golden), "params/0/qo_bank": golden.inputs["params/qo_bank"] * 0.999}
  assert not agrees(check(golden, forgotten, floors))
  # What is not computed in bfloat16 is not excused by it.
  adam = [row for row in rows if row.quantity == "Adam steps"]
  assert adam and all(row.limit == pytest.approx(max(1e-3, 6 * row.floor * 2**-24 / 1e-7)) for row in adam)


def test_the_exit_status_tells(case, capsys, tmp_path):
  case("ngram", {"x": X}, {"hint_ids": np.arange(4)})
  assert main(["parity", "check"]) == 1
  assert "--all" in capsys.readouterr().err
  save_file({"hint_ids": np.arange(4)}, tmp_path / "same.safetensors")
  save_file({"hint_ids": np.arange(4)[::-1].copy()}, tmp_path / "other.safetensors")
  assert main(["parity", "check", str(tmp_path), "--ours", str(tmp_path / "same.safetensors")]) == 0
  assert main(["parity", "check", str(tmp_path), "--ours", str(tmp_path / "other.safetensors")]) == 1
  assert "First to diverge, in forward order: hint_ids[0]" in capsys.readouterr().out


def test_all_cases_of_a_folder(small_golden, tmp_path, capsys):
  (tmp_path / "hints").symlink_to(small_golden("ngram"))
  assert main(["parity", "check", str(tmp_path), "--all"]) == 0
  assert main(["parity", "run", str(tmp_path / "hints"), "--out", str(tmp_path / "ours.safetensors")]) == 0
  out = capsys.readouterr().out
  assert "devices: cpu" in out and "1 of 1 cases agree" in out and "3 tensors written" in out
  assert main(["parity", "check", str(tmp_path / "none"), "--all"]) == 1
  assert "no golden cases" in capsys.readouterr().err


def test_what_is_not_a_case_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"no case.json"):
    Case.load(tmp_path)
  (tmp_path / "case.json").write_text('{"kind": "forward", "settings": {"MODLE_DIM": "3"}}')
  with pytest.raises(UserError, match="did you mean MODEL_DIM"):
    _ = Case.load(tmp_path).settings


def test_a_few_huge_entries_of_a_matrix_are_caught(small_golden):
  """Two of 120,000 entries are fewer than ties may change, but no tie moves an entry by a hundred steps."""
  golden = Case.load(small_golden("quantize"))
  name = "dequantized/tok_emb.weight"
  assert agrees(check(golden, golden.expected))
  wrong = golden.expected[name].copy()
  wrong[3, 5:7] += 10 * np.abs(wrong[3]).max()
  assert not agrees(check(golden, golden.expected | {name: wrong}))


def test_a_gradient_that_is_zero_by_mathematics_may_be_noise(case):
  expected = {"loop0/grads/kv_bank": 1e-9 * X, "loop0/grads/qo_bank": X, "loop1/grads/qo_bank": 1e-9 * X}
  golden = case("forward", {"x": X}, expected)
  assert agrees(check(golden, expected | {"loop0/grads/kv_bank": -1e-9 * X}))
  assert not agrees(check(golden, expected | {"loop0/grads/kv_bank": 1e-4 * X}))
  # Where all gradients are small, none is noise.
  assert not agrees(check(golden, expected | {"loop1/grads/qo_bank": -1e-9 * X}))


@pytest.mark.parametrize(
  ("kind", "settings", "message"),
  [
    ("ttt", {"TTT_EVAL_SEQ_LEN": "32"}, "ttt.seq_len=32 must hold a chunk of 64"),
    ("ngram", {"TOKEN_ORDER": "33"}, "TOKEN_ORDER=33 must be from 1 to 32"),
    ("ngram", {"TOKEN_ORDER": "0"}, "TOKEN_ORDER=0 must be from 1 to 32"),
    ("quantize", {"MATRIX_BITS": "1"}, "MATRIX_BITS=1 must be from 2 to 8"),
    ("forward", {"PARALLEL_START_LAYER": "4"}, "inside the loop"),
  ],
)
def test_settings_are_checked_before_a_case_is_run(case, kind, settings, message):
  with pytest.raises(UserError, match=message):
    run(case(kind, {"x": X}, {"x": X}, settings=settings))


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"kind": 5}', '{"kind": "ttt", "settings": {"SEED": 1}}', "{"])
def test_a_damaged_case_is_one_sentence(tmp_path, text):
  (tmp_path / "case.json").write_text(text)
  with pytest.raises(UserError, match=r"case\.json"):
    Case.load(tmp_path)
