"""What a day on a card leaves behind: rows, the table, block sizes that were measured, the compile cache.

Everything belongs to one kind of device: what another kind left is put aside, and nothing of it is taken up.
"""

import datetime
import json
import re
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pgolf_jax.errors import UserError
from pgolf_jax.tables import Table

Row = dict[str, Any]
"""A line of results.jsonl: item and config; ms, p10, p90, n, error; verdict or note; the device and the versions."""

RESULTS, TUNED, CACHE, LOG = "results.jsonl", "tuned.json", "compile_cache.tar", "log.txt"
NOT_RUN = "not run: the budget is spent"
"""The end of an item that was not started."""
MOST_CHARACTERS = 9_000
"""Of the table, since little of a card's output may come back."""
_MOST_BYTES = 15 << 20
"""Of the packed compile cache and of the log, since larger files may not come back."""
_BAD = ("WRONG", "RACE", "NOT WRITTEN")
"""Verdicts that take a kernel out of use."""
_LEAST_GAIN = 0.03
"""Share of its time by which new block sizes must beat those in the table."""


def read_lines(path: Path) -> list[Row]:
  """Returns the rows of a file; a line that was cut short is left out, and a missing file has none."""
  rows = []
  for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
    try:
      row = json.loads(line)
    except ValueError:
      continue
    if isinstance(row, dict):
      rows.append(row)
  return rows


def write_lines(path: Path, rows: Sequence[Row]) -> None:
  """Writes rows whole or not at all."""
  part = path.with_suffix(".part")
  part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
  part.replace(path)


def same(row: Row, facts: Row) -> bool:
  """Whether a row was measured on this kind of device, at this commit, with shapes of this size."""
  return all(row.get(name) == facts.get(name) for name in ("device", "commit", "tiny"))


def take_up(carry: Path, out: Path, facts: Row, cache: Path) -> list[Row]:
  """Takes up an earlier call's folder: returns its rows of this kind of device, and unpacks its compile cache.

  Results of another kind in `out` are put aside under that kind's name; of another kind in `carry` nothing is used.
  """
  for folder in dict.fromkeys((out, carry)):
    rows = read_lines(folder / RESULTS)
    others = {str(row.get("device")) for row in rows} - {facts["device"]}
    if others and folder == out:
      slug = re.sub(r"\W+", "-", "-".join(sorted(others)))
      (out / RESULTS).rename(out / f"results-{slug}.jsonl")
      (out / CACHE).unlink(missing_ok=True)
  if carry != out:
    for name in (RESULTS, TUNED, CACHE):
      if (carry / name).exists() and not (out / name).exists():
        shutil.copyfile(carry / name, out / name)
  rows = read_lines(out / RESULTS)
  if any(row.get("device") != facts["device"] for row in rows):
    (out / RESULTS).unlink()
    (out / CACHE).unlink(missing_ok=True)
    return []
  if (out / CACHE).exists():
    try:
      with tarfile.open(out / CACHE) as tar:
        tar.extractall(cache, filter="data")
    except (tarfile.TarError, OSError, EOFError) as error:
      print(f"{out / CACHE} cannot be read ({error}); everything is compiled again.")
  return rows


def pack(cache: Path, path: Path) -> None:
  """Writes the newest files of a folder into a tar of at most 15 MiB."""
  files = sorted((f for f in cache.rglob("*") if f.is_file()), key=lambda f: f.stat().st_mtime, reverse=True)
  part, total = path.with_suffix(".part"), 0
  with tarfile.open(part, "w") as tar:
    for file in files:
      total += file.stat().st_size + 1536  # with the header and the padding of a tar's member
      if total > _MOST_BYTES:
        break
      tar.add(file, file.relative_to(cache))
  part.replace(path)


