"""The verbs that score and prove: `pgolf eval`, `pgolf audit` and `pgolf judge`."""

from pathlib import Path
from typing import Literal

from pgolf_jax.errors import UserError
from pgolf_jax.settings.arguments import Positional


def evaluate(
  target: Positional[Path],
  ttt: bool = True,
  weights: Literal["artifact", "averaged"] = "artifact",
  data: Path | None = None,
  documents: int | None = None,
  any_text: bool = False,
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
    data: folder of shards and sidecar; the run's if neither this nor DATA_PATH is given.
    documents: score only the first so many.
    any_text: score data that the artifact was not made with; their tokenizer must be the same all the same.
    order: of hints and documents, if not as configured.
    method: exact windows or cached keys and values, if not as configured.
    out: with --ttt, folder for scores and progress; the same command goes on there after a kill.
  """
  import contextlib
  import os

  from pgolf_jax import stages
  from pgolf_jax.api import Subject
  from pgolf_jax.model import params as parameters
  from pgolf_jax.runtime import distributed
  from pgolf_jax.runtime.distributed import run_mesh
  from pgolf_jax.runtime.files import locked
  from pgolf_jax.scoring import ttt as training
  from pgolf_jax.settings import check
  from pgolf_jax.settings.load import changed, from_env

  if out and not ttt:
    raise UserError("--out keeps the scores of test-time training; with --no-ttt there are none to keep.")
  distributed.start()
  subject = Subject.read(target, weights)
  settings, params = subject.settings, subject.params
  settings = from_env(os.environ, base=settings)
  mesh = run_mesh(settings)
  choices = {"ttt.order": order, "ttt.method": method}
  settings = changed(settings, {name: value for name, value in choices.items() if value is not None})
  check.check(settings)
  parameters.check(settings.model, params, f"{target} with the model's settings from the environment")
  if data is None and settings.data.path != subject.settings.data.path:
    data = Path(settings.data.path)
  stream = subject.validation(subject.data_folder(data), documents=documents, any_text=any_text)
  if ttt:
    with locked(out) if out else contextlib.nullcontext():
      result = training.evaluate(settings, params, stream, mesh, training.Options(folder=out)).figures(settings)
  else:
    result = stages.plain_score(settings, params, mesh, "scoring", stream)
  for name, value in result.items():
    print(f"{name:<28}{value:,.5f}" if isinstance(value, float) else f"{name:<28}{value}")


def audit(
  runs: Positional[list[Path]],
  data: Path | None = None,
  cuts: int = 2,
  fast: bool = False,
) -> int:
  """Check every rule of scoring on one run, or on all seeds of a set, and print the evidence and a verdict.

  Exit status 1 unless everything that the rules require is proved. What was not checked is not proved; the verdict says
  what would prove it. In reference order that is the order of the hints.

  Example: pgolf audit runs/demo

  Args:
    runs: run folders.
    data: folder of shards and sidecar; the run's if not given.
    cuts: batches, drawn by chance, after which the stream is replaced and scored again; each costs up to an evaluation.
    fast: replay the first batch alone.
  """
  from pgolf_jax.audit import audit as audit_run
  from pgolf_jax.audit.evidence import one_config
  from pgolf_jax.audit.verdict import verdict
  from pgolf_jax.data.folder import locate_prepared
  from pgolf_jax.errors import checks_table
  from pgolf_jax.run_folder import RunFolder
  from pgolf_jax.runtime import distributed
  from pgolf_jax.runtime.distributed import run_mesh

  _require_cuts(cuts)
  distributed.start()
  folders = [RunFolder(path) for path in runs]
  made = []
  for run in folders:
    mesh = run_mesh(run.settings)
    checks = list(audit_run(run, data or locate_prepared(run.settings), mesh, cuts=cuts, fast=fast))
    print(f"{run.path}\n{checks_table(checks)}")
    made += checks
  if len(folders) > 1:
    made.append(one_config(folders))
    print(checks_table(made[-1:]))
  reached = verdict(made)
  print(reached.text())
  return int(not reached.is_legal)


def judge(submission: Positional[Path], data: Path, out: Path | None = None, cuts: int = 2) -> int:
  """Judge a submission folder as an organiser would: score it again and believe nothing that it says.

  Its evaluator runs in processes of its own, without a network, with its counted files and declared packages alone,
  under a clock outside; then on copies of the data with later text replaced. Exit status 1 unless every rule about the
  score is proved.

  Example: pgolf judge submissions/demo --data data/web --out verdict.md

  Args:
    submission: folder that `pgolf package` made.
    data: the judge's own folder of validation shards and sidecar.
    out: file for the page with the verdict; verdict.md in the current folder if not given.
    cuts: batches, drawn by chance, after which later text is replaced; each is an evaluation, and so are two others.
  """
  from pgolf_jax.judge import Terms, page, summary
  from pgolf_jax.judge import judge as judge_folder
  from pgolf_jax.runtime import distributed
  from pgolf_jax.runtime.files import require_room, write_text

  _require_cuts(cuts)
  path = out or Path("verdict.md")
  require_room(path)
  distributed.leave_devices()
  judgement = judge_folder(submission, data, Terms(cuts=cuts))
  write_text(path, page(judgement))
  print(f"{summary(judgement)}\n{path}: the page")
  return int(not judgement.is_proved)


def _require_cuts(cuts: int) -> None:
  if cuts < 1:
    raise UserError(f"--cuts {cuts}: at least one cut is needed to prove anything.")


COMMANDS = {
  "eval": {"": evaluate},
  "audit": {"": audit},
  "judge": {"": judge},
}
