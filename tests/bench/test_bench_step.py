"""`pgolf bench step` on a tiny model."""

import dataclasses
import importlib.util

import jax
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pgolf_jax.bench import harness
from pgolf_jax.bench import step as bench
from pgolf_jax.bench.harness import Measurement
from pgolf_jax.bench.step import Case
from pgolf_jax.cli import main
from pgolf_jax.kernels import hardware, prefer
from pgolf_jax.model import flops
from pgolf_jax.model import params as parameters
from pgolf_jax.plan import programs
from pgolf_jax.runtime.distributed import data_mesh
from pgolf_jax.settings import LengthStage, ModelConfig, OptimizerConfig, Settings, TrainConfig, TTTConfig
from pgolf_jax.settings.load import changed

SETTINGS = Settings(
  model=ModelConfig(
    vocab_size=64, num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, mlp_mult=2.0, num_loops=1, loop_start=0,
    loop_end=0, parallel_start_layer=1, rope_dims=8,
  ),
  optimizer=OptimizerConfig(muon_dtype="float32"),
  train=TrainConfig(
    batch_tokens=2 * 64, micro_batches=2, world_size=2, compute_dtype="float32",
    seq_schedule=(LengthStage(16, 0.5), LengthStage(32, 1.0)),
  ),
  ttt=TTTConfig(enabled=False),
)  # fmt: skip

LONG = dataclasses.replace(SETTINGS, train=dataclasses.replace(SETTINGS.train, seq_schedule=(LengthStage(32, 1.0),)))


@pytest.fixture
def one_device(monkeypatch):
  monkeypatch.setattr(bench, "usable_devices", lambda micro_batches: jax.devices()[:1])


@pytest.fixture
def half_a_second(one_device, monkeypatch):
  """Nothing is compiled, and every call takes half a second."""
  seconds = np.array([0.5])
  monkeypatch.setattr(harness, "measure", lambda ways, *_, **__: ([Measurement(w, seconds, seconds) for w in ways], []))


def test_every_shape_is_timed(half_a_second):
  rows, notes = bench.measure(bench.StepArgs(settings=SETTINGS, torch="none", passes=("gradient", "step")))
  shapes = [("16", "off"), ("16", "on"), ("32", "off"), ("32", "on")]
  labels = [tuple(r.way.labels.values()) for r in rows]
  assert labels == [(p, *shape, "xla") for p in ("gradient", "step") for shape in shapes]
  assert {(r.way.labels["pass"], r.way.work.amount) for r in rows} == {("gradient", 64), ("step", 128)}
  assert all(r.mfu is None and r.roofline is None for r in rows)
  assert any("no peak known" in note for note in notes)
  assert any(note.startswith("segment attention: xla (mosaic_gpu not possible") for note in notes)


def test_shares_are_of_the_chips_peak(half_a_second, monkeypatch):
  monkeypatch.setitem(hardware._BY_KIND, "cpu", hardware.Peaks(1e9, 1e12))
  arguments = bench.StepArgs(settings=LONG, torch="none", looping="on", passes=("forward", "gradient", "step"))
  (forward, gradient, step), notes = bench.measure(arguments)
  of_64_tokens = flops.forward(SETTINGS.model, 64, 32, looping=True)
  assert [r.mfu for r in (forward, gradient, step)] == pytest.approx([n * of_64_tokens / 0.5e9 for n in (1, 3, 6)])
  assert forward.roofline == pytest.approx(forward.mfu)
  assert step.roofline == pytest.approx(flops.train_step(LONG, 1, 32, looping=True) / 0.5e9)
  assert step.roofline > step.mfu, "Muon's products are no part of the model's"
  assert any(note.startswith("1 × ") for note in notes) and any("0.001e12 FLOP/s" in note for note in notes)


def test_where_memory_is_the_limit_the_roofline_is_that_of_bytes(half_a_second, monkeypatch):
  monkeypatch.setitem(hardware._BY_KIND, "cpu", hardware.Peaks(1e30, 1e6))
  (row,), _ = bench.measure(bench.StepArgs(settings=LONG, torch="none", looping="on", passes=("forward",)))
  assert row.roofline == pytest.approx(4 * parameters.count(SETTINGS.model) / 0.5e6)


def test_pytorch_does_the_same_step():
  """From the same weights, losses and weights after one step of a useful size agree."""
  torch_gpt = pytest.importorskip("pgolf_jax.bench.torch_gpt", reason="PyTorch is not installed")
  params = bench.first_params(LONG)
  case = Case(LONG, data_mesh(jax.devices()[:1]), params, "step", 32, True, lr_scale=1.0)
  state, metrics = case.compiled("xla")(*case.first_step())

  run = torch_gpt.start(case, compiled=False)
  loss, whole = run(), run.func
  assert isinstance(whole, torch_gpt.TorchStep)
  assert float(loss) == pytest.approx(float(np.mean(metrics.loss)), abs=2e-6)
  for name, first in params.items():
    ours, theirs = np.asarray(state.params[name]) - first, whole.model.params[name].detach().numpy() - first
    np.testing.assert_allclose(ours, theirs, atol=2e-3 * np.abs(theirs).max() + 1e-7, err_msg=name)
    ours, theirs = np.asarray(state.average[name]) - first, whole.average[name].numpy() - first
    np.testing.assert_allclose(ours, theirs, atol=2e-3 * np.abs(theirs).max() + 1e-6, err_msg=name)


def test_pytorch_is_left_out_of_what_its_step_does_not_have(half_a_second):
  pytest.importorskip("pgolf_jax.bench.torch_gpt", reason="PyTorch is not installed")
  given = changed(LONG, {"model.dense_skips": 1, "optimizer.muon_heads": 1})
  rows, notes = bench.measure(bench.StepArgs(settings=given, looping="on", passes=("forward",)))
  assert len(rows) == 1
  assert "PyTorch was left out: its step has no model.dense_skips, optimizer.muon_heads" in notes


def test_plain_xla_is_what_its_name_says():
  device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
  mesh = AbstractMesh((1,), ("data",), abstract_device=device)
  model = ModelConfig(vocab_size=512, num_layers=2, model_dim=128, num_heads=2, num_kv_heads=1, num_loops=0,
                      parallel_start_layer=0)  # fmt: skip
  train = TrainConfig(batch_tokens=512, micro_batches=1, seq_schedule=(LengthStage(256, 1.0),))
  settings = Settings(model=model, train=train, ttt=TTTConfig(enabled=False))

  def kernels() -> int:
    (step,) = programs(settings, mesh, every_shape=False)
    return step.trace().lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu")

  assert kernels() > 0
  with prefer("xla"):
    assert kernels() == 0
  assert kernels() > 0


def test_the_verb_prints_a_table_and_writes_a_trace(tmp_path, capsys):
  config = tmp_path / "tiny.toml"
  config.write_text(
    """
    [model]
    vocab_size = 64
    num_layers = 2
    model_dim = 32
    num_heads = 2
    num_kv_heads = 1
    num_loops = 0
    parallel_start_layer = 0
    [train]
    batch_tokens = 64
    micro_batches = 1
    seq_schedule = "32@1.0"
    """
  )
  arguments = ["--repeats", "1", "--train.compute-dtype", "float32", "--profile", str(tmp_path / "trace")]
  assert main(["bench", "step", str(config), *arguments]) == 0
  printed = capsys.readouterr().out
  assert ("PyTorch  " in printed) is (importlib.util.find_spec("torch") is not None)
  assert "steps of 64 tokens" in printed and "tokens/s" in printed and "no peak known" in printed
  assert list((tmp_path / "trace").rglob("*.xplane.pb"))
