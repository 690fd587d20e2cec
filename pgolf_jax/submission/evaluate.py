"""Scores an artifact from a submission folder alone: what the folder's `evaluate.py` runs."""

import argparse
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from pgolf_jax.data.shards import load_validation
from pgolf_jax.errors import UserError
from pgolf_jax.quantize.artifact import load
from pgolf_jax.runtime.distributed import run_mesh
from pgolf_jax.runtime.jax_setup import set_xla_options
from pgolf_jax.scoring import plain


def score(
  artifact: Path, data: Path, *, ttt: bool, scores: Path | None = None, sample: np.ndarray | None = None
) -> dict:
  """Returns loss and bits per byte of an artifact on the validation split of a data folder.

  Args:
    artifact: the file.
    data: folder of shards and byte sidecar.
    ttt: score with test-time training and hints as the artifact's settings say, rather than plainly.
    scores: folder for the scores of every target and their trace, with test-time training.
    sample: targets whose log-probabilities of all tokens are written there too.

  Raises:
    UserError: the artifact or the data are damaged, or do not fit together.
  """
  settings, params = load(artifact)
  mesh = run_mesh(settings)
  validation = load_validation(data)
  if (highest := int(validation.tokens.max())) >= settings.model.vocab_size:
    raise UserError(
      f"{data} holds token {highest}, but the model has {settings.model.vocab_size:,}; give its own data."
    )
  params = {name: jnp.asarray(value) for name, value in params.items()}
  if not ttt:
    result = plain.score(settings, params, validation, mesh)
    return {"loss": result.loss, "bpb": result.bpb, "targets": result.targets, "bytes": result.text_bytes}
  from pgolf_jax.scoring.ttt import Options, evaluate  # its n-gram counter is compiled for --ttt only

  evaluation = evaluate(settings, params, validation, mesh, Options(folder=scores, sample=sample))
  if sample is not None:
    targets = sorted(evaluation.distributions)
    np.savez(scores / "distributions.npz", targets=targets, logp=[evaluation.distributions[t] for t in targets])
  return {**evaluation.figures(settings), "evaluation_seconds": evaluation.clocks.evaluation}


def main(folder: Path, args: list[str]) -> int:
  """Prints the score of `folder`'s artifact as JSON. Exit status 0, or 1 with one sentence on what was wrong."""
  parser = argparse.ArgumentParser(prog="evaluate.py")
  parser.add_argument(
    "--data", type=Path, required=True, help="folder of fineweb_val_*.bin and fineweb_val_bytes_*.bin"
  )
  parser.add_argument("--ttt", action="store_true", help="with test-time training and hints")
  parser.add_argument("--scores", type=Path, help="folder for the score of every target, with --ttt")
  parser.add_argument("--sample", type=Path, help=".npy of targets whose whole distributions go to that folder")
  options = parser.parse_args(args)
  sample = None if options.sample is None else np.load(options.sample)
  set_xla_options()  # those of the run, so that the bits are those of the run
  try:
    print(
      json.dumps(score(folder / "artifact.pgolf", options.data, ttt=options.ttt, scores=options.scores, sample=sample))
    )
  except UserError as error:
    raise SystemExit(str(error)) from error
  return 0
