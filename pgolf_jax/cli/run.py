"""The verbs that take a CONFIG: `pgolf run`, `pgolf train` and `pgolf plan`."""

import os
from pathlib import Path

from pgolf_jax.settings import Settings
from pgolf_jax.settings.arguments import Overrides, Positional, with_config


def run(config: Positional[Path], out: Path | None = None, settings: Overrides = Settings()) -> int:
  """Train, score, quantise and score again, in one run folder. Stages that are complete are skipped.

  Example: pgolf run demo --out runs/demo --train.iterations 500

  Args:
    config: name of a built-in config (`pgolf configs` lists them), or a TOML file of settings.
    out: run folder; runs/NAME-OF-CONFIG if not given.
  """
  from pgolf_jax import stages

  return stages.run(settings, out or Path("runs") / config.stem, list(stages.STAGES))


def train(config: Positional[Path], out: Path | None = None, settings: Overrides = Settings()) -> int:
  """Train a model in a run folder and score it, without quantising. A run that was cut off continues.

  Example: pgolf train demo --out runs/demo --seed 42

  Args:
    config: name of a built-in config (`pgolf configs` lists them), or a TOML file of settings.
    out: run folder; runs/NAME-OF-CONFIG if not given.
  """
  from pgolf_jax import stages

  return stages.run(settings, out or Path("runs") / config.stem, ["train", "plain"])


def plan(
  config: Positional[Path],
  topology: str = "h100:8",
  every_shape: bool = False,
  settings: Overrides = Settings(),
) -> int:
  """Compile the steps of training and of test-time training for hardware that is not there.

  Prints for each program the memory of one device, its work, its collectives and the least time it takes at the chips'
  peak rates, and for H100s the machine code of its kernels. The exit status is 1 if a program does not fit. TPUs need
  libtpu (pip install 'pgolf_jax[tpu]') but no TPU, H100s JAX's CUDA plugin (pip install 'pgolf_jax[cuda]') but no GPU
  and no driver. Without the plugin, programs for H100s are lowered but not compiled: memory and machine code stay
  unknown.

  Example: pgolf plan v5e_8 --topology v5e:2x4

  Args:
    config: name of a built-in config (`pgolf configs` lists them), or a TOML file of settings.
    topology: h100:1, h100:8, or a TPU topology such as v5e:2x4, v6e:2x4, v5p:2x2x1.
    every_shape: compile the train step of every sequence length and looping mode, not only of the last.
  """
  from pgolf_jax.runtime import jax_setup
  from pgolf_jax.settings import check

  # The hardware of the plan need not be here, and the hardware that is here must be left alone.
  os.environ["JAX_PLATFORMS"] = "cpu"
  if topology.lower().startswith("h100"):
    jax_setup.add_gpu_flags(os.environ)
  from pgolf_jax.plan import examine, hardware, programs, report

  described = hardware.topology(topology)
  check.check(settings, device_count=described.mesh.size)
  print(f"{described.name}: {described.mesh.size} × {described.kind}", flush=True)
  if described.only_lowers:
    print(described.only_lowers)
  fits = True
  for program in programs(settings, described.mesh, every_shape=every_shape):
    finding = examine(program, described)
    print("\n" + report(finding, described), flush=True)
    fits = fits and finding.fits is not False
  return 0 if fits else 1


COMMANDS = {
  "run": {"": with_config(run)},
  "train": {"": with_config(train)},
  "plan": {"": with_config(plan)},
}
