"""The verb `pgolf runs`: a table of the runs under a folder."""

import sys
from pathlib import Path
from typing import Literal

from pgolf_jax.settings.arguments import Positional


def runs(
  folder: Positional[Path] = Path("runs"),
  sort: Literal[
    "name", "config", "steps", "averaged", "artifact", "ttt", "bytes", "seconds", "verdict", "when"
  ] = "when",
  reverse: bool = False,
  filter: str = "",
  json: bool = False,
) -> None:
  """List the runs under a folder: steps, bits per byte by stage, bytes, seconds, the audit's verdict, and when.

  Folders that look like runs but cannot be read are named below the table.

  Example: pgolf runs runs --sort ttt

  Args:
    folder: looked through with all folders in it.
    sort: column to sort by; runs without a value come last.
    reverse: largest, or newest, first.
    filter: show only runs with this in their name or config, or with a setting's value, as in matrix_lr=0.02.
    json: print one JSON array with all figures in place of the table.
  """
  from pgolf_jax import run_table

  found, unreadable = run_table.find(folder)
  found = run_table.chosen(found, filter, sort, reverse=reverse)
  if json:
    print(run_table.as_json(found))
  elif found:
    print(run_table.text(found))
  else:
    print(f"There are no runs under {folder}{f' that {filter} picks' if filter else ''}.")
  for name, reason in unreadable.items():
    print(f"not readable: {name}: {reason}", file=sys.stderr)


COMMANDS = {"runs": {"": runs}}
