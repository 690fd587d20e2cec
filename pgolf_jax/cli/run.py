"""`pgolf run`: every stage, in order, on one run folder."""

DESCRIPTION = """Train, score, quantise and score again, in one run folder. Stages that are complete are skipped.

Example: pgolf run configs/demo.toml --out runs/demo --train.iterations 500"""


def main(args: list[str]) -> int:
  from pgolf_jax.settings.arguments import parse

  settings, folder = parse("run", DESCRIPTION, args)
  from pgolf_jax import stages

  return stages.run(settings, folder, list(stages.STAGES))
