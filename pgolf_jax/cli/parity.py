"""`pgolf parity`: golden cases of the PyTorch reference."""

from pathlib import Path
from typing import Literal

from pgolf_jax.settings.arguments import Positional


def run(
  case: Positional[Path],
  out: Path,
  dtype: Literal["float32", "bfloat16"] | None = None,
  tokenizer: Path | None = None,
) -> None:
  """Write our outputs for a golden case, under the names of its expected file.

  Example: pgolf parity run tests/golden/forward --out ours.safetensors

  Args:
    case: folder of the case.
    out: file to write: safetensors, or JSON lines for the kind `caseops`.
    dtype: type to compute in, in place of the one that the reference computed in.
    tokenizer: SentencePiece model of a `caseops` case, if it is not beside the case.
  """
  from pgolf_jax.parity import Case, write_outputs
  from pgolf_jax.parity import run as parity_run
  from pgolf_jax.runtime import distributed

  distributed.start()
  outputs = parity_run.run(Case.load(case, dtype=dtype, tokenizer=tokenizer))
  write_outputs(out, outputs)
  print(f"{len(outputs)} {'tensors' if isinstance(outputs, dict) else 'documents'} written to {out}")


def check(
  case: Positional[Path | None] = None,
  all: bool = False,
  ours: Path | None = None,
  dtype: Literal["float32", "bfloat16", "float64"] | None = None,
  tensors: bool = False,
  json: Path | None = None,
  tokenizer: Path | None = None,
) -> int:
  """Compare a golden case, or all of a folder, with what this installation computes on this device.

  Prints the errors beside their limits and the perturbation floor, in the reference's type, in bfloat16 and in float64
  side by side; exit status 1 if an error is too large. The floor is how far an output moves when every weight moves by
  one part in ten million. On an accelerator, and in another type than the reference's, limits are derived from it.
  docs/parity.md says how to read the table.

  Example: pgolf parity check --all

  Args:
    case: folder of the case; with --all a folder of cases, or nothing for the small cases that come with the package.
    all: check all cases of the folder.
    ours: file that `pgolf parity run` wrote; the case is run now if not given.
    dtype: the only type to compute in; float64 for forward and optimizer cases, where the device has it.
    tensors: print one row per tensor instead of one per quantity.
    json: file to write everything to that was found, tensor by tensor.
    tokenizer: SentencePiece model of a `caseops` case, if it is not beside the case.
  """
  from pgolf_jax.errors import UserError
  from pgolf_jax.parity import Case, find_cases, shipped_cases, table
  from pgolf_jax.parity import check as parity_check
  from pgolf_jax.runtime import distributed
  from pgolf_jax.runtime.files import write_json

  if not all and case is None:
    raise UserError("Name the folder of a golden case, or ask for all that come with the package with --all.")
  if all and ours is not None:
    raise UserError("--ours holds the outputs of one case; name that case in place of --all.")
  distributed.start()
  folders = find_cases(case or shipped_cases()) if all else [case]
  found = table.environment()
  print(table.environment_text(found) + "\n", flush=True)
  reports = []
  for folder in folders:
    this = Case.load(folder, tokenizer=tokenizer)
    report = parity_check.examine(this, dtype, this.read_outputs(ours) if ours else None)
    print(table.text(report, tensors=tensors) + "\n", flush=True)
    reports.append(report)
  if json is not None:
    write_json(json, table.as_json(reports, found))
  failed = [report.case.folder.name for report in reports if not report.ok]
  print(f"{len(reports) - len(failed)} of {len(reports)} cases agree{': not ' + ', '.join(failed) if failed else ''}.")
  return int(bool(failed))


COMMANDS = {"parity": {"run": run, "check": check}}
