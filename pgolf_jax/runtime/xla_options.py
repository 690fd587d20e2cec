"""Options of XLA that a run sets, in one place, each with its reason.

Only GPUs get any: on TPUs libtpu overlaps collectives with compute by itself, and CPUs have nothing to overlap. None
has been measured on a Hopper card yet; what is here is what JAX's own guide gives for the purpose named.
"""

import os
import re
from collections.abc import MutableMapping
from pathlib import Path

GPU_FLAGS = {
  # Off by default. Without it the scheduler may leave a gradient's reduce-scatter waiting until all gradients are
  # there; with it collectives start as soon as their operands exist and end as late as they are needed.
  # https://docs.jax.dev/en/latest/gpu_performance_tips.html (code generation and communication flags).
  "--xla_gpu_enable_latency_hiding_scheduler": "true",
}
# Looked at and left at XLA's defaults, for want of a measurement: combine thresholds (the step's four reduce-scatters
# are of megabytes each, its small all-reduces are combined already), command buffers, Triton's matrix products.


def apply(environ: MutableMapping[str, str] | None = None, *, driver: Path = Path("/dev/nvidiactl")) -> None:
  """Adds the flags where there is an NVIDIA driver. Must come before the first look at a device."""
  if driver.exists():
    add_gpu_flags(os.environ if environ is None else environ)


def add_gpu_flags(environ: MutableMapping[str, str]) -> None:
  """Adds the flags to `XLA_FLAGS`; a flag that is set already keeps its value."""
  given = environ.get("XLA_FLAGS", "")
  named = set(re.findall(r"--[a-z0-9_]+", given))
  ours = [f"{name}={value}" for name, value in GPU_FLAGS.items() if name not in named]
  environ["XLA_FLAGS"] = " ".join(filter(None, [given, *ours]))
