"""`pgolf plan`: the programs of a run, compiled for hardware that is not there."""

import os
from pathlib import Path

import tyro

from pgolf_jax.settings.arguments import Overrides, with_config
from pgolf_jax.settings.config import Settings


def plan(
  config: tyro.conf.Positional[Path],
  topology: str = "h100:8",
  every_shape: bool = False,
  settings: Overrides = Settings(),
) -> int:
  """Compile the train and test-time training steps for hardware that is not there.

  Prints memory a device, work, collectives and the least time at peak rates; exit status 1 if a program does not fit.
  TPUs need libtpu (pip install 'pgolf_jax[tpu]') and no TPU; H100s JAX's CUDA plugin (pip install 'pgolf_jax[cuda]')
  and neither a GPU nor a driver. Without the plugin programs for H100s are lowered, not compiled.

  Example: pgolf plan configs/v5e_8.toml --topology v5e:2x4

  Args:
    config: TOML file of settings.
    topology: h100:1, h100:8, or a TPU topology such as v5e:2x4, v6e:2x4, v5p:2x2x1.
    every_shape: the train step of every sequence length and looping mode, not only of the last.
  """
  from pgolf_jax.runtime import xla_options
  from pgolf_jax.settings import check

  # What is planned for need not be here, and what is here must be left alone.
  os.environ["JAX_PLATFORMS"] = "cpu"
  if topology.lower().startswith("h100"):
    xla_options.add_gpu_flags(os.environ)
  from pgolf_jax.plan import hardware as hardwares
  from pgolf_jax.plan.plan import examine, report
  from pgolf_jax.plan.programs import programs

  hardware = hardwares.topology(topology)
  check.check(settings, device_count=hardware.mesh.size)
  print(f"{hardware.name}: {hardware.mesh.size} × {hardware.kind}", flush=True)
  if hardware.only_lowers:
    print(hardware.only_lowers)
  fits = True
  for program in programs(settings, hardware.mesh, every_shape=every_shape):
    finding = examine(program, hardware)
    print("\n" + report(finding, hardware), flush=True)
    fits = fits and finding.fits is not False
  return 0 if fits else 1


COMMANDS = {"": with_config(plan)}
