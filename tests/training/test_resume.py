"""A run killed at any moment continues to the same numbers, bit for bit."""

import contextlib
import dataclasses
import json
import random
import signal
import subprocess
import sys
import time
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from children import environment

from pgolf_jax.data.shards import shard_path, write_shard
from pgolf_jax.errors import UserError
from pgolf_jax.model import params as parameters
from pgolf_jax.quantize import artifact
from pgolf_jax.quantize.make import make
from pgolf_jax.run_folder import RunFolder, read_metrics
from pgolf_jax.runtime import clock
from pgolf_jax.runtime.distributed import data_mesh
from pgolf_jax.runtime.files import write_bytes
from pgolf_jax.settings import (
  DataConfig,
  EvalConfig,
  LengthStage,
  ModelConfig,
  OptimizerConfig,
  QuantizeConfig,
  Settings,
  TrainConfig,
)
from pgolf_jax.training.checkpoint import Checkpoints
from pgolf_jax.training.loop import Trainer
from pgolf_jax.training.step import StepMetrics, TrainStep

SETTINGS = Settings(
  model=ModelConfig(
    vocab_size=64, num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, mlp_mult=2.0, num_loops=0,
    parallel_start_layer=1, rope_dims=8,
  ),
  optimizer=OptimizerConfig(muon_dtype="float32"),
  train=TrainConfig(
    iterations=60, max_wallclock_seconds=0.0, batch_tokens=512, micro_batches=2, world_size=1,
    seq_schedule=(LengthStage(16, 0.4), LengthStage(32, 1.0)),
    compute_dtype="float32", warmup_steps=1, checkpoint_every_steps=7, ema_decay=0.9, seq_change_warmup_steps=4,
  ),
  eval=EvalConfig(batch_tokens=256, seq_len=32),
  quantize=QuantizeConfig(reserve_seconds=0.0),
)  # fmt: skip

ONE_LENGTH = dataclasses.replace(SETTINGS.train, seq_schedule=(LengthStage(16, 1.0),))
"""One program to compile in place of two, for tests in which lengths play no part."""

