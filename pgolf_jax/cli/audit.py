"""`pgolf audit`: the rules of scoring, proved or refuted on runs."""

from pathlib import Path
from typing import Annotated

import tyro


def audit(
  runs: Annotated[list[Path], tyro.conf.Positional],
  data: Path | None = None,
  probes: int = 3,
  probe_tokens: int = 600,
) -> int:
  """Check every rule of scoring on one run, or on all seeds of a set, and print the evidence.

  Exit status 1 if a rule is broken. In reference order the trace is reported as not acyclic.

  Example: pgolf audit runs/demo

  Args:
    runs: run folders.
    data: folder of shards and sidecar; the run's if not given.
    probes: perturbations of each kind; each is an evaluation of a small stream.
    probe_tokens: tokens of that stream.
  """
  from pgolf_jax.audit import audit as audit_run
  from pgolf_jax.audit import one_config
  from pgolf_jax.data.folder import locate_prepared
  from pgolf_jax.run_folder import RunFolder
  from pgolf_jax.runtime import distributed
  from pgolf_jax.runtime.checks import table
  from pgolf_jax.runtime.mesh import data_mesh

  distributed.start()
  mesh = data_mesh()
  folders = [RunFolder(path) for path in runs]
  made = []
  for run in folders:
    data_folder = data or locate_prepared(run.settings)
    checks = list(audit_run(run, data_folder, mesh, probe_tokens=probe_tokens, count=probes))
    print(f"{run.path}\n{table(checks)}")
    made += checks
  if len(folders) > 1:
    made.append(one_config(folders))
    print(table(made[-1:]))
  return int(any(check.passed is False for check in made))


COMMANDS = {"": audit}
