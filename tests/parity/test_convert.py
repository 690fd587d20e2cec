"""Weights come out of every form as they went in, PyTorch's own modules load them, and hostile files do nothing."""

import dataclasses
import functools
import pickle
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ttt_case
from ttt_case import random_documents, random_params

from pgolf_jax import stages
from pgolf_jax.audit import evidence
from pgolf_jax.cli import main
from pgolf_jax.data.shards import shard_path, write_shard
from pgolf_jax.errors import UserError
from pgolf_jax.model import params as parameters
from pgolf_jax.model import segments
from pgolf_jax.model.gpt import bind
from pgolf_jax.parity import weights
from pgolf_jax.parity.convert import Choices, convert, form_of, infer
from pgolf_jax.quantize.artifact import load, writer
from pgolf_jax.quantize.artifact.tensors import Half, unbank
from pgolf_jax.quantize.make import portable
from pgolf_jax.run_folder import RunFolder, made_from
from pgolf_jax.runtime.distributed import data_mesh
from pgolf_jax.settings import load as load_settings
from pgolf_jax.settings.load import from_toml

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
torch_gpt = pytest.importorskip("pgolf_jax.bench.torch_gpt")

SETTINGS = load_settings.changed(ttt_case.SETTINGS, {"train.seq_schedule": "32@1", "train.seq_len": 32})
MODEL = SETTINGS.model
WITH_CONFIG = Choices(SETTINGS)


def state_dict(drop: tuple[str, ...] = ()) -> dict:
  """Weights as the PyTorch script saves them: all float32 but the embedding; with the smallest numbers and −0."""
  params = {name: np.array(value) for name, value in random_params().items() if name not in drop}
  params["qo_bank"][0, 0, :3] = [-0.0, 1e-42, 6e4]
  tensors = {name: torch.from_numpy(value) for name, value in params.items()}
  return tensors | {"tok_emb.weight": tensors["tok_emb.weight"].bfloat16()}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
  torch.save(state_dict(), tmp_path / "final_model.pt")
  return tmp_path / "final_model.pt"


def assert_same(path: Path, other: Path) -> None:
  """Checks that two PyTorch files hold the same tensors to the bit."""
  ours, theirs = (torch.load(p, weights_only=True) for p in (path, other))
  assert ours.keys() == theirs.keys()
  for name, value in theirs.items():
    assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape)
    bits = [x.reshape(-1).view(torch.uint8) for x in (ours[name], value)]
    assert torch.equal(*bits), name


@pytest.mark.parametrize("target", ["model.safetensors", "model.orbax", "run", "model.bin"])
def test_every_form_gives_back_every_bit(checkpoint, tmp_path, target):
  convert(checkpoint, tmp_path / target, WITH_CONFIG)
  said = convert(tmp_path / target, tmp_path / "back.pt")
  assert_same(tmp_path / "back.pt", checkpoint)
  assert "tok_emb.weight bfloat16" in said[-1]


def test_settings_travel_with_the_weights(checkpoint, tmp_path):
  for first in ("model.safetensors", "model.orbax"):
    convert(checkpoint, tmp_path / first, WITH_CONFIG)
    convert(tmp_path / first, tmp_path / f"from-{first}", Choices(form="run"))
    assert RunFolder(tmp_path / f"from-{first}").settings.model == MODEL


def test_matrices_by_layer_are_the_banks(checkpoint, tmp_path):
  convert(checkpoint, tmp_path / "layers.pt", Choices(by_layer=True))
  by_layer = torch.load(tmp_path / "layers.pt", weights_only=True)
  bank = torch.load(checkpoint, weights_only=True)["kv_bank"]
  assert torch.equal(by_layer["blocks.1.attn.c_v.weight"], bank[MODEL.num_layers + 1]) and "kv_bank" not in by_layer
  convert(tmp_path / "layers.pt", tmp_path / "banks.pt")
  assert_same(tmp_path / "banks.pt", checkpoint)
  del by_layer["blocks.0.mlp.fc.weight"]
  torch.save(by_layer, tmp_path / "layers.pt")
  with pytest.raises(UserError, match=r"blocks\.0\.mlp\.fc\.weight is missing"):
    convert(tmp_path / "layers.pt", tmp_path / "no.pt")


