"""The runs under a folder as a table: what each was made with, how far it came, and what it scored."""

import contextlib
import datetime
import functools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from pgolf_jax.errors import UserError
from pgolf_jax.run_folder import RunFolder, read_metrics
from pgolf_jax.run_set import SCORES, full_name
from pgolf_jax.runtime.files import is_held, json_hash
from pgolf_jax.runtime.log import log
from pgolf_jax.settings import builtin
from pgolf_jax.settings.load import from_toml, written
from pgolf_jax.tables import Table, line_width

COLUMNS = {
  "name": "run",
  "config": "config",
  "seed": "seed",
  "steps": "steps",
  "averaged": "averaged",
  "artifact": "artifact",
  "ttt": "ttt",
  "bytes": "bytes",
  "seconds": "seconds",
  "verdict": "verdict",
  "when": "when",
}
"""Key of a row → heading of its column."""


def find(folder: Path) -> tuple[list[dict], dict[str, str]]:
  """Returns a row for every run under a folder, and name → why not for what looks like a run but cannot be read.

  A row has the keys of `COLUMNS`; scores are bits per byte, bytes those of artifact and code, seconds those of all
  stages that are complete, `when` is of the last change. What a run does not have is None.

  Raises:
    UserError: there is no such folder.
  """
  if not folder.is_dir():
    raise UserError(f"There is no folder {folder}; `pgolf run` makes runs/NAME, and `pgolf runs DIR` looks elsewhere.")
  rows, unreadable = [], {}

  def cannot(error: OSError) -> None:
    unreadable[_name(Path(error.filename), folder)] = error.strerror or str(error)

  for place, folders, files in os.walk(folder, onerror=cannot):
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    if "config.toml" not in files and not {"metrics.jsonl", "results.json"} & {*files}:
      continue
    folders.clear()
    path = Path(place)
    try:
      with _warnings() as warnings:
        rows.append(_row(path, _name(path, folder)))
      if warnings:
        unreadable[_name(path, folder)] = warnings[0]
    except (UserError, OSError) as error:
      unreadable[_name(path, folder)] = str(error)
  return rows, unreadable


def _name(path: Path, folder: Path) -> str:
  return str(path.relative_to(folder)) if path != folder else path.resolve().name


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
  """Collects what the log warns of in the block, instead of printing it."""
  messages: list[str] = []
  handlers, propagate = log.handlers, log.propagate
  handler = logging.Handler(logging.WARNING)
  handler.emit = lambda record: messages.append(record.getMessage())
  log.handlers, log.propagate = [handler], False
  try:
    yield messages
  finally:
    log.handlers, log.propagate = handlers, propagate


def _row(path: Path, name: str) -> dict:
  run = RunFolder(path)
  results, settings = run.figures(), written(run.settings)
  made = results.get("artifact", {})
  scores = {key: results[stage]["bpb"] if stage in results else None for stage, key in SCORES.items()}
  seconds = [result["stage_seconds"] for result in results.values() if "stage_seconds" in result]
  row = {
    "name": name,
    "config": _config(settings),
    "seed": run.settings.seed,
    "steps": results["train"]["steps"] if "train" in results else _steps(run),
    **scores,
    "bytes": made["artifact_bytes"] + made["code_bytes"] if "code_bytes" in made else None,
    "seconds": sum(seconds) if seconds else None,
    "verdict": _verdict(path, results),
    "when": _changed(run),
  }
  return row | {"path": str(path), "stages": list(results), "config_hash": _hash(settings), "settings": settings}


def _steps(run: RunFolder) -> int:
  """Steps done by a training that is not complete."""
  lines = read_metrics(run.metrics)
  return lines[-1]["step"] if lines else 0


def _config(settings: dict[str, object]) -> str:
  """The built-in config that is most like the run's, and in how many settings the run differs from it."""
  far = {
    name: sum(theirs.get(key) != settings.get(key) for key in {**theirs, **settings} if key not in _NO_CONFIG)
    for name, theirs in _builtin().items()
  }
  name = min(far, key=far.__getitem__)
  return f"{name} +{far[name]}" if far[name] else name


_NO_CONFIG = ("seed", "data.path", "data.tokenizer")


@functools.cache
def _builtin() -> dict[str, dict[str, object]]:
  return {name: written(from_toml(builtin.find(name))) for name in builtin.names()}


def _hash(settings: dict[str, object]) -> str:
  """The SHA-256 of all settings but the seed: runs that share it differ by their seeds alone."""
  return json_hash({name: value for name, value in settings.items() if name != "seed"})


def _verdict(path: Path, results: dict[str, dict]) -> str:
  if is_held(path):
    return "running"
  if "train" not in results:
    return "cut off"
  if (audit := results.get("audit")) is None:
    return "not audited"
  return "broken" if audit["broken"] else "legal" if audit["is_legal"] else "not proved"


def _changed(run: RunFolder) -> str:
  """When the run last wrote anything, in UTC."""
  files = (run.log, run.metrics, run.path / "results.json", run.path / "config.toml")
  newest = max(file.stat().st_mtime for file in files if file.exists())
  return datetime.datetime.fromtimestamp(newest, datetime.UTC).strftime("%Y-%m-%d %H:%M")


def chosen(rows: Sequence[dict], text: str, key: str, *, reverse: bool = False) -> list[dict]:
  """Returns the rows that a text picks, sorted; those without a value for the key come last.

  Args:
    text: part of a name or config, or a setting's value as in matrix_lr=0.02; empty for all.
    key: of `COLUMNS`.
  """
  name, equals, value = text.partition("=")

  def is_wanted(row: dict) -> bool:
    if text in row["name"] or text in row["config"]:
      return True
    return bool(equals) and str(row["settings"].get(full_name(name), "")) == value

  wanted = [row for row in rows if is_wanted(row)]
  known = sorted((row for row in wanted if row[key] is not None), key=lambda row: row[key], reverse=reverse)
  return known + [row for row in wanted if row[key] is None]


def as_json(rows: Sequence[dict]) -> str:
  """Returns the rows as a JSON array."""
  return json.dumps(rows, indent=2)


def text(rows: Sequence[dict], width: int | None = None) -> str:
  """Returns the rows as a table for lines of so many columns, of as many as there are if not given.

  Where it is too wide, spare columns are left out, and a last line names them; where it still is, rows become lines.
  """
  width = line_width() if width is None else width
  kept = [key for key in COLUMNS if any(row[key] is not None for row in rows)]
  for count in range(len(_SPARE) + 1):
    left_out = [key for key in _SPARE[:count] if key in kept]
    lines = str(_table(rows, [key for key in kept if key not in left_out]).text(_WIDE)).splitlines()
    if max(map(len, lines)) <= width:
      return "\n".join([*lines, *[f"not shown, for want of room: {', '.join(left_out)}"] * bool(left_out)])
  return _table(rows, kept).text(width)


_SPARE = ("seed", "config", "seconds", "bytes", "when", "averaged")  # the first goes first
_WIDE = 10_000


def _table(rows: Sequence[dict], keys: Sequence[str]) -> Table:
  forms = {
    "averaged": ".5f",
    "artifact": ".5f",
    "ttt": ".5f",
    "bytes": ",",
    "seconds": ",.0f",
    "steps": ",",
    "seed": "",
  }

  def cell(row: dict, key: str) -> str:
    return "" if row[key] is None else format(row[key], forms.get(key, ""))

  head = [f">{COLUMNS[key]}" if key in forms else COLUMNS[key] for key in keys]
  return Table(head, [[cell(row, key) for key in keys] for row in rows])
