"""Test-time training as a stage of a run, and what it reports."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pgolf_jax.errors import UserError
from pgolf_jax.model import params as parameters
from pgolf_jax.model.params import Params
from pgolf_jax.run_folder import RunFolder
from pgolf_jax.runtime.log import log
from pgolf_jax.scoring.documents import find_documents
from pgolf_jax.scoring.evaluation import Evaluation
from pgolf_jax.scoring.plain import ValidationData, load_validation
from pgolf_jax.scoring.ttt import Evaluator
from pgolf_jax.settings.config import Settings
from pgolf_jax.settings.load import from_dict


def load_artifact(path: Path) -> tuple[Settings, Params]:
  """The settings that an artifact carries, and its weights.

  Raises:
    UserError: the file is not an artifact, or its weights do not belong to its settings.
  """
  from pgolf_jax.quantize.artifact.format import dequantize

  if not path.is_file():
    raise UserError(f"There is no artifact {path}; `pgolf run` or `pgolf quantize` makes one.")
  config, params = dequantize(path.read_bytes())
  settings = from_dict(config, where=f"the config in {path}")
  parameters.check(settings.model, params, where=str(path))
  return settings, params


def first_documents(data: ValidationData, count: int | None, bos_id: int) -> ValidationData:
  """The first documents of a stream, the bos that follows them included; all if no count is given."""
  if count is None:
    return data
  documents = find_documents(data.tokens, bos_id)
  if not 0 < count <= len(documents):
    raise UserError(f"There are {len(documents)} validation documents; ask for 1 to {len(documents)}, not {count}.")
  last = documents[count - 1]
  return ValidationData(*(x[: last.start + last.length] for x in data))


def score(
  settings: Settings, params: Params, data: ValidationData, mesh: Mesh, *, folder: Path | None = None
) -> tuple[Evaluation, dict]:
  """Scores with test-time training; the evaluation, and its figures for results.json.

  Args:
    folder: keeps scores, so that a killed evaluation goes on; see store.py.
  """
  evaluator = Evaluator(settings, mesh, dtype=jnp.dtype(settings.train.compute_dtype), folder=folder)
  found = evaluator(params, data)
  clocks = found.clocks
  return found, {
    "loss": found.score.loss,
    "bpb": found.score.bpb,
    "bpb_without_hints": found.untilted.bpb,
    "targets": found.score.targets,
    "bytes": found.score.text_bytes,
    "gated": int(np.sum(found.gate_N)),
    "order": settings.ttt.order,
    "method": settings.ttt.method,
    "seconds": clocks.evaluation,
    "hint_seconds": clocks.hints,
    "global_phase_seconds": clocks.global_phases,
    "compile_seconds": clocks.compilation,
    "recompilations_in_clock": found.recompilations,
    "useful_over_executed_flops": found.useful_flops / found.executed_flops,
  }


def ttt(run: RunFolder, data_folder: Path, mesh: Mesh) -> dict:
  """Scores a run's artifact with test-time training, in the run's order; scores are kept in its folder."""
  _, params = load_artifact(run.artifact)
  result = score(run.settings, params, load_validation(data_folder), mesh, folder=run.scores)[1]
  log.info(
    "ttt: %.5f bits per byte (%.5f without hints), %.1f s, %s order",
    result["bpb"],
    result["bpb_without_hints"],
    result["seconds"],
    result["order"],
  )
  return result
