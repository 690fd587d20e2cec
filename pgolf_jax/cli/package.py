"""`pgolf package`: a submission folder that scores from itself alone."""

from pathlib import Path

import tyro


def package(
  run: tyro.conf.Positional[Path], out: Path | None = None, data: Path | None = None, ttt: bool = False
) -> None:
  """Build a submission folder from a run, count its bytes, and score it from itself alone in a fresh process.

  Example: pgolf package runs/demo --out submissions/demo

  Args:
    run: run folder with an artifact.
    out: the submission folder; RUN/submission if not given.
    data: folder of validation shards; the run's own if not given.
    ttt: check the score with test-time training as well as the plain one.
  """
  from pgolf_jax.data.folder import locate_prepared
  from pgolf_jax.errors import UserError
  from pgolf_jax.run_folder import RunFolder
  from pgolf_jax.runtime import distributed
  from pgolf_jax.submission import package as packaging

  distributed.leave_devices()
  folder = RunFolder(run)
  if not folder.artifact.is_file():
    raise UserError(f"{folder.path} has no artifact; `pgolf quantize {folder.path}` makes one.")
  data = data or locate_prepared(folder.settings)
  tokenizer = Path(folder.settings.data.tokenizer) if folder.settings.data.tokenizer else data / "tokenizer.model"
  logs = [p for name in ("run.log", "results.json", "config.toml") if (p := folder.path / name).is_file()]
  results = folder.results()
  out = out or folder.path / "submission"
  contents = packaging.Contents(
    name=folder.path.resolve().name,
    tokenizer=tokenizer if tokenizer.is_file() else None,
    logs=logs,
    score=results.get("ttt") or results.get("artifact"),
  )
  print(packaging.table(packaging.build(out, folder.artifact.read_bytes(), contents)))
  plain = results.get("artifact", {}).get("bpb")
  rescored = packaging.verify(out, data, expected_bpb=plain)
  print(f"plain score from the folder alone: {rescored['bpb']:.5f} bits per byte")
  if ttt:
    expected = results.get("ttt", {}).get("bpb")
    rescored = packaging.verify(out, data, expected_bpb=expected, ttt=True)
    print(f"with test-time training: {rescored['bpb']:.5f} bits per byte")
  print(f"{out}: complete")


COMMANDS = {"": package}
