"""`pgolf quantize`: the averaged weights of a run as an artifact."""

import dataclasses
from pathlib import Path

import tyro

from pgolf_jax.errors import UserError
from pgolf_jax.settings import QuantizeConfig
from pgolf_jax.settings.arguments import Defaults


def quantize(
  run: tyro.conf.Positional[Path],
  out: Path | None = None,
  fit: bool = False,
  quantize: QuantizeConfig = QuantizeConfig(),
) -> None:
  """Quantise the averaged weights of a run into an artifact, and list its bytes by stream.

  Example: pgolf quantize runs/demo --fit --quantize.codec entropy

  Args:
    run: run folder with finished training.
    out: the artifact's file; artifact.pgolf in the run folder if not given.
    fit: search for the finest clips with which artifact and code fit the budget.
  """
  from pgolf_jax.run_folder import RunFolder
  from pgolf_jax.runtime import distributed
  from pgolf_jax.runtime.files import locked

  distributed.start()
  folder = RunFolder(run)
  with locked(folder.path):
    _quantize(folder, out or folder.artifact, fit, quantize)


def _read_run(path: Path | None) -> dict[str, QuantizeConfig]:
  from pgolf_jax.run_folder import RunFolder

  return {} if path is None else {"quantize": RunFolder(path).settings.quantize}


def _quantize(run, out: Path, fit: bool, config: QuantizeConfig) -> None:
  from pgolf_jax import stages
  from pgolf_jax.data.folder import locate_prepared
  from pgolf_jax.quantize.make import make
  from pgolf_jax.runtime import distributed
  from pgolf_jax.runtime.files import write_bytes
  from pgolf_jax.runtime.mesh import data_mesh, world_size
  from pgolf_jax.submission import bundle, package

  if "train" not in run.results():
    raise UserError(f"{run.path}: training is not finished; `pgolf train CONFIG --out {run.path}` resumes it.")
  mesh = data_mesh()
  settings = dataclasses.replace(run.settings, quantize=config)
  code = bundle.code()
  made = make(
    settings,
    stages.averaged_params(run, mesh),
    locate_prepared(settings),
    world=world_size(settings, mesh),
    fit_bytes=settings.quantize.budget_bytes - code.size if fit else None,
  )
  if distributed.is_leader():
    write_bytes(out, made.data)
  print(package.table(package.count(made.data, code, budget=settings.quantize.budget_bytes)))
  if fit:
    clips = {k: v for k, v in dataclasses.asdict(made.config).items() if k.endswith("clip_sigmas")}
    print("clips: " + ", ".join(f"quantize.{name}={value:g}" for name, value in clips.items()))
  print(f"{out}: " + ", ".join(f"{what} {seconds:.1f} s" for what, seconds in made.seconds.items()))


COMMANDS = {"": Defaults(quantize, _read_run, example="runs/demo")}
