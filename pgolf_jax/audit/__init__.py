"""The audit of a run: every rule of scoring, checked on the scores, on the code that made them, and on the folder.

evidence.py  files by hash, bytes, clocks, the training that the log tells of
recheck.py   the scores without the model: hints, tilts and sums computed again
replay.py    the run's stream scored again with later tokens replaced; whole distributions
verdict.py   the rules, their limits, and what a list of checks amounts to
"""

from collections.abc import Iterator
from pathlib import Path

from jax.sharding import Mesh

from pgolf_jax.audit import evidence
from pgolf_jax.audit.recheck import Subject, as_scored, printed, recheck
from pgolf_jax.audit.replay import Evaluator, draw_cuts, fixed_before, full, put_likely_tokens, replay, sample_targets
from pgolf_jax.data.shards import load_validation
from pgolf_jax.errors import Check, UserError
from pgolf_jax.quantize import artifact
from pgolf_jax.run_folder import RunFolder
from pgolf_jax.runtime.log import progress

CUTS = 2


def audit(run: RunFolder, data_folder: Path, mesh: Mesh, *, cuts: int = CUTS, fast: bool = False) -> Iterator[Check]:
  """Makes all checks of one run that was scored with test-time training, the cheap ones first.

  Args:
    data_folder: shards that the run was trained and scored on.
    cuts: places drawn by chance at which the stream is cut, beside one or two that are fixed; each costs an evaluation
      up to that place.
    fast: scores the first batch alone again, cut that many times.

  Raises:
    UserError: the run has no artifact.
  """
  evidence.require_artifact(run)
  with progress("auditing", unit="checks") as bar:
    for check in _checks(run, data_folder, mesh, cuts=cuts, fast=fast):
      bar.advance()
      yield check


def _checks(run: RunFolder, data_folder: Path, mesh: Mesh, *, cuts: int, fast: bool) -> Iterator[Check]:
  results, settings, data = run.results(), run.settings, load_validation(data_folder)
  yield evidence.same_files(run, data_folder)
  yield from evidence.data_checks(data_folder)
  yield evidence.size(run)
  yield from evidence.clocks(results, settings)
  log = evidence.training_log(run)
  yield log
  try:
    subject = Subject.read(run.scores, settings, data)
    checks = list(recheck(subject, run.scores, results.get("ttt")))
  except UserError as error:
    checks = [Check("every target scored exactly once", False, str(error))]
  yield from checks
  yield printed(run.log, results.get("ttt", {}).get("bpb"))
  if log.passed is not False:
    yield evidence.first_step(run, data_folder, mesh)
    yield evidence.later_steps(run, data_folder, mesh)
  if checks[0].passed:  # cuts are drawn among scores that are there
    try:
      evaluator = Evaluator(as_scored(settings, run.scores), artifact.load(run.artifact)[1], mesh, data)
    except UserError as error:
      yield Check("later tokens change no score", False, str(error))
      return
    yield from replays(subject, evaluator, cuts=cuts, fast=fast)


def replays(subject: Subject, evaluator: Evaluator, *, cuts: int = CUTS, fast: bool = False) -> Iterator[Check]:
  """Checks scores by scoring their stream again, with later tokens replaced and with whole distributions."""
  drawn = draw_cuts(subject, cuts, fast=fast)
  wanted = sample_targets(subject, drawn)
  samples = evaluator.sample(wanted, max(cut.batches for cut in drawn))
  drawn = put_likely_tokens(subject, drawn, samples)
  moved, outcomes, subject = replay(subject, evaluator.evaluate, drawn)
  yield moved
  yield full(subject, samples, wanted)
  yield fixed_before(subject, samples, outcomes)