PROGRAM = """
import json, sys, time
import jax
import numpy as np
from pgolf_jax.run_folder import RunFolder
from pgolf_jax.runtime.distributed import data_mesh
from pgolf_jax.training import loop
report = loop.Trainer._report
def slowly(self, *args):  # so that a kill has something to interrupt
  report(self, *args)
  time.sleep(0.02)
loop.Trainer._report = slowly
state, result = loop.Trainer(RunFolder(sys.argv[1]), data_mesh(jax.devices()[:1]), sys.argv[2]).train()
np.savez(sys.argv[1] + "/final.npz", **{k: np.asarray(v) for k, v in state.average.items()})
open(sys.argv[1] + "/result.json", "w").write(json.dumps(result))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  tokens = np.random.default_rng(0).integers(1, 64, 9000)
  tokens[0] = 1
  for index, part in enumerate(np.split(tokens, [5000])):
    part[0] = 1
    write_shard(shard_path(folder, "train", index), part)
  return folder


def train_with_kills(run, data, kills, rng):
  """Trains in a process of its own, killing it `kills` times at random moments; returns how often it was killed."""
  done = 0
  while True:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(run), str(data)], env=environment())
    if done < kills:
      before = len(read_metrics(run / "metrics.jsonl"))
      # Wait for training to begin, so that the kill falls on steps and checkpoints as well as on the start.
      while process.poll() is None and len(read_metrics(run / "metrics.jsonl")) <= before:
        time.sleep(0.01)
      time.sleep(rng.uniform(0, 0.25))
      if process.poll() is None:
        process.send_signal(signal.SIGKILL)
        process.wait()
        done += 1
        continue
    assert process.wait() == 0
    return done


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
  """The folder of a run that nothing interrupted."""
  folder = tmp_path_factory.mktemp("whole") / "run"
  RunFolder(folder, SETTINGS)
  train_with_kills(folder, data, 0, random.Random(0))
  return folder


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_same_bits(tmp_path, data, whole, kills):
  RunFolder(tmp_path / "killed", SETTINGS)
  assert train_with_kills(tmp_path / "killed", data, kills, random.Random(kills)) == kills
  expected, again = (read_metrics(folder / "metrics.jsonl") for folder in (whole, tmp_path / "killed"))
  assert [line["step"] for line in again] == list(range(1, 61))
  assert [line["loss"] for line in again] == [line["loss"] for line in expected]
  a, b = (np.load(folder / "final.npz") for folder in (whole, tmp_path / "killed"))
  assert all(np.array_equal(a[k], b[k]) for k in a.files)


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_run_continues_with_the_same_bits(tmp_path, data, whole, signum):
  """Checkpoints are seconds apart, so that what is there afterwards was saved for the signal."""
  settings = dataclasses.replace(SETTINGS, train=dataclasses.replace(SETTINGS.train, checkpoint_every_steps=0))
  run = RunFolder(tmp_path / "run", settings)
  command = [sys.executable, "-c", PROGRAM, str(run.path), str(data)]
  process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
  while process.poll() is None and len(read_metrics(run.metrics)) < 10:
    time.sleep(0.01)
  process.send_signal(signum)
  error = process.communicate(timeout=60)[1]
  steps = len(read_metrics(run.metrics))
  assert f"stopped by {signum.name} after step {steps}; the same command continues there" in error
  assert 10 <= steps < 60 and [path.name for path in run.checkpoints.iterdir()] == [str(steps)]
  assert train_with_kills(run.path, data, 0, random.Random(0)) == 0
  expected, again = (read_metrics(folder / "metrics.jsonl") for folder in (whole, run.path))
  assert [line["loss"] for line in again] == [line["loss"] for line in expected]


def test_nothing_is_compiled_inside_the_clock(whole):
  result = json.loads((whole / "result.json").read_text())
  assert result["recompilations_in_clock"] == 0 and result["steps"] == 60


def test_a_checkpoint_moves_between_numbers_of_devices(tmp_path, data):

  train = dataclasses.replace(ONE_LENGTH, iterations=20, stop_step=10, checkpoint_every_steps=0)
  optimizer = dataclasses.replace(SETTINGS.optimizer, clip_scope="global")
  losses = {}
  for name, devices in (("same", (1, 1)), ("moved", (2, 1))):
    first = dataclasses.replace(SETTINGS, train=train, optimizer=optimizer)
    folder = tmp_path / name
    Trainer(RunFolder(folder, first), data_mesh(jax.devices()[: devices[0]]), data).train()
    config = folder / "config.toml"
    config.write_text(config.read_text().replace("stop_step = 10", "stop_step = 20"))
    Trainer(RunFolder(folder), data_mesh(jax.devices()[: devices[1]]), data).train()
    losses[name] = [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]
  np.testing.assert_allclose(losses["moved"], losses["same"], atol=1e-4)
  assert len(losses["moved"]) == 20


def test_one_layer_has_no_skips_and_is_saved_resumed_and_quantised_all_the_same(tmp_path, data):
  model = dataclasses.replace(SETTINGS.model, num_layers=1, parallel_start_layer=0)
  train = dataclasses.replace(ONE_LENGTH, iterations=4, checkpoint_every_steps=0, average_share=0.5)
  settings = dataclasses.replace(SETTINGS, model=model, train=train)
  assert parameters.shapes(model)["skip_weights"] == (0, 32)
  mesh, finals = data_mesh(jax.devices()[:1]), []
  for stop in (0, 2):
    train = dataclasses.replace(train, stop_step=stop)
    run = RunFolder(tmp_path / str(stop), dataclasses.replace(settings, train=train))
    Trainer(run, mesh, data).train()
    if stop:
      config = run.path / "config.toml"
      config.write_text(config.read_text().replace("stop_step = 2", "stop_step = 0"))
      run = RunFolder(run.path)
      Trainer(run, mesh, data).train()
    finals.append(averaged(run, mesh))
  jax.tree.map(np.testing.assert_array_equal, *finals)
  write_bytes(tmp_path / "artifact", make(settings, finals[0], data).data)
  read = artifact.load(tmp_path / "artifact")[1]
  assert {name: x.shape for name, x in read.items()} == parameters.shapes(model)


def averaged(run, mesh):
  with contextlib.closing(Checkpoints(run.checkpoints, TrainStep(run.settings, mesh))) as checkpoints:
    return checkpoints.restore_average(4)


@pytest.mark.parametrize("every", [1, 0])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, data, every):
  optimizer = dataclasses.replace(SETTINGS.optimizer, embed_lr=1e30, grad_clip_norm=0.0)
  settings = dataclasses.replace(
    SETTINGS, optimizer=optimizer, train=dataclasses.replace(ONE_LENGTH, checkpoint_every_steps=every)
  )
  run = RunFolder(tmp_path / "run", settings)
  with pytest.raises(UserError, match=r"stopped at step \d+: loss") as refusal:
    Trainer(run, data_mesh(jax.devices()[:1]), data).train()
  bad = 1 + max(line["step"] for line in read_metrics(run.metrics))
  saved = sorted(int(p.name) for p in run.checkpoints.iterdir() if p.name.isdigit())
  assert bool(saved) == bool(every) == (str(run.checkpoints) in str(refusal.value)) and max(saved, default=0) < bad


class Devices:
  """Steps of a second each; time passes only while the host waits for them."""

  def __init__(self):
    self.now = self.free = 0.0

  def step(self, state, inputs):
    self.free = max(self.now, self.free) + 1
    return state, StepMetrics(Pending(self, self.free), Pending(self, self.free))


class Pending(NamedTuple):
  devices: Devices
  until: float

  def __array__(self, dtype=None, copy=None):
    self.devices.now = max(self.devices.now, self.until)
    return np.ones(1)


@pytest.mark.parametrize("cap, steps", [(4.5, 5), (4.0, 4), (9.5, 10)])
def test_training_stops_after_the_first_step_that_ends_past_the_cap(tmp_path, data, monkeypatch, cap, steps):
  train = dataclasses.replace(ONE_LENGTH, max_wallclock_seconds=cap, warmup_steps=0, checkpoint_every_steps=0)
  trainer = Trainer(
    RunFolder(tmp_path / "run", dataclasses.replace(SETTINGS, train=train)), data_mesh(jax.devices()[:1]), data
  )
  devices = Devices()
  monkeypatch.setattr(trainer, "_compile", lambda: {(16, False): devices.step})
  monkeypatch.setattr(jax, "block_until_ready", lambda _: setattr(devices, "now", devices.free))
  monkeypatch.setattr(clock, "time", types.SimpleNamespace(perf_counter=lambda: devices.now))
  assert trainer.train()[1]["steps"] == steps == devices.free


def test_a_recompilation_inside_the_clock_is_a_fault(tmp_path, data):

  settings = dataclasses.replace(
    SETTINGS, train=dataclasses.replace(ONE_LENGTH, iterations=2, checkpoint_every_steps=0)
  )
  trainer = Trainer(RunFolder(tmp_path / "run", settings), data_mesh(jax.devices()[:1]), data)
  step = trainer.loader.step

  def compiling(accumulation):
    jax.jit(lambda x: jnp.sin(x) * np.random.default_rng().random())(1.0)
    return step(accumulation)

  trainer.loader.step = compiling
  assert trainer.train()[1]["recompilations_in_clock"] > 0


def test_a_folder_with_work_of_other_settings_is_refused(tmp_path):
  RunFolder(tmp_path / "run", dataclasses.replace(SETTINGS, seed=5))
  RunFolder(tmp_path / "run", SETTINGS)  # a start that came to nothing is in nobody's way
  (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
  RunFolder(tmp_path / "run", SETTINGS)
  with pytest.raises(UserError, match="seed was 1337, now 7"):
    RunFolder(tmp_path / "run", dataclasses.replace(SETTINGS, seed=7))
  with pytest.raises(UserError, match="is not a run folder"):
    RunFolder(tmp_path / "elsewhere")


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
  assert read_metrics(path) == [{"step": 1}]


def test_data_settings_are_part_of_the_config(tmp_path):
  settings = dataclasses.replace(SETTINGS, data=DataConfig(path="somewhere"))
  RunFolder(tmp_path / "run", settings)
  assert RunFolder(tmp_path / "run").settings == settings
