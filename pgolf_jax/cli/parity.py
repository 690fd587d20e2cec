"""`pgolf parity`: golden cases of the PyTorch reference."""

import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro


def run(
  case: tyro.conf.Positional[Path],
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
  case: tyro.conf.Positional[Path | None] = None,
  all: bool = False,
  ours: Path | None = None,
  dtype: Literal["float32", "bfloat16"] | None = None,
  tensors: bool = False,
  tokenizer: Path | None = None,
) -> int:
  """Compare a golden case, or all of a folder, with what this installation computes on this device.

  Prints the errors beside their tolerances; exit status 1 if one is too large. On an accelerator, and in another type
  than the reference's, tolerances are derived from the perturbation floor: how far our outputs move when every weight
  moves by one part in ten million.

  Example: pgolf parity check --all

  Args:
    case: folder of the case; with --all a folder of cases, or nothing for the small cases that come with the package.
    all: check all cases of the folder.
    ours: file that `pgolf parity run` wrote; the case is run now if not given.
    dtype: type to compute in, in place of the one that the reference computed in.
    tensors: print one line per tensor instead of one per quantity.
    tokenizer: SentencePiece model of a `caseops` case, if it is not beside the case.
  """
  from pgolf_jax.errors import UserError
  from pgolf_jax.parity import Case, find_cases, shipped_cases
  from pgolf_jax.parity import check as parity_check
  from pgolf_jax.parity.run import run as run_case
  from pgolf_jax.runtime import distributed

  if not all and case is None:
    raise UserError("Name the folder of a golden case, or ask for all that come with the package with --all.")
  if all and ours is not None:
    raise UserError("--ours holds the outputs of one case; name that case in place of --all.")
  distributed.start()
  folders = find_cases(case or shipped_cases()) if all else [case]
  failed = []
  for folder in folders:
    began = time.monotonic()
    this = Case.load(folder, dtype=dtype, tokenizer=tokenizer)
    outputs = this.read_outputs(ours) if ours else run_case(this)
    floors = parity_check.measure_floors(this) if parity_check.needs_floors(this) else None
    rows = parity_check.check(this, outputs, floors)
    print(f"{folder.name}: {this.kind}, {parity_check.arithmetic(this)}, {time.monotonic() - began:.1f} s")
    print(parity_check.table(rows, everything=tensors) + "\n")
    if not parity_check.agrees(rows):
      failed.append(folder.name)
  print(f"{len(folders) - len(failed)} of {len(folders)} cases agree.")
  return int(bool(failed))


def compare(
  a: Annotated[Path, tyro.conf.Positional],
  b: Annotated[Path, tyro.conf.Positional],
  noise: Path | None = None,
  out: Path | None = None,
  json: bool = False,
  every_setting: bool = False,
) -> None:
  """Set two runs side by side: settings that differ, losses by step, scores by stage, times, and where they part.

  Each is a run folder, a metrics.jsonl, or the log that a PyTorch script of the challenge printed. They part where the
  mean difference of their losses is more than noise explains: the noise from step to step, and with --noise also that
  between two runs of A's settings. Scores of the same documents are compared in pairs.

  Example: pgolf parity compare runs/jax logs/torch.log --out compare

  Args:
    a: the first run.
    b: the second run; differences are B less A.
    noise: a second run of A's settings, such as another seed; what it differs by from A counts as noise.
    out: folder for compare.txt, compare.json and compare.png (needs the extra `report`).
    json: print JSON instead of the table.
    every_setting: list all settings that differ, not the first twenty.
  """
  from json import dumps

  from pgolf_jax.parity import compare_page
  from pgolf_jax.parity.compare import compare as compare_sides
  from pgolf_jax.parity.compare import read

  compared = compare_sides(read(a), read(b), None if noise is None else read(noise))
  if json:
    print(dumps(compare_page.as_json(compared), allow_nan=False))
  else:
    print(compare_page.table(compared, every_setting=every_setting))
  if out is not None:
    written = compare_page.write(compared, out)
    print("\n".join(written), file=sys.stderr if json else sys.stdout)


COMMANDS = {"parity": {"run": run, "check": check, "compare": compare}}