class Block(torch.nn.Module):
  """The parameters of a layer that stand outside the banks. Recipe section 2."""

  def __init__(self, m):
    super().__init__()
    parameter = lambda *shape: torch.nn.Parameter(torch.full(shape, torch.nan))  # noqa: E731
    self.attn_scale, self.mlp_scale = parameter(m.model_dim), parameter(m.model_dim)
    self.resid_mix = parameter(2, m.model_dim)
    self.attn = torch.nn.Module()
    self.attn.q_gain, self.attn.attn_gate_w = parameter(m.num_heads), parameter(m.num_heads, m.gate_window)


class ScriptModel(torch.nn.Module):
  """A model with the names and shapes that the recipe gives to the PyTorch script's; it computes as `torch_gpt`."""

  def __init__(self, m):
    super().__init__()
    L, D, F = m.num_layers, m.model_dim, m.mlp_dim
    skips = min(map(len, m.layer_order(looping=True)))
    parameter = lambda *shape: torch.nn.Parameter(torch.full(shape, torch.nan))  # noqa: E731
    self.config = m
    self.tok_emb = torch.nn.Embedding(m.vocab_size, D)
    self.qo_bank, self.kv_bank = parameter(2 * L, D, D), parameter(2 * L, m.kv_dim, D)
    self.mlp_up_bank, self.mlp_down_bank = parameter(L, F, D), parameter(L, D, F)
    self.skip_weights, self.skip_gates = parameter(skips, D), parameter(skips, D)
    self.parallel_post_lambdas, self.parallel_resid_lambdas = parameter(L, 2, 2), parameter(L, 2)
    self.smear_gate, self.smear_lambda = torch.nn.Linear(m.gate_window, 1, bias=False), parameter(1)
    self.softcap_pos, self.softcap_neg = parameter(), parameter()
    self.blocks = torch.nn.ModuleList([Block(m) for _ in range(L)])

  def forward(self, tokens_T):
    params = {name: value.detach() for name, value in self.named_parameters()}
    return torch_gpt.TorchGPT(self.config, params).evaluation_logits(tokens_T, (len(tokens_T),), looping=True)


def our_logits(params, tokens_T):
  @functools.partial(jax.jit)
  def logits(params):
    model, rows = bind(MODEL, params), jnp.asarray(tokens_T)[None]
    start = jnp.zeros(rows.shape, jnp.int32)
    context = segments(start, max_segment=rows.shape[1], looping=True, dtype=jnp.float32)
    return model.evaluation_logits(model(rows, context).hidden)[0]

  return np.asarray(logits({name: jnp.asarray(value, jnp.float32) for name, value in params.items()}))


