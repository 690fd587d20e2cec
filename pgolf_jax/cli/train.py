"""`pgolf train`: the first stages of `pgolf run`."""

from pathlib import Path

import tyro

from pgolf_jax.settings import Settings
from pgolf_jax.settings.arguments import Overrides, with_config


def train(config: tyro.conf.Positional[Path], out: Path | None = None, settings: Overrides = Settings()) -> int:
  """Train a model in a run folder and score it, without quantising. A run that was cut off continues.

  Example: pgolf train configs/demo.toml --out runs/demo --seed 42

  Args:
    config: TOML file of settings.
    out: run folder; runs/NAME-OF-CONFIG if not given.
  """
  from pgolf_jax import stages

  return stages.run(settings, out or Path("runs") / config.stem, ["train", "plain"])


COMMANDS = {"": with_config(train)}