def shorten(path: Path) -> None:
  """Drops the beginning of a log that is too long to come back."""
  if path.stat().st_size > _MOST_BYTES:
    with path.open("rb") as file:
      file.seek(-_MOST_BYTES // 2, 2)
      end = file.read()
    path.write_bytes(b"[the beginning was dropped]\n" + end)


def is_bad(row: Row) -> bool:
  """Whether a row, or the end of its item, is a failure."""
  return row.get("verdict") in _BAD or row.get("verdict") == "failed" or row.get("status", "done") != "done"


def table(title: str, rows: Sequence[Row], facts: Row) -> str:
  """Returns what to read first, in at most 9,000 characters: failures, decisions, then the figures.

  Columns stand two spaces apart at least; a cell without a value is a dash.
  """
  names = ("device", "jax", "torch", "triton", "commit")
  head = " · ".join([title, *(f"{name} {facts[name]}" for name in names if facts.get(name))])
  if facts.get("tiny"):
    head += " · tiny shapes: no figure here says anything of a device"
  parts = [head]
  failures = [
    (row["item"], row.get("config", "–"), row.get("verdict") or row.get("status"), _one_line(row.get("note")))
    for row in rows
    if is_bad(row)
  ]
  if failures:
    parts.append(str(Table(("item", "config", "verdict", "note"), failures, f"FAILED ({len(failures)})")))
  if decided := decisions(rows):
    parts.append("\n".join(["DECISIONS", *decided]))
  figures = [_cells(row) for row in rows if row.get("config") and not is_bad(row)]
  heads = ("item", "config", ">ms", ">p10", ">p90", ">error", ">TFLOP/s", ">GB/s", "verdict", "note")
  parts.append(str(Table(heads, figures, "FIGURES")))
  return _cut("\n\n".join(parts))


def _one_line(text: Any) -> str:
  return " ".join(str(text or "–").split())[:300]


def _cells(row: Row) -> tuple[str, ...]:
  numbers = [_figure(row.get(name)) for name in ("ms", "p10", "p90", "error", "tflops", "gbs")]
  return row["item"], row["config"], *numbers, row.get("verdict") or "–", _one_line(row.get("note"))[:60]


def _figure(x: float | None) -> str:
  return "–" if x is None else f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}"


def _cut(text: str) -> str:
  if len(text) <= MOST_CHARACTERS:
    return text
  lines, size = [], 0
  every = text.splitlines()
  for line in every:
    size += len(line) + 1
    if size > MOST_CHARACTERS - 60:
      break
    lines.append(line)
  return "\n".join([*lines, f"… {len(every) - len(lines)} more lines: {RESULTS} has everything"])


_REFERENCE_MS = {"2048 on": 142.5, "1024 off": 97.3, "3072 on": 142.5}
"""Published milliseconds of the reference's micro-batch of 98,304 tokens: means over its run, looping on and off."""


def decisions(rows: Sequence[Row]) -> list[str]:
  """Returns what the figures decide: one line each, for those that are there."""
  lines = [
    f"{name}: {', '.join(sorted(verdicts))} → the default is xla until it is right"
    for name, verdicts in _verdicts(rows).items()
    if verdicts
  ]
  ms = {(row["item"], row.get("config")): row["ms"] for row in rows if row.get("ms") and not is_bad(row)}
  for shape, published in _REFERENCE_MS.items():
    times = {by: ms.get((f"step {shape}, {by}", shape)) for by in ("kernels", "xla", "PyTorch")}
    if ours := times["kernels"]:
      others = [f"{by} ÷ kernels {times[by] / ours:.2f}" for by in ("xla", "PyTorch") if times[by]]
      if not any(row.get("tiny") for row in rows):
        others.append(f"published {published} ÷ kernels {published / ours:.2f}")
      lines.append(f"step {shape}: kernels {ours:.1f} ms; {'; '.join(others)}")
  for row in rows:
    if (share := row.get("idle")) is not None and share > (limit := row["idle_limit"]):
      lines.append(f"{row['item']}: idle {share:.0%} > {limit:.0%} → command buffers, larger steps")
    if (share := row.get("elementwise")) is not None and share > 0.35:
      lines.append(f"elementwise {share:.0%} of the step > 35 % → fuse rows before any work on attention")
    for (item, config, least), conclusion in _LEAST_TFLOPS.items():
      is_meant = row["item"] == item and str(row.get("config")).startswith(config) and row.get("by") != "PyTorch"
      if is_meant and row.get("platform") == "gpu" and (rate := row.get("tflops", least)) < least:
        lines.append(f"{config}: {rate:.0f} < {least} TFLOP/s → {conclusion}")
  return [*lines, *_whole_evaluations(rows)]