def test_a_pytorch_model_loads_our_export_and_gives_our_logits(tmp_path):
  params = random_params()
  weights.write_safetensors(tmp_path / "ours.safetensors", params, None)
  convert(tmp_path / "ours.safetensors", tmp_path / "run", WITH_CONFIG)
  convert(tmp_path / "run", tmp_path / "ours.pt")
  model = ScriptModel(MODEL)
  model.load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True), strict=True)
  tokens_T = random_documents([40]).tokens
  with torch.no_grad():
    theirs = model(torch.from_numpy(tokens_T.astype(np.int64))).numpy()
  np.testing.assert_allclose(our_logits(params, tokens_T), theirs, rtol=1e-5, atol=1e-5)
  # The other way round: what the PyTorch model saves gives its logits here.
  torch.save(model.state_dict(), tmp_path / "theirs.pt")
  read = weights.read_torch(tmp_path / "theirs.pt").tensors
  np.testing.assert_allclose(our_logits(read, tokens_T), theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run folder made from a PyTorch file, and data for it."""
  folder = tmp_path_factory.mktemp("converted")
  (folder / "data").mkdir()
  stream = random_documents([30, 44, 25, 51])
  for split, values in (("train", stream.tokens), ("val", stream.tokens), ("val_bytes", stream.token_bytes)):
    write_shard(shard_path(folder / "data", split, 0), values)
  settings = dataclasses.replace(SETTINGS, data=dataclasses.replace(SETTINGS.data, path=str(folder / "data")))
  wrapped = {f"_orig_mod.{name}": value for name, value in state_dict(parameters.SOFTCAPS).items()}
  torch.save({"step": 7, "model": wrapped}, folder / "a.pt")
  said = convert(folder / "a.pt", folder / "run", Choices(settings))
  assert "softcap_pos: added, neutral at 30" in said and "the entry 'model'; _orig_mod taken off every name" in said[0]
  return RunFolder(folder / "run")


def test_a_run_folder_has_the_weights_in_float32(run, tmp_path):
  expected = {name: value.float().numpy() for name, value in state_dict().items()}
  averaged = stages.averaged_params(run, data_mesh(jax.devices()[:1]))
  for name, value in averaged.items():
    np.testing.assert_array_equal(np.asarray(value), expected[name], name)
  assert run.changes("train", made_from(run, "train", run.settings.data.path)) == []
  # What was added does not come out again, nor is anything left of the making.
  convert(run.path, tmp_path / "back.pt")
  torch.save(state_dict(parameters.SOFTCAPS), tmp_path / "as-it-was.pt")
  assert_same(tmp_path / "back.pt", tmp_path / "as-it-was.pt")
  assert sorted(p.name for p in run.path.parent.iterdir()) == ["a.pt", "data", "run"]


def test_an_audit_says_that_the_training_was_elsewhere(run):
  clock = next(check for check in evidence.clocks(run.results(), run.settings) if check.name == "clock: training")
  for check in (clock, evidence.training_log(run)):
    assert check.passed is None and "trained elsewhere" in check.finding


def test_a_run_folder_is_scored_and_quantised(run, capsys):
  assert main(["eval", str(run.path), "--weights", "averaged", "--no-ttt"]) == 0
  assert "bpb" in capsys.readouterr().out
  assert main(["quantize", str(run.path)]) == 0
  settings, params = load(run.artifact)
  assert settings.model == MODEL and set(params) == set(parameters.shapes(MODEL))


def test_one_checkpoint_of_a_run_by_its_folder(run, tmp_path):
  assert form_of(run.checkpoints / "0") == "run"
  convert(run.checkpoints / "0", tmp_path / "raw.pt", Choices(weights="raw"))
  convert(run.path, tmp_path / "averaged.pt")
  assert_same(tmp_path / "raw.pt", tmp_path / "averaged.pt")


def test_an_artifact_becomes_a_file_and_nothing_becomes_an_artifact(tmp_path):
  tensors = {name: Half(np.asarray(value, np.float16)) for name, value in unbank(random_params()).items()}
  (tmp_path / "a.pgolf").write_bytes(writer.write(portable(SETTINGS), tensors, "zstd"))
  convert(tmp_path / "a.pgolf", tmp_path / "a.safetensors")
  read = weights.read_safetensors(tmp_path / "a.safetensors")
  assert read.settings.model == MODEL
  np.testing.assert_array_equal(read.tensors["kv_bank"], load(tmp_path / "a.pgolf")[1]["kv_bank"])
  with pytest.raises(UserError, match="not another run folder"):
    convert(tmp_path / "a.pgolf", tmp_path / "run")
  with pytest.raises(UserError, match="pgolf quantize"):
    convert(tmp_path / "a.safetensors", tmp_path / "b.pgolf")


def test_sizes_follow_from_the_tensors():
  params = random_params()
  found = infer(params, "these")
  same = ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "gate_window")
  assert [getattr(found, name) for name in same] == [getattr(MODEL, name) for name in same]
  assert parameters.shapes(found) == parameters.shapes(MODEL)
  odd = dataclasses.replace(MODEL, mlp_mult=2.1, skip_gates=False, smear_gate=False, sparse_attn_gate=False)
  assert parameters.shapes(infer(parameters.init(odd, jax.random.key(0)), "")) == parameters.shapes(odd)


@pytest.mark.parametrize(
  ("name", "shape", "message"),
  [
    ("kv_bank", (4, 15, 32), "which 4 heads of 32 dimensions cannot share"),
    ("qo_bank", (3, 32, 32), "holds 3 matrices; it needs two"),
    ("qo_bank", (5000, 1, 1), "1 to 1000 layers"),
    ("blocks.1.resid_mix", (2, 31), r"has the shape \(2, 31\)"),
    ("lm_head.weight", (48, 32), "is not a parameter"),
    ("tok_emb.weight", None, "is missing"),
    ("blocks.0.attn_scale", None, "is missing"),
    ("skip_weights", (700_000, 1), r"has the shape \(700000, 1\)"),
    ("mlp_down_bank", (2, 32, 60), r"has the shape \(2, 32, 60\)"),
  ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, name, shape, message):
  changed = random_params() | {name: np.zeros(shape or (), np.float32)}
  if shape is None:
    del changed[name]
  weights.write_safetensors(tmp_path / "a.safetensors", changed, None)
  with pytest.raises(UserError, match=rf"{name}.*{message}"):
    convert(tmp_path / "a.safetensors", tmp_path / "b.pt")
  with pytest.raises(UserError, match=name):
    convert(tmp_path / "a.safetensors", tmp_path / "b.pt", WITH_CONFIG)
  assert not (tmp_path / "b.pt").exists()


@pytest.mark.parametrize(
  ("value", "message"),
  [
    (np.full((2, 32), 0.1), "digits that float32"),
    (np.full((2, 32), np.nan, np.float32), "not finite"),
    (np.full((2, 32), 1e300), "not finite"),
  ],
)
def test_a_run_folder_refuses_what_float32_cannot_hold(tmp_path, value, message):
  weights.write_safetensors(tmp_path / "a.safetensors", random_params() | {"blocks.0.resid_mix": value}, None)
  with pytest.raises(UserError, match=rf"blocks\.0\.resid_mix .*{message}"):
    convert(tmp_path / "a.safetensors", tmp_path / "run", WITH_CONFIG)
  assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
  convert(tmp_path / "a.safetensors", tmp_path / "b.pt")  # a file keeps it
  kept = torch.load(tmp_path / "b.pt", weights_only=True)["blocks.0.resid_mix"].numpy()
  np.testing.assert_array_equal(kept, value)
  assert kept.dtype == value.dtype


class Executes:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return Path.touch, (self.path,)


def write_hostile(folder: Path, kind: str) -> Path:
  path = folder / "a.pt"
  match kind:
    case "code":
      torch.save(state_dict() | {"qo_bank": Executes(folder / "executed")}, path)
    case "bare pickle":
      path.write_bytes(pickle.dumps(Executes(folder / "executed")))
    case "compressed":
      torch.save(state_dict(), folder / "b.pt")
      with zipfile.ZipFile(folder / "b.pt") as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
          new.writestr(entry.filename, old.read(entry))
    case "huge view":
      torch.save(state_dict() | {"qo_bank": torch.zeros(1).expand(2**40)}, path)
    case "integers":
      torch.save(state_dict() | {"qo_bank": torch.zeros(3, dtype=torch.int8)}, path)
    case "sparse":
      torch.save(state_dict() | {"qo_bank": torch.eye(3).to_sparse()}, path)
    case "meta":
      torch.save(state_dict() | {"qo_bank": torch.zeros(3, device="meta")}, path)
    case "number":
      torch.save(state_dict() | {"qo_bank": 3}, path)
    case "list":
      torch.save([torch.zeros(3)], path)
    case "several":
      torch.save({"model": state_dict(), "ema": state_dict()}, path)
    case "empty":
      torch.save({}, path)
    case "truncated":
      torch.save(state_dict(), path)
      path.write_bytes(path.read_bytes()[:-3000])
    case "script":
      torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    case "noise":
      path.write_bytes(np.random.default_rng(0).bytes(5000))
    case "nothing":
      path.write_bytes(b"")
    case "header":
      path = folder / "a.safetensors"
      path.write_bytes(b"\xff\xff\xff\x00\x00\x00\x00\x00{" + b"[" * 5000)
    case "settings":
      path = folder / "a.safetensors"
      weights.write_safetensors(path, random_params(), '{"model": {"num_layers": "many"}}')
    case "deep settings":
      path = folder / "a.safetensors"
      weights.write_safetensors(path, random_params(), "[" * 100_000)
    case "int8":
      path = folder / "a.safetensors"
      weights.write_safetensors(path, {"a": np.zeros(3, np.int8)}, None)
    case "folder":
      path = folder / "a.orbax"
      path.mkdir()
    case "orbax":
      path = folder / "a.orbax"
      weights.write_orbax(path, random_params(), None)
      for data in path.rglob("d/*"):
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
  return path


@pytest.mark.parametrize(
  ("kind", "message"),
  [
    ("code", "holds more than tensors"),
    ("bare pickle", "not a whole PyTorch state dict"),
    ("compressed", "compressed archive"),
    ("huge view", "at most 268,435,456"),
    ("integers", "qo_bank is int8"),
    ("sparse", "qo_bank is not a plain tensor"),
    ("meta", "qo_bank"),
    ("number", "qo_bank is a int"),
    ("list", "holds a list"),
    ("several", "--key"),
    ("empty", "tok_emb.weight is missing"),
    ("truncated", "not a whole PyTorch state dict"),
    ("script", "TorchScript program, not a PyTorch state dict"),
    ("noise", "not a whole PyTorch state dict"),
    ("nothing", "not a whole PyTorch state dict"),
    ("header", "safetensors"),
    ("settings", "must be a whole number"),
    ("deep settings", "damaged"),
    ("int8", "a is I8"),
    ("folder", "neither a run folder"),
    ("orbax", "cannot be read"),
  ],
)
def test_a_hostile_file_is_one_sentence_and_does_nothing(tmp_path, kind, message, capsys):
  path = write_hostile(tmp_path, kind)
  assert main(["convert", str(path), str(tmp_path / "out.safetensors")]) == 1
  said = capsys.readouterr().err
  assert message in said and "Traceback" not in said
  assert said.startswith("pgolf: ") and said.count("\n") == 1
  assert not (tmp_path / "executed").exists() and not (tmp_path / "out.safetensors").exists()


def test_an_entry_of_several_is_chosen(tmp_path):
  torch.save({"model": state_dict(), "ema": {k: v * 2 for k, v in state_dict().items()}, "step": 3}, tmp_path / "a.pt")
  convert(tmp_path / "a.pt", tmp_path / "ema.pt", Choices(key="ema"))
  doubled = torch.load(tmp_path / "ema.pt", weights_only=True)["kv_bank"]
  assert torch.equal(doubled, 2 * state_dict()["kv_bank"])
  with pytest.raises(UserError, match="those there are: model, ema"):
    convert(tmp_path / "a.pt", tmp_path / "no.pt", Choices(key="av"))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["a.pt", "a.pt"], "exists and is not overwritten"),
    (["none.pt", "b.pt"], "no file or folder none.pt"),
    (["a.pt", "b.npz"], "--form"),
    (["a.pt", "run"], "--config"),
    (["a.pt", "run", "--by-layer"], "--by-layer is for"),
    (["a.pt", "b.pt", "--weights", "raw"], "a choice of run folders"),
    (["a.safetensors", "b.pt", "--key", "model"], "entry of a PyTorch file"),
    (["a.pt", "b.pt", "--config", "other.toml"], "does the config belong to them|has the shape"),
  ],
)
def test_a_request_that_cannot_be_met_says_what_to_do(checkpoint, tmp_path, arguments, message, monkeypatch):
  monkeypatch.chdir(tmp_path)
  checkpoint.rename("a.pt")
  weights.write_safetensors(Path("a.safetensors"), random_params(), None)
  Path("other.toml").write_text("[model]\nnum_layers = 7\n")
  before = sorted(p.name for p in tmp_path.iterdir())
  source, target, *options = arguments
  choices = dict(zip(options[::2], options[1::2], strict=False))
  with pytest.raises(UserError, match=message):
    convert(
      Path(source),
      Path(target),
      Choices(
        settings=from_toml(choices["--config"]) if "--config" in choices else None,
        weights=choices.get("--weights", "averaged"),
        key=choices.get("--key"),
        by_layer="--by-layer" in options,
      ),
    )
  assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_without_pytorch_a_sentence_says_so(checkpoint, tmp_path, monkeypatch):
  monkeypatch.setattr(weights, "torch", None)
  with pytest.raises(UserError, match="pip install"):
    convert(checkpoint, tmp_path / "b.safetensors")
