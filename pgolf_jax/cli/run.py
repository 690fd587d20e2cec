"""The verbs that take a CONFIG: `pgolf run`, `pgolf train` and `pgolf plan`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pgolf_jax.settings import Settings
from pgolf_jax.settings.arguments import Overrides, Positional, Repeated, with_config


def run(
  config: Positional[Path],
  out: Path | None = None,
  seeds: str = "",
  set: Repeated[str] = (),
  wandb: str = "",
  settings: Overrides = Settings(),
) -> int:
  """Train, score, quantise and score again, in one run folder. Stages that are complete are skipped.

  With --seeds or --set it makes a set: a run for each seed and combination of values, in a folder of its own.

  Example: pgolf run demo --out runs/demo --train.iterations 500
  Example: pgolf run demo --seeds 42,0,314 --set matrix_lr=0.02,0.03

  Args:
    config: name of a built-in config (`pgolf configs` lists them), or a TOML file of settings.
    out: run folder; runs/NAME-OF-CONFIG if not given, with -set behind it for a set.
    seeds: as in 42,0,314.
    set: values of a setting, as in matrix_lr=0.02,0.03; again for a grid.
    wandb: project of Weights & Biases to send the figures to.
  """
  from pgolf_jax import stages

  return _run(config, out, list(stages.STAGES), Sweep(seeds, set, wandb), settings)


def train(
  config: Positional[Path],
  out: Path | None = None,
  seeds: str = "",
  set: Repeated[str] = (),
  wandb: str = "",
  settings: Overrides = Settings(),
) -> int:
  """Train a model in a run folder and score it, without quantising. A run that was cut off continues.

  With --seeds or --set it makes a set, as `pgolf run` does.

  Example: pgolf train demo --out runs/demo --seed 42

  Args:
    config: name of a built-in config (`pgolf configs` lists them), or a TOML file of settings.
    out: run folder; runs/NAME-OF-CONFIG if not given, with -set behind it for a set.
    seeds: as in 42,0,314.
    set: values of a setting, as in matrix_lr=0.02,0.03; again for a grid.
    wandb: project of Weights & Biases to send the figures to.
  """
  return _run(config, out, ["train", "plain"], Sweep(seeds, set, wandb), settings)


class Sweep(NamedTuple):
  """What makes a set of a run, and the project that its figures are sent to."""

  seeds: str
  grid: Sequence[str]
  project: str


def _run(config: Path, out: Path | None, names: list[str], sweep: Sweep, settings: Settings) -> int:
  from pgolf_jax import run_set, stages

  seeds, grid, project = sweep

  def one(settings: Settings, folder: Path, group: str = "") -> int:
    tracking = {"tracking": stages.Tracking(project, group)} if project else {}
    return stages.run(settings, folder, names, **tracking)

  if not seeds and not grid:
    return one(settings, out or Path("runs") / config.stem)
  folder = out or Path("runs") / f"{config.stem}-set"
  made = run_set.members(settings, seeds, grid)
  return run_set.run(folder, made, lambda settings, path: one(settings, path, folder.name))


def plan(
  config: Positional[Path],
  topology: str = "h100:8",
  every_shape: bool = False,
  bytes: bool = False,
  settings: Overrides = Settings(),
) -> int:
  """Compile the steps of training and of test-time training for hardware that is not there.

  Prints for each program the memory of one device, its work, its collectives and the least time it takes at the chips'
  peak rates, and for H100s the machine code of its kernels. The exit status is 1 if a program does not fit. TPUs need
  libtpu (pip install 'pgolf_jax[tpu]') but no TPU. NVIDIA GPUs need JAX's CUDA plugin (pip install 'pgolf_jax[cuda13]')
  but no GPU and no driver; without it programs are lowered for CUDA, and their memory is estimated.

  With --bytes it adds a table of the kernels that the compiled program starts, by class: how many, the bytes that they
  read and write, the time that they may take.

  Example: pgolf plan v5e_8 --topology v5e:2x4
  Example: pgolf plan record_8xh100 --topology h100:8 --bytes --ttt.enabled false

  Args:
    config: name of a built-in config (`pgolf configs` lists them), or a TOML file of settings.
    topology: a GPU (t4, l4, a10g, a100-40, a100-80, rtx3090, rtx4090, rtx5090, h100, h200, b200), or several, as in
      h100:8; or TPUs, such as v5e:1x1, v5e:2x4, v6e:2x4, v5p:2x2x1; or cpu, the machine at hand.
    every_shape: compile the train step of every sequence length and looping mode, not only of the last.
    bytes: count kernels and the bytes that they move, for each use of a layer and in all.
  """
  from pgolf_jax.runtime import jax_setup
  from pgolf_jax.settings import check

  # The hardware of the plan need not be here, and the hardware that is here must be left alone.
  os.environ["JAX_PLATFORMS"] = "cpu"
  if not topology.lower().startswith(("v", "tpu", "cpu")):
    jax_setup.add_gpu_flags(os.environ)
  from pgolf_jax.errors import UserError
  from pgolf_jax.plan import examine, hardware, programs, report

  described = hardware.topology(topology)
  if bytes and described.only_lowers:
    raise UserError(f"--bytes counts what is compiled, but {described.only_lowers}.")
  check.check(settings, device_count=described.mesh.size)
  print(f"{described.name}: {described.mesh.size} × {described.kind}", flush=True)
  if described.only_lowers:
    print(described.only_lowers)
  if settings.train.compute_dtype == "bfloat16" and not hardware.has_bfloat16(described):
    print(f"{described.kind} has no units for bfloat16: --train.compute-dtype float32 is faster there")
  fits = True
  for program in programs(settings, described.mesh, every_shape=every_shape):
    finding = examine(program, described, count_bytes=bytes)
    print("\n" + report(finding, described), flush=True)
    fits = fits and finding.fits is not False
  return 0 if fits else 1


COMMANDS = {
  "run": {"": with_config(run)},
  "train": {"": with_config(train)},
  "plan": {"": with_config(plan)},
}
