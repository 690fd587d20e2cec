"""The verbs about an artifact: `pgolf quantize`, `pgolf package` and `pgolf generate`."""

import dataclasses
from pathlib import Path

from pgolf_jax.errors import UserError
from pgolf_jax.settings import QuantizeConfig
from pgolf_jax.settings.arguments import Defaults, Positional


def quantize(
  run: Positional[Path],
  out: Path | None = None,
  fit: bool = False,
  quantize: QuantizeConfig = QuantizeConfig(),
) -> None:
  """Quantise the averaged weights of a run into an artifact, and list its bytes by stream.

  Example: pgolf quantize runs/demo --fit --quantize.codec entropy

  Args:
    run: run folder with finished training.
    out: the artifact's file; artifact.pgolf in the run folder if not given.
    fit: search for the finest clips, or the finest step, with which artifact and code fit the budget.
  """
  from pgolf_jax.run_folder import RunFolder
  from pgolf_jax.runtime import distributed
  from pgolf_jax.runtime.files import locked, require_room

  if out is not None:
    require_room(out)
  distributed.start()
  folder = RunFolder(run)
  with locked(folder.path):
    _quantize(folder, out or folder.artifact, fit, quantize)


def read_run(path: Path | None) -> dict[str, QuantizeConfig]:
  """Returns the quantiser's settings of a run, as the defaults of its options."""
  from pgolf_jax.run_folder import RunFolder

  return {} if path is None else {"quantize": RunFolder(path).settings.quantize}


def _quantize(run, out: Path, fit: bool, config: QuantizeConfig) -> None:
  from pgolf_jax import stages
  from pgolf_jax.quantize.make import SCALES
  from pgolf_jax.runtime import distributed
  from pgolf_jax.runtime.distributed import run_mesh
  from pgolf_jax.runtime.files import write_bytes
  from pgolf_jax.submission import bundle, package

  mesh = run_mesh(run.settings)
  fit = fit or config.fill_budget
  made = stages.make_artifact(run, dataclasses.replace(run.given, quantize=config), mesh, fit=fit)
  if out.resolve() == run.artifact.resolve():
    stages.replace_artifact(run, mesh, made)
  elif distributed.is_leader():
    write_bytes(out, made.data)
  print(package.table(package.count(made.data, bundle.code(), budget=config.budget_bytes)))
  if fit:
    fitted = {name: getattr(made.config, name) for name in SCALES[made.config.method].names}
    print("fitted: " + ", ".join(f"quantize.{name}={value:g}" for name, value in fitted.items()))
  print(f"{out}: " + ", ".join(f"{what} {seconds:.1f} s" for what, seconds in made.seconds.items()))


def package(run: Positional[Path], out: Path | None = None, data: Path | None = None, ttt: bool = False) -> None:
  """Build a submission folder from a run, count its bytes, and score it from itself alone in a fresh process.

  Example: pgolf package runs/demo --out submissions/demo

  Args:
    run: run folder with an artifact.
    out: the submission folder; RUN/submission if not given.
    data: folder of validation shards; the run's own if not given.
    ttt: check the score with test-time training as well as the plain one.
  """
  from pgolf_jax.run_folder import RunFolder
  from pgolf_jax.runtime import distributed
  from pgolf_jax.runtime.files import locked

  distributed.leave_devices()
  folder = RunFolder(run)
  with locked(folder.path):
    _package(folder, out or folder.path / "submission", data, ttt)


def _package(folder, out: Path, data: Path | None, ttt: bool) -> None:
  from pgolf_jax.data.folder import locate, locate_prepared
  from pgolf_jax.data.manifest import tokenizer_file
  from pgolf_jax.runtime.files import file_hash
  from pgolf_jax.submission import package as packaging

  if not folder.artifact.is_file():
    raise UserError(f"{folder.path} has no artifact; `pgolf quantize {folder.path}` makes one.")
  results, sha256 = folder.results(), file_hash(folder.artifact)
  made, scored = results.get("artifact", {}), results.get("ttt", {})
  if made.get("made", {}).get(folder.artifact.name) != sha256:
    raise UserError(
      f"{folder.artifact} was not made by a finished stage of this run; `pgolf quantize {folder.path}` makes it again."
    )
  if scored.get("made_from", {}).get(folder.artifact.name) != sha256:
    scored = {}  # of another artifact
  data = data or locate_prepared(folder.settings)
  tokenizer = tokenizer_file(folder.settings, locate(folder.settings))  # the run's, whatever it is scored on here
  logs = [p for name in ("run.log", "results.json", "config.toml") if (p := folder.path / name).is_file()]
  contents = packaging.Contents(
    name=folder.path.resolve().name,
    tokenizer=tokenizer if tokenizer.is_file() else None,
    logs=logs,
    score=scored or made,
  )

  def verify(built: Path) -> None:
    rescored = packaging.verify(built, data, expected_bpb=made.get("bpb"))
    print(f"plain score from the folder alone: {rescored['bpb']:.5f} bits per byte")
    if ttt:
      rescored = packaging.verify(built, data, expected_bpb=scored.get("bpb"), ttt=True)
      print(f"with test-time training: {rescored['bpb']:.5f} bits per byte")

  print(packaging.table(packaging.build(out, folder.artifact.read_bytes(), contents, verify=verify)))
  print(f"{out}: complete")


def generate(
  artifact: Positional[Path],
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
    tokenizer: the model's .model file; the one in the artifact, beside it, or of its run if not given.
  """
  from pgolf_jax import load
  from pgolf_jax.runtime.log import progress

  pieces = load(artifact, tokenizer).generate(prompt, tokens, temperature, top_p, seed)
  with progress("compiling"):
    begun = next(pieces, "")
  print(prompt + begun, end="", flush=True)
  for piece in pieces:
    print(piece, end="", flush=True)
  print()


COMMANDS = {
  "quantize": {"": Defaults(quantize, read_run, example="runs/demo")},
  "package": {"": package},
  "generate": {"": generate},
}
