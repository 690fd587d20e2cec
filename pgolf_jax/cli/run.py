"""`pgolf run`: every stage, in order, on one run folder."""

from pathlib import Path

import tyro

from pgolf_jax.settings import Settings
from pgolf_jax.settings.arguments import Overrides, with_config


def run(config: tyro.conf.Positional[Path], out: Path | None = None, settings: Overrides = Settings()) -> int:
  """Train, score, quantise and score again, in one run folder. Stages that are complete are skipped.

  Example: pgolf run configs/demo.toml --out runs/demo --train.iterations 500

  Args:
    config: TOML file of settings.
    out: run folder; runs/NAME-OF-CONFIG if not given.
  """
  from pgolf_jax import stages

  return stages.run(settings, out or Path("runs") / config.stem, list(stages.STAGES))


COMMANDS = {"": with_config(run)}
