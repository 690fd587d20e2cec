"""`pgolf bench start`: from a process's start to its first training step, with an empty and a warm compile cache."""

import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro

from pgolf_jax.bench import harness
from pgolf_jax.bench.harness import Way
from pgolf_jax.data.folder import ensure_prepared
from pgolf_jax.run_folder import RunFolder
from pgolf_jax.runtime import distributed
from pgolf_jax.runtime.mesh import data_mesh
from pgolf_jax.settings.load import load
from pgolf_jax.training.loop import Trainer


def start(config: tyro.conf.Positional[Path], repeats: int = 5) -> None:
  """Time a process as far as its first training step, with an empty compile cache and with a full one.

  Example: pgolf bench start configs/demo.toml

  Args:
    config: TOML file of settings.
    repeats: starts of either kind, after one of each that does not count.
  """
  distributed.leave_devices()
  with tempfile.TemporaryDirectory() as folder:
    ways = [
      Way({"compile cache": "empty"}, lambda: lambda: _start(config, Path(tempfile.mkdtemp(dir=folder)))),
      Way({"compile cache": "warm"}, lambda: lambda: _start(config, Path(folder, "warm"))),
    ]
    measurements, _ = harness.measure(ways, repeats)
  harness.show(f"start, {config}", measurements, {**harness.SECONDS, **harness.CORES, **harness.COMPARISON})


def _start(config: Path, cache: Path) -> None:
  environ = os.environ | {
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
  program = f"from pgolf_jax.bench import start; start.train_one_step({str(config)!r})"
  subprocess.run([sys.executable, "-c", program], env=environ, check=True, capture_output=True)


def train_one_step(config: str) -> None:
  """Trains for one step in a run folder that is then deleted."""
  settings = load(config)
  settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, stop_step=1))
  distributed.start()
  with tempfile.TemporaryDirectory() as folder:
    Trainer(RunFolder(folder, settings), data_mesh(), ensure_prepared(settings)).train()


COMMAND = start
