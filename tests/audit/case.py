"""A tiny evaluation for the audit's tests: its scores in a folder, and all checks of them."""

from pathlib import Path

import jax
from ttt_case import SETTINGS, chained_documents, changed, random_params

from pgolf_jax.audit import replays
from pgolf_jax.audit.recheck import Subject, recheck
from pgolf_jax.audit.replay import Evaluator
from pgolf_jax.errors import Check, UserError
from pgolf_jax.runtime.distributed import data_mesh
from pgolf_jax.scoring import ttt
from pgolf_jax.settings import load

DATA = chained_documents([40, 31, 52, 36, 45, 38, 47])
STRICT = changed(SETTINGS, phase__prefix_docs=4, batch_size=2)
REFERENCE = changed(STRICT, order="reference")
CACHED = changed(STRICT, method="cached", chunk_size=7)
LEARNT = load.changed(
  changed(SETTINGS, batch_size=2), {"hints.strength": "mixture", "hints.backoff": (3, 2), "hints.threshold": 0.0}
)


class Run:
  """An evaluator, with what it has compiled: evaluations of one instance compile once.

  Args:
    other: an instance of the same compiled programs, to share them.
  """

  def __init__(self, settings=STRICT, data=DATA, other: "Run | None" = None):
    self.settings, self.data = settings, data
    self.evaluator = Evaluator(settings, random_params(), data_mesh(jax.devices()[:1]), data)
    if other is not None:
      self.evaluator.__dict__ |= {name: getattr(other.evaluator, name) for name in ("_programs", "_sampling")}

  def score(self, folder: Path) -> dict:
    """Scores the stream, leaves the scores in the folder, and returns what a run reports of them."""
    evaluator = self.evaluator
    options = ttt.Options(folder=folder, after_batch=lambda batches, record: None)
    result = ttt.evaluate(self.settings, evaluator.params, self.data, evaluator.mesh, options, evaluator._programs)
    return result.figures(self.settings)

  def checks(self, folder: Path, reported: dict | None):
    """Yields the checks of scores in a folder, as the audit makes them."""
    try:
      subject = Subject.read(folder, self.settings, self.data)
      first = list(recheck(subject, folder, reported))
    except UserError as error:
      yield Check("every target scored exactly once", False, str(error))
      return
    yield from first
    if first[0].passed:
      yield from replays(subject, self.evaluator, cuts=4)


def first_broken(checks) -> Check | None:
  """Returns the first check that fails; those after it are not made."""
  return next((check for check in checks if check.passed is False), None)
