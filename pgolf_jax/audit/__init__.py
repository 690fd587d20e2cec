"""The audit of a run: every rule of scoring, checked on what the run left and on its evaluator.

C1: a distribution depends on the artifact and earlier tokens only. C2: it is a full, normalised one, fixed before the
target is looked at. C3: a token is scored before it changes any state. C4: one pass, every token once.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from jax.sharding import Mesh

from pgolf_jax.audit import evidence
from pgolf_jax.audit.probes import probe
from pgolf_jax.data.validation import load_validation
from pgolf_jax.errors import UserError
from pgolf_jax.quantize import artifact
from pgolf_jax.run_folder import RunFolder
from pgolf_jax.runtime.checks import Check
from pgolf_jax.settings import Settings
from pgolf_jax.settings.load import to_dict


def audit(run: RunFolder, data_folder: Path, mesh: Mesh, *, probe_tokens: int = 600, count: int = 3) -> Iterator[Check]:
  """Makes all checks of one run that was scored with test-time training.

  Args:
    data_folder: shards that the run was trained and scored on.
    probe_tokens: tokens of the stream on which the evaluator is probed.
    count: perturbations of each kind.

  Raises:
    UserError: the run has no artifact.
  """
  if not run.artifact.exists():
    raise UserError(f"{run.path} has no artifact to audit; `pgolf run` makes and scores one.")
  settings = run.settings
  data = load_validation(data_folder)
  _, params = artifact.load(run.artifact)
  yield from probe(settings, params, data, mesh, tokens=probe_tokens, count=count)
  yield from evidence.scores(run.scores, data, settings)
  yield from evidence.data_checks(data_folder)
  yield evidence.size(run.artifact, settings.quantize.budget_bytes)
  yield from evidence.clocks(run.results(), settings)
  yield evidence.first_step(run, data_folder)


def one_config(runs: Sequence[RunFolder]) -> Check:
  """All runs of a set have the same settings except the seed, and different seeds."""
  hashes = {config_hash(run.settings): run for run in runs}
  seeds = [run.settings.seed for run in runs]
  name = "one config for all seeds"
  if len(hashes) > 1:
    return Check(name, False, "; ".join(f"{run.path.name}: {key[:12]}" for key, run in hashes.items()))
  if len(set(seeds)) < len(seeds):
    return Check(name, False, f"seeds {seeds} are not all different")
  return Check(name, True, f"{next(iter(hashes))[:12]}, seeds {', '.join(map(str, seeds))}")


def config_hash(settings: Settings) -> str:
  """Returns the SHA-256 of all settings but the seed."""
  config = {k: v for k, v in to_dict(settings).items() if k != "seed"}
  return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