_LEAST_TFLOPS = {
  ("time: segment_attention", "full segments, forward, mosaic_gpu", 300): "both query heads of a key head in one block",
  ("ceilings", "dW of up", 450): "cuBLAS by force, or split-K",
}
"""(item, beginning of its config, TFLOP/s on an H100) → what follows from less than that."""
_CHUNK_STEPS = {(2048, 64): 13_094, (512, 32): 36_180, (112, 16): 5_008}
"""(window, targets) → steps of 24 documents in an evaluation of the 50,000 of the validation set."""
_REFERENCE_S = 3760
"""GPU-seconds of the reference's evaluation, as published."""


def _whole_evaluations(rows: Sequence[Row]) -> list[str]:
  """Returns the time of a whole evaluation by each method, for those of which every step was timed."""
  lines, step_s = [], {}
  for row in rows:
    if row.get("method") and row.get("ms") and not row.get("tiny"):
      documents_step = row["ms"] * 1e-3 / row["steps"] * 24 / row["slots"]
      step_s[row["method"], row["slots"], row["by"], (row["window"], row["width"])] = documents_step
  for method, slots, by in dict.fromkeys(key[:3] for key in step_s):
    times = [count * step_s.get((method, slots, by, shape), float("nan")) for shape, count in _CHUNK_STEPS.items()]
    if sum(times) > 0:
      lines.append(
        f"test-time training, {method}, {slots} documents at a time, {by}: {sum(times):,.0f} s for the validation set "
        f"on one device (reference {_REFERENCE_S})"
      )
  return lines


def _verdicts(rows: Sequence[Row]) -> dict[str, set[str]]:
  """Operation → the bad verdicts on its kernels."""
  verdicts: dict[str, set[str]] = {}
  for row in rows:
    if row.get("operation"):
      bad = {row["verdict"]} if row.get("verdict") in _BAD and row.get("by") != "xla" else set()
      verdicts.setdefault(row["operation"], set()).update(bad)
  return verdicts


def read_tuned(path: Path) -> dict[str, dict[str, dict[str, Row]]]:
  """Returns the table of block sizes: kind of device → operation → class of shapes → entry; empty without a file.

  Raises:
    UserError: the file is not such a table.
  """
  if not path.exists():
    return {}
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
    entries = [entry for by_name in content.values() for by_shape in by_name.values() for entry in by_shape.values()]
    if all(isinstance(entry["sizes"], dict) and {"ms", "p90"} <= entry.keys() for entry in entries):
      return content
  except (ValueError, AttributeError, KeyError, TypeError):
    pass
  raise UserError(f"{path} is not a table of tuned block sizes; move it away, and it is made anew.")


def replaces(new: Mapping[str, Any], old: Mapping[str, Any] | None) -> bool:
  """Whether measured sizes take the place of those in the table.

  They must be right, at least 3 % faster, and not by chance: the 90th percentile of their times lies below the old
  median.

  Args:
    new, old: entries; `correct` says whether the result was right, old is None where there is no entry yet.
  """
  if not new.get("correct"):
    return False
  return old is None or (new["ms"] <= (1 - _LEAST_GAIN) * old["ms"] and new["p90"] < old["ms"])


def propose(path: Path, key: tuple[str, str, str], entry: Row) -> bool:
  """Enters sizes under (kind of device, operation, class of shapes) if they may; returns whether they were.

  Args:
    entry: `sizes`, `ms`, `p10`, `p90` in milliseconds, `correct`, `commit`; the date is added.
  """
  content, (kind, operation, shapes) = read_tuned(path), key
  place = content.setdefault(kind, {}).setdefault(operation, {})
  if not replaces(entry, place.get(shapes)):
    return False
  place[shapes] = {**entry, "date": datetime.date.today().isoformat()}
  part = path.with_suffix(".part")
  part.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
  part.replace(path)
  return True
