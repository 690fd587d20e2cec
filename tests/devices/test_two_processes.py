"""Two processes of four devices each do what one process of eight does, through the whole program."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest
import tomli_w
from children import environment

from pgolf_jax.data.shards import shard_path, write_shard
from pgolf_jax.errors import UserError
from pgolf_jax.run_folder import RunFolder, read_metrics
from pgolf_jax.runtime import distributed

STEPS = 6
CONFIG = {
  "model": {
    "vocab_size": 64, "num_layers": 3, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1, "mlp_mult": 2.0,
    "num_loops": 1, "loop_start": 1, "loop_end": 1, "parallel_start_layer": 2, "rope_dims": 8,
    "tied_embed_init_std": 0.3,
  },
  "optimizer": {"muon_dtype": "float32"},
  "train": {
    "iterations": STEPS, "max_wallclock_seconds": 0.0, "batch_tokens": 8 * 24, "micro_batches": 8, "seq_len": 12,
    "seq_schedule": "12@1.0", "enable_looping_at": 0.5, "warmup_steps": 1, "compute_dtype": "float32",
    "checkpoint_every_steps": 4,
  },
  "eval": {"batch_tokens": 8 * 24, "seq_len": 12},
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  random = np.random.default_rng(0)
  for split, count in (("train", 4000), ("val", 500)):
    # Squares make some tokens commoner than others, so that there is something to learn.
    tokens = np.sqrt(random.integers(4, 64**2, count)).astype(np.uint16)
    tokens[::17] = 1
    write_shard(shard_path(folder, split, 0), tokens)
  write_shard(shard_path(folder, "val_bytes", 0), (tokens != 1).astype(np.uint16))
  path = folder / "tiny.toml"
  path.write_text(tomli_w.dumps(CONFIG | {"data": {"path": str(folder)}}))
  return path


def start(command, devices, **more):
  environ = environment(devices, **more)
  return subprocess.Popen(command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def start_two(command):
  """Two processes of four devices each, which find each other."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  each = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
  return [start(command, 4, **each, JAX_PROCESS_ID=str(index)) for index in range(2)]


def train(config, out):
  program = "import sys; from pgolf_jax.cli import main; sys.exit(main(sys.argv[1:]))"
  return [sys.executable, "-c", program, "train", str(config), "--out", str(out), "--debug"]


def finish(processes):
  try:
    said = [process.communicate(timeout=240) for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, (_, err) in zip(processes, said, strict=True):
    assert process.returncode == 0, err
  return [out for out, _ in said]


@pytest.fixture(scope="module")
def runs(config, tmp_path_factory):
  """(folder of one process, folder of two, what each of the two printed)."""
  folder = tmp_path_factory.mktemp("runs")
  finish([start(train(config, folder / "one"), 8)])
  printed = finish(start_two(train(config, folder / "two")))
  return RunFolder(folder / "one"), RunFolder(folder / "two"), printed


def test_the_losses_are_the_same(runs):
  one, two, _ = runs
  one, two = read_metrics(one.metrics), read_metrics(two.metrics)
  assert [line["step"] for line in two] == list(range(1, STEPS + 1))
  for name in ("loss", "grad_norm"):
    np.testing.assert_allclose([x[name] for x in two], [x[name] for x in one], rtol=1e-5, err_msg=name)
  assert len({line["loss"] for line in two}) == STEPS


def test_averaged_weights_and_score_are_the_same(runs):
  import jax

  from pgolf_jax.runtime.distributed import data_mesh
  from pgolf_jax.stages import averaged_params

  mesh = data_mesh(jax.devices()[:1])
  one, two = (averaged_params(run, mesh) for run in runs[:2])
  for name in one:
    np.testing.assert_allclose(two[name], one[name], atol=2e-5, err_msg=name)
  one, two = (run.results()["plain"] for run in runs[:2])
  assert two["targets"] == one["targets"] == 499
  np.testing.assert_allclose(two["bpb"], one["bpb"], rtol=1e-5)


def test_nothing_is_compiled_inside_the_clock(runs):
  assert [run.results()["train"]["recompilations_in_clock"] for run in runs[:2]] == [0, 0]


def test_one_process_speaks_for_both(runs):
  _, two, (first, second) = runs
  # gloo, not the program, writes to standard output that it is connected; its threads may tear each other's lines.
  of_the_program = [line for line in second.splitlines() if "[Gloo]" not in line and "peer ranks" not in line and line]
  assert "step 1 |" in first and of_the_program == []
  assert (two.path / "run.log").read_text().count("step 1 |") == 1
  assert json.loads((two.path / "results.json").read_text())["train"]["devices"] == 8


@pytest.mark.parametrize(
  "environ, several",
  [
    ({}, False),
    ({"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "16"}, True),
    ({"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}, False),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, False),  # inside sbatch, outside srun
    ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, True),
    ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, False),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, True),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
  ],
)
def test_clusters_of_several_processes_are_known_by_their_environment(environ, several):
  assert distributed._is_cluster(environ) is several


def test_half_a_description_of_the_processes_is_refused(monkeypatch):
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
  with pytest.raises(UserError, match="JAX_NUM_PROCESSES, JAX_PROCESS_ID is not"):
    distributed.initialize()
  monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
  monkeypatch.setenv("JAX_PROCESS_ID", "2")
  with pytest.raises(UserError, match="JAX_PROCESS_ID=2 must count from 0"):
    distributed.initialize()
