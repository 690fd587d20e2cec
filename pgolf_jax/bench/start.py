"""`pgolf bench start`: from a process's start to its first training step, with an empty and a warm compile cache."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

from pgolf_jax.settings.load import load

_PROGRAM = """
import dataclasses, sys, tempfile
from pathlib import Path
from pgolf_jax.runtime import distributed
from pgolf_jax.settings.load import load
from pgolf_jax import stages
from pgolf_jax.run_folder import RunFolder
from pgolf_jax.training.loop import Trainer
from pgolf_jax.runtime.mesh import data_mesh
settings = load(sys.argv[1])
settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, stop_step=1))
distributed.start()
with tempfile.TemporaryDirectory() as folder:
  Trainer(RunFolder(folder, settings), data_mesh(), stages.data_folder(settings)).train()
"""


def start(config: tyro.conf.Positional[Path], repeats: int = 3) -> None:
  """Time a first start, with nothing compiled, and later ones: every program ready, warm-up and one step done.

  Example: pgolf bench start configs/demo.toml

  Args:
    config: TOML file of settings.
    repeats: starts with a warm cache, of which the median is printed.
  """
  from pgolf_jax import stages
  from pgolf_jax.runtime import distributed

  distributed.leave_devices()
  stages.data_folder(load(config))  # preparing the default text is not what is timed
  with tempfile.TemporaryDirectory() as folder:
    first = _seconds(config, folder)
    later = sorted(_seconds(config, folder) for _ in range(repeats))
  middle = later[len(later) // 2]
  print(f"first start   {first:7.1f} s")
  print(f"later starts  {middle:7.1f} s (median of {repeats}, {later[0]:.1f} to {later[-1]:.1f})")
  print(f"share         {middle / first:7.2f}")


def _seconds(config: Path, cache_folder: str) -> float:
  environ = os.environ | {
    "JAX_COMPILATION_CACHE_DIR": cache_folder,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
  began = time.perf_counter()
  subprocess.run([sys.executable, "-c", _PROGRAM, str(config)], env=environ, check=True, capture_output=True)
  return time.perf_counter() - began


COMMAND = start
