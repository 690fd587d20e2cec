"""`pgolf train`: the first stages of `pgolf run`."""

DESCRIPTION = """Train a model in a run folder and score it, without quantising. A run that was cut off continues.

Example: pgolf train configs/demo.toml --out runs/demo --seed 42"""


def main(args: list[str]) -> int:
  from pgolf_jax.settings.arguments import parse

  settings, folder = parse("train", DESCRIPTION, args)
  from pgolf_jax import stages

  return stages.run(settings, folder, ["train", "plain"])
