"""What JAX is told before its first look at a device: options of XLA, and the folder of compiled programs.

GPUs get options of the compiler: on TPUs libtpu overlaps collectives with compute by itself, and CPUs have nothing to
overlap. No option has been measured on a Hopper card yet; each is what JAX's own guide gives for its purpose.

On CPUs the number of threads is fixed. XLA divides sums among them, so that their number decides the last bits: with as
many threads as cores, which is the default, a run on one core and a run on two differ from the second step on.
"""

import os
import re
from collections.abc import MutableMapping
from pathlib import Path

import jax

from pgolf_jax.errors import UserError

GPU_FLAGS = {
  # Off by default. Without it the scheduler may leave a gradient's reduce-scatter waiting until all gradients are
  # there; with it collectives start as soon as their operands exist and end as late as they are needed.
  # https://docs.jax.dev/en/latest/gpu_performance_tips.html (code generation and communication flags).
  "--xla_gpu_enable_latency_hiding_scheduler": "true",
}
CPU_THREADS = ("PJRT_NPROC", "4")
"""What XLA's CPU client reads, and the number. It costs two cores 6 % of a training step; with many, set another."""

# Looked at and left at XLA's defaults, for want of a measurement: combine thresholds (the step's four reduce-scatters
# are of megabytes each, its small all-reduces are combined already), command buffers, Triton's matrix products.

_OPTIONS = {
  "jax_enable_x64": False,
  "jax_default_prng_impl": "threefry2x32",
  "jax_threefry_partitionable": True,
}
"""JAX's defaults of options that break programs (the first), or give a seed other weights and labels."""


def check_options() -> None:
  """Makes sure that JAX computes as all results here were made.

  Raises:
    UserError: this process, or its environment, has told JAX otherwise.
  """
  for name, value in _OPTIONS.items():
    given = getattr(jax.config, name, value)
    if given != value:
      raise UserError(
        f"JAX is told {name} = {given}, under which results would be others; "
        f"leave it at {value} in the process that runs pgolf_jax (environment: {name.upper()})."
      )


def set_xla_options(environ: MutableMapping[str, str] | None = None, *, driver: Path = Path("/dev/nvidiactl")) -> None:
  """Sets the threads, and the flags where there is an NVIDIA driver. Must come before the first look at a device."""
  environ = os.environ if environ is None else environ
  environ.setdefault(*CPU_THREADS)
  if driver.exists():
    add_gpu_flags(environ)


def add_gpu_flags(environ: MutableMapping[str, str]) -> None:
  """Adds the flags to `XLA_FLAGS`; a flag that is set already keeps its value."""
  given = environ.get("XLA_FLAGS", "")
  named = set(re.findall(r"--[a-z0-9_]+", given))
  ours = [f"{name}={value}" for name, value in GPU_FLAGS.items() if name not in named]
  environ["XLA_FLAGS"] = " ".join(filter(None, [given, *ours]))


def options_of_a_step(platform: str) -> dict[str, str]:
  """Returns options of XLA for the program of a training step on devices of a platform.

  On CPUs JAX 0.10 leaves Σ xy of two arrays to a library that takes twenty times as long for it as XLA's own loop.
  With matrix products alone left to that library the demo's gradient takes a tenth less time; test-time training gains
  nothing. From 0.11 on the library is as fast as the loop.
  """
  if platform != "cpu" or jax.__version_info__ >= (0, 11):
    return {}
  return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}


def cache_folder() -> Path:
  """`$PGOLF_CACHE`, or pgolf_jax in the user's cache folder."""
  if named := os.environ.get("PGOLF_CACHE"):
    return Path(named)
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pgolf_jax"


def use_compile_cache() -> None:
  """Keeps every compiled program in `cache_folder()/compile`, unless JAX has been given a cache folder already."""
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compile"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
