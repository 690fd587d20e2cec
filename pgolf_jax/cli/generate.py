"""`pgolf generate`: text from an artifact."""

from pathlib import Path

import tyro


def generate(
  artifact: tyro.conf.Positional[Path],
  prompt: str = "",
  tokens: int = 200,
  temperature: float = 0.8,
  top_p: float = 0.95,
  seed: int = 0,
  tokenizer: Path | None = None,
) -> None:
  """Continue a prompt with an artifact's model, and print each piece as soon as it is certain.

  Example: pgolf generate runs/demo/artifact.pgolf --prompt "My fellow citizens," --temperature 0.7

  Args:
    artifact: an artifact's file, or the folder of a run or submission that holds one.
    prompt: text to continue.
    tokens: makes at most so many.
    temperature: 0 takes the likeliest token each time; 1 samples as the model says.
    top_p: sample from the fewest tokens that together have this probability.
    seed: the same seed gives the same text.
    tokenizer: the model's .model file; tokenizer.model beside the artifact, or the run's, if not given.
  """
  import jax.numpy as jnp

  from pgolf_jax.data.tokenizer import Tokenizer
  from pgolf_jax.model import generate as generation
  from pgolf_jax.quantize.artifact import load
  from pgolf_jax.runtime import distributed

  distributed.start()
  path = artifact / "artifact.pgolf" if artifact.is_dir() else artifact
  settings, params = load(path)
  pieces = generation.generate(
    settings,
    {name: jnp.asarray(value) for name, value in params.items()},
    Tokenizer.load(tokenizer or _tokenizer_beside(path)),
    prompt,
    generation.Sampling(tokens, temperature, top_p, seed),
  )
  print(prompt, end="", flush=True)
  for piece in pieces:
    print(piece, end="", flush=True)
  print()


def _tokenizer_beside(path: Path) -> Path:
  """Returns tokenizer.model next to the artifact, or the tokenizer of the run whose folder holds it."""
  from pgolf_jax.data.folder import locate_prepared
  from pgolf_jax.errors import UserError
  from pgolf_jax.run_folder import RunFolder

  if (path.parent / "tokenizer.model").is_file():
    return path.parent / "tokenizer.model"
  if (path.parent / "config.toml").is_file():
    settings = RunFolder(path.parent).settings
    return Path(settings.data.tokenizer or locate_prepared(settings) / "tokenizer.model")
  raise UserError(f"There is no tokenizer.model beside {path}; give the model's own with --tokenizer.")


COMMANDS = {"": generate}
