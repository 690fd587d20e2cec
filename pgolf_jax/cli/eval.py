"""`pgolf eval`: the score of a run or of a bare artifact."""

from pathlib import Path
from typing import Annotated, Literal

import tyro


def evaluate(
  target: Annotated[Path, tyro.conf.Positional],
  ttt: bool = True,
  weights: Literal["artifact", "averaged"] = "artifact",
  data: Path | None = None,
  documents: int | None = None,
  order: Literal["strict", "reference"] | None = None,
  method: Literal["exact", "cached"] | None = None,
  out: Path | None = None,
) -> None:
  """Score a run or a bare artifact on the validation documents, with test-time training or without.

  Settings are the run's or the artifact's; environment names of the recipe go over them.

  Example: TTT_CHUNK_SIZE=32 pgolf eval runs/demo/artifact.pgolf --data data/web --documents 100

  Args:
    target: run folder or artifact.
    ttt: score first, then learn, chunk by chunk, with hints; or plainly.
    weights: of a run: those of its artifact, or the averaged ones before quantising.
    data: folder of shards and sidecar; the run's if not given.
    documents: score only the first so many.
    order: of hints and documents, if not as configured.
    method: exact windows or cached keys and values, if not as configured.
    out: folder for scores and progress; the same command goes on there after a kill.
  """
  import dataclasses
  import os

  from pgolf_jax import stages
  from pgolf_jax.data.folder import locate_prepared
  from pgolf_jax.data.validation import load_validation
  from pgolf_jax.errors import UserError
  from pgolf_jax.quantize import artifact
  from pgolf_jax.run_folder import RunFolder
  from pgolf_jax.runtime import distributed
  from pgolf_jax.runtime.mesh import data_mesh
  from pgolf_jax.scoring import documents as streams
  from pgolf_jax.scoring import ttt as training
  from pgolf_jax.settings import check
  from pgolf_jax.settings.load import from_env

  distributed.start()
  mesh = data_mesh()
  if target.is_dir():
    run = RunFolder(target)
    settings = run.settings
    if weights == "artifact":
      params = artifact.load(run.artifact)[1]
    else:
      params = stages.averaged_params(run, mesh)
  else:
    settings, params = artifact.load(target)
    if weights == "averaged":
      raise UserError(f"{target} holds quantised weights alone; give the run folder to score the averaged ones.")
  settings = from_env(os.environ, base=settings)
  changes = {name: value for name, value in (("order", order), ("method", method)) if value is not None}
  settings = dataclasses.replace(settings, ttt=dataclasses.replace(settings.ttt, **changes))
  check.check(settings)
  folder = data or locate_prepared(settings)
  stream = streams.first_documents(load_validation(folder), documents, settings.model.bos_id)
  if ttt:
    result = training.evaluate(settings, params, stream, mesh, training.Options(folder=out)).figures(settings)
  else:
    result = stages.plain_score(settings, params, mesh, "scoring", stream)
  for name, value in result.items():
    print(f"{name:<28}{value:,.5f}" if isinstance(value, float) else f"{name:<28}{value}")


COMMANDS = {"": evaluate}
