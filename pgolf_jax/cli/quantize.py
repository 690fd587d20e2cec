"""`pgolf quantize`: the averaged weights of a run as an artifact."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from pgolf_jax.errors import UserError
from pgolf_jax.settings.config import QuantizeConfig

DESCRIPTION = """Quantise the averaged weights of a run into an artifact, and say what its bytes are.

Example: pgolf quantize runs/demo --fit --quantize.codec entropy"""


@dataclasses.dataclass(frozen=True)
class QuantizeArgs:
  """What `pgolf quantize` understands."""

  run: tyro.conf.Positional[Path]
  """Run folder with finished training."""
  out: Path | None = None
  """The artifact's file; artifact.pgolf in the run folder if not given."""
  fit: bool = False
  """Search the finest clips with which artifact and code fit the budget."""
  quantize: Annotated[QuantizeConfig, tyro.conf.arg(name="quantize")] = dataclasses.field(
    default_factory=QuantizeConfig
  )


def main(args: list[str]) -> int:
  if not args or args[0].startswith("-"):
    if not {"-h", "--help"} & set(args):
      raise UserError("pgolf quantize needs a run folder first, as in: pgolf quantize runs/demo")
    tyro.cli(QuantizeArgs, args=args, prog="pgolf quantize", description=DESCRIPTION)
  from pgolf_jax.run_folder import RunFolder
  from pgolf_jax.runtime import distributed
  from pgolf_jax.runtime.lock import locked

  distributed.start()
  run = RunFolder(args[0])
  defaults = QuantizeArgs(run=Path(args[0]), quantize=run.settings.quantize)
  found = tyro.cli(QuantizeArgs, default=defaults, args=args, prog="pgolf quantize", description=DESCRIPTION)
  with locked(run.path):
    return _quantize(run, found)


def _quantize(run, found: QuantizeArgs) -> int:
  from pgolf_jax import stages
  from pgolf_jax.quantize import stage
  from pgolf_jax.runtime import distributed
  from pgolf_jax.runtime.mesh import data_mesh, world_size
  from pgolf_jax.submission import accounting, package

  if "train" not in run.results():
    raise UserError(f"{run.path} has no finished training; `pgolf train` with its config and --out {run.path} goes on.")
  mesh = data_mesh()
  settings = dataclasses.replace(run.settings, quantize=found.quantize)
  code = package.code()
  made = stage.make(
    settings,
    stages.averaged_params(run, mesh),
    stages.data_folder(settings),
    world=world_size(settings, mesh),
    fit_bytes=settings.quantize.budget_bytes - code.size if found.fit else None,
  )
  out = found.out or run.artifact
  if distributed.is_leader():
    out.write_bytes(made.data)
  budget = settings.quantize.budget_bytes
  parts = {"starter": code.starter, "archive": code.archive, "files": code.files}
  print(accounting.table(accounting.account(made.data, **parts, tokenizer=0, budget=budget)))
  if found.fit:
    clips = {k: v for k, v in dataclasses.asdict(made.config).items() if k.endswith("clip_sigmas")}
    print("clips: " + ", ".join(f"quantize.{name}={value:g}" for name, value in clips.items()))
  print(f"{out}: " + ", ".join(f"{what} {seconds:.1f} s" for what, seconds in made.seconds.items()))
  return 0
