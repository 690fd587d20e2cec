"""`pgolf parity`: golden cases of the PyTorch reference."""

import json
from pathlib import Path

import tyro


def run(case: tyro.conf.Positional[Path], out: Path, tokenizer: Path | None = None) -> None:
  """Write our outputs for a golden case, under the names of its expected file.

  Example: pgolf parity run golden/forward --out ours.safetensors

  Args:
    case: folder of the case.
    out: file to write: safetensors, or JSON lines for the kind `caseops`.
    tokenizer: SentencePiece model of a `caseops` case, if it is not beside the case.
  """
  from safetensors.numpy import save_file

  from pgolf_jax.parity import run as parity_run
  from pgolf_jax.parity.case import Case
  from pgolf_jax.runtime import distributed

  distributed.start()
  found = Case.load(case)
  if found.kind == "caseops":
    lines = parity_run.run_caseops(found, tokenizer)
    out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} documents written to {out}")
    return
  tensors = parity_run.run(found)
  save_file({k: v.copy(order="C") for k, v in tensors.items()}, out)
  print(f"{len(tensors)} tensors written to {out}")


def check(case: tyro.conf.Positional[Path], ours: Path | None = None, all: bool = False, tokenizer: Path | None = None):
  """Compare outputs with a golden case and print the errors; exit status 1 if one is too large.

  Example: pgolf parity check golden/forward --ours ours.safetensors

  Args:
    case: folder of the case.
    ours: file that `pgolf parity run` wrote; the case is run now if not given.
    all: print every tensor, not the worst alone.
    tokenizer: SentencePiece model of a `caseops` case, if it is not beside the case.
  """
  from pgolf_jax.parity import case as cases
  from pgolf_jax.parity import check as parity_check
  from pgolf_jax.parity import run as parity_run
  from pgolf_jax.runtime import distributed

  distributed.start()
  found = cases.Case.load(case)
  if found.kind == "caseops":
    mine = _json_lines(ours) if ours else parity_run.run_caseops(found, tokenizer)
    rows = parity_check.check_caseops(mine, _json_lines(found.folder / "expected.jsonl"))
  else:
    rows = parity_check.check(found, cases.read(ours) if ours else parity_run.run(found))
  print(parity_check.table(rows, everything=all))
  return 0 if all_ok(rows) else 1


def all_ok(rows) -> bool:
  """Whether there is something to compare and all of it agrees."""
  return bool(rows) and all(row.ok for row in rows)


def _json_lines(path: Path) -> list[dict]:
  from pgolf_jax.errors import UserError

  try:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
  except (OSError, ValueError) as e:
    raise UserError(f"{path} cannot be read as JSON lines: {e}.") from None


COMMANDS = {"run": run, "check": check}
