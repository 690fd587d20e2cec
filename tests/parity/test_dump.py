"""Cases dumped from PyTorch scripts agree with what this package computes; what cannot be dumped is refused by name."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pgolf_jax.cli import main
from pgolf_jax.data.shards import read_shard
from pgolf_jax.parity import Case
from pgolf_jax.parity.check import agrees, check
from pgolf_jax.parity.run import run

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

SCRIPT = Path(__file__).with_name("torch_script.py")
SIZES = ("NUM_LAYERS=3", "MODEL_DIM=32", "LOOP_END=1", "PARALLEL_START_LAYER=2", "GATE_WINDOW=8")
SMALL = [word for size in SIZES for word in ("--set", size)]
ROW = ["--tokens", "300", "--documents", "7", "--max-doc-len", "40", "--seed", "5"]


def dump(out: Path, kind: str, *options: str, script: Path = SCRIPT) -> int:
  return main(["parity", "dump", str(script), "--kind", kind, "--out", str(out), *options])


def assert_agrees(folder: Path) -> None:
  case = Case.load(folder)
  rows = check(case, run(case))
  assert agrees(rows), [row for row in rows if not row.ok]


def lengths(tokens) -> np.ndarray:
  return np.diff(np.append(np.flatnonzero(tokens == 1), len(tokens)))


@pytest.fixture(scope="module")
def forward_case(tmp_path_factory) -> Path:
  """A packed row of 7 documents, some longer than the longest segment."""
  out = tmp_path_factory.mktemp("cases") / "forward"
  assert dump(out, "forward", "--activations", *ROW, *SMALL) == 0
  return out


def test_a_forward_case_agrees(forward_case):
  case = Case.load(forward_case)
  documents = lengths(case.inputs["tokens"])
  assert len(documents) == 7 and documents.sum() == 301 and documents.min() < 40 < documents.max()
  assert_agrees(forward_case)


def test_a_case_holds_activations_and_how_far_the_script_moves(forward_case):
  case = Case.load(forward_case)
  for looping, uses in ((0, 3), (1, 4)):  # of layers: one of three runs twice in the loop
    last = [name for name in case.expected if name.startswith(f"loop{looping}/activations/{uses - 1:02d}.blocks.2.")]
    assert sorted(name.rpartition(".")[2] for name in last) == ["attend", "k", "q", "v"]
  assert case.floor.keys() == case.expected.keys()
  assert all(1e-8 < moved < 1e-4 for moved in case.floor.values())


def test_a_case_says_what_it_was_made_from(forward_case):
  about = json.loads((forward_case / "case.json").read_text())
  made_from = about["made_from"]
  assert made_from["script"] == {"file": SCRIPT.name, "sha256": hashlib.sha256(SCRIPT.read_bytes()).hexdigest()}
  assert made_from["versions"]["torch"] == torch.__version__ and made_from["device"].startswith("cpu")
  assert {"triton", "flash_attn_interface", "_build_cu_seqlens"} <= made_from["stand_ins"].keys()
  settings = about["settings"]
  # Settings of ours that the environment leaves to defaults, those of the script, and those that it says nothing of.
  assert settings["MODEL_DIM"] == "32" and settings["QK_GAIN_INIT"] == "5.25" and settings["TOKEN_ORDER"]
  assert made_from["settings_assumed"] == ["SPARSE_ATTN_GATE_INIT_STD", "VALUE_RESIDUAL", "DENSE_SKIPS"]
  assert "DATA_PATH" not in settings and "WORLD_SIZE" not in settings


def test_the_process_is_left_as_it_was(forward_case):
  assert "SPARSE_ATTN_GATE_ENABLED" not in os.environ
  assert torch.Tensor.bfloat16(torch.ones(1)).dtype == torch.bfloat16
  assert "flash_attn_interface" not in sys.modules and torch.compile.__name__ == "compile"


def test_optimizer_steps_agree(tmp_path):
  assert dump(tmp_path / "case", "optimizer", "--steps", "3", "--tokens", "96", "--documents", "3", *SMALL) == 0
  case = Case.load(tmp_path / "case")
  assert [step["lr_scale"] for step in case.about["steps"]] == pytest.approx([1, 0.7, 0.49])
  assert_agrees(tmp_path / "case")


def test_another_formula_in_the_script_shows(tmp_path, forward_case):
  """What is dumped is what the script computes, and not what it should."""
  text, gate = SCRIPT.read_text(), "gate = n[:, : m.gate_window]"
  assert gate in text
  (tmp_path / "wrong.py").write_text(text.replace(gate, f"gate = 1.001 * {gate.removeprefix('gate = ')}"))
  assert dump(tmp_path / "case", "forward", *ROW, *SMALL, script=tmp_path / "wrong.py") == 0
  right, wrong = (load_file(folder / "expected.safetensors") for folder in (forward_case, tmp_path / "case"))
  for looping in (0, 1):
    logits = f"loop{looping}/logits"
    assert np.linalg.norm(right[logits] - wrong[logits]) > 1e-5 * np.linalg.norm(right[logits])


def test_the_same_seed_gives_the_same_case(tmp_path, forward_case):
  assert dump(tmp_path / "again", "forward", *ROW, *SMALL) == 0
  again, before = (load_file(folder / "expected.safetensors") for folder in (tmp_path / "again", forward_case))
  assert all(np.array_equal(again[name], before[name]) for name in again)


@pytest.mark.parametrize("form", ["pt", "wrapped.pt", "safetensors"])
def test_a_checkpoint_gives_the_weights(tmp_path, forward_case, form):
  inputs = load_file(forward_case / "inputs.safetensors")
  weights = {name.removeprefix("params/"): v for name, v in inputs.items() if name.startswith("params/")}
  del weights["softcap_pos"], weights["softcap_neg"]  # as in checkpoints of older scripts
  path = tmp_path / f"state.{form}"
  if form == "safetensors":
    save_file(weights, path)
  else:
    state = {f"_orig_mod.{name}": torch.tensor(v) for name, v in weights.items()}
    state["_orig_mod.tok_emb.weight"] = state["_orig_mod.tok_emb.weight"].bfloat16()
    torch.save({"model": state, "step": 3} if "wrapped" in form else state, path)
  sizes = ["--base", "tiny", *SMALL]
  assert (
    dump(tmp_path / "case", "forward", "--checkpoint", str(path), "--tokens", "32", "--documents", "2", *sizes) == 0
  )
  made = load_file(tmp_path / "case" / "inputs.safetensors")
  assert all(np.array_equal(made[f"params/{n}"], v) for n, v in weights.items() if n != "tok_emb.weight")
  np.testing.assert_allclose(made["params/tok_emb.weight"], weights["tok_emb.weight"], rtol=2**-8)
  assert made["params/softcap_pos"] == 30.0
  about = json.loads((tmp_path / "case" / "case.json").read_text())["made_from"]
  assert about["checkpoint"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() and about["noise"] == 0


def test_text_comes_from_shards(tmp_path, small_golden):
  data = small_golden("train") / "data"
  options = ["--data", str(data), "--tokens", "64"]
  assert dump(tmp_path / "case", "forward", *options, *SMALL, "--set", "VOCAB_SIZE=75") == 0
  validation = read_shard(next(data.glob("fineweb_val_0*.bin")))
  assert np.array_equal(load_file(tmp_path / "case" / "inputs.safetensors")["tokens"], validation[:65])


class Loaded:
  def __reduce__(self):
    return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize(
  ("kind", "options", "message"),
  [
    ("ttt", [], "has no eval_val_ttt_phased, which a case of the kind ttt comes from; kinds that it offers: forward"),
    ("train", [], "has no train_model"),
    ("quantize", [], "has no collect_hessians"),
    ("ngram", [], "has no build_hints_for_targets"),
    ("forward", ["--set", "MODEL_DIM"], "must read NAME=VALUE"),
    ("forward", ["--set", "WARMUP_STEPS=5"], "WARMUP_STEPS is 0 in every case"),
    ("forward", ["--set", "ROPE_YARN=1"], "rotary frequencies are never rescaled"),
    ("forward", ["--set", "MODEL_DIM=50"], "must divide model.model_dim"),
    ("forward", ["--tokens", "9", "--documents", "8"], "cannot hold 8 documents"),
    ("forward", ["--checkpoint", "none.pt"], "none.pt"),
    ("forward", ["--device", "cuda"], "sees no GPU"),
    ("forward", ["--data", "none"], "none: no such folder"),
  ],
)  # fmt: skip
def test_what_cannot_be_dumped_is_one_sentence(tmp_path, capsys, kind, options, message):
  if "cuda" in options and torch.cuda.is_available():
    pytest.skip("there is a GPU")
  assert dump(tmp_path / "case", kind, *options) == 1
  assert message in capsys.readouterr().err
  assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_never_executed(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  torch.save({"a": Loaded()}, "state.pt")
  assert dump(tmp_path / "case", "forward", "--checkpoint", "state.pt") == 1
  assert "holds more than tensors" in capsys.readouterr().err
  assert not Path("executed").exists()


def test_a_folder_that_is_there_is_kept(tmp_path, capsys):
  (tmp_path / "mine").write_text("x")
  assert dump(tmp_path, "forward") == 1
  assert "is there already" in capsys.readouterr().err and (tmp_path / "mine").read_text() == "x"


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("GPT = 1", "has no Hyperparameters"),
    ("import no_such_package", "cannot be imported: ModuleNotFoundError"),
    ("raise SystemExit(3)", "cannot be imported: SystemExit"),
  ],
)
def test_what_is_no_such_script_is_one_sentence(tmp_path, capsys, text, message):
  script = tmp_path / "script.py"
  script.write_text(text)
  assert dump(tmp_path / "case", "forward", script=script) == 1
  assert message in capsys.readouterr().err


def test_launching_a_kernel_is_refused(tmp_path, capsys):
  script = tmp_path / "script.py"
  script.write_text(SCRIPT.read_text().replace("if self.fused_ce_enabled:", "if True:"))
  assert dump(tmp_path / "case", "forward", *SMALL, script=script) == 1
  assert "launches the Triton kernel softcapped_loss_kernel" in capsys.readouterr().err


def test_without_pytorch_a_sentence_names_the_extra(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  assert dump(tmp_path / "case", "forward") == 1
  assert "pgolf_jax[torch]" in capsys.readouterr().err


def test_the_verbs_do_not_import_pytorch():
  code = "import sys; from pgolf_jax.cli import commands; commands('parity'); sys.exit('torch' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture(scope="session")
def reference() -> Path:
  """The public PyTorch script, which the repository does not contain."""
  path = Path(os.environ.get("PGOLF_REFERENCE", "no path"))
  path = path / "train_gpt.py" if path.is_dir() else path
  if not path.is_file():
    pytest.skip("set PGOLF_REFERENCE to the public train_gpt.py, or to its folder")
  return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["forward", "optimizer", "train", "quantize", "ngram", "ttt"])
def test_the_public_script_agrees(tmp_path, reference, kind):
  command = [sys.executable, "-c", "import sys; from pgolf_jax.cli import main; sys.exit(main())"]
  options = ["--tokens", "400"] if kind == "ttt" else []
  arguments = ["parity", "dump", str(reference), "--kind", kind, "--out", str(tmp_path / "case"), *options]
  subprocess.run([*command, *arguments], check=True)
  assert_agrees(tmp_path / "case")
