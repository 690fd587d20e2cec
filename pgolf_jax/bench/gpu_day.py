"""`pgolf bench gpu-day`: half an hour on a card in calls of ten minutes: what is right, what is fast, what to change.

It runs from a checkout that is not installed too: `python3 -m pgolf_jax.bench.gpu_day A --budget 560`. Each item is a
process of its own with a limit of its own, so that a kernel that deadlocks or crashes ends its item and not the day.
The process that starts them imports no JAX, for it must not hold the device.
"""

import datetime
import hashlib
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pgolf_jax
from pgolf_jax.bench import gpu_day_record as record
from pgolf_jax.errors import UserError
from pgolf_jax.settings.arguments import Positional, call

ROOT = Path(pgolf_jax.__file__).parents[1]
_LEAST_S = 5.0
"""An item that would have less time is not started."""
_CLOSING_S = 8.0
"""Seconds of the budget that are kept for the table and for packing the compile cache."""
_ITEMS = "pgolf_jax.bench.gpu_day_kernels", "pgolf_jax.bench.gpu_day_steps"

PlanName = Literal["A", "B", "C"]
Row = dict[str, Any]


class Item(NamedTuple):
  """Something to measure in a process of its own.

  Attributes:
    name: unique in its plan.
    call: "module:function"; the function takes a `Day` and the arguments, and yields rows as it measures them.
    limit_s: seconds after which the process is killed.
    arguments: of the function, as JSON has them.
  """

  name: str
  call: str
  limit_s: float = 120.0
  arguments: Mapping[str, Any] = {}


class Day(NamedTuple):
  """What an item knows of the day.

  Attributes:
    out: folder of what is to come back.
    tiny: whether shapes are tiny, for a dry run without a device.
    rows: what earlier items of this device found.
  """

  out: Path
  tiny: bool
  rows: Sequence[Row] = ()


def items_of(plan: PlanName) -> list[Item]:
  """Returns the items of a call: A is what is right and fast, B the training step, C test-time training."""
  kernels, steps = _ITEMS
  if plan == "A":
    operations = (
      "residual_norm",
      "rotary_heads",
      "segment_attention",
      "chunk_attention",
      "gated_xsa",
      "leaky_relu2_mlp",
      "softcapped_xent",
      "linear_softcapped_xent",
      "polar_express",
    )
    return [
      Item("ceilings", f"{kernels}:ceilings", 60),
      *(Item(f"right: {name}", f"{kernels}:right", 150, {"operation": name}) for name in operations),
      *(Item(f"time: {name}", f"{kernels}:times", 90, {"operation": name}) for name in operations),
      Item("tune", f"{kernels}:tune", 150),
      Item("slice", f"{steps}:two_layers", 150),
      Item("sanitizer", f"{kernels}:sanitize", 120),
    ]
  if plan == "B":
    shapes = ((2048, True), (1024, False), (3072, True))
    ways = [
      Item(
        f"step {length} {'on' if looping else 'off'}, {by}",
        f"{steps}:step",
        180,
        {"seq_len": length, "looping": looping, "by": by},
      )
      for length, looping in shapes
      for by in ("kernels", "xla", "PyTorch")
    ]
    others = ("optimizer", "trace", "options")
    return [*ways, *(Item(name, f"{steps}:{name}", 150) for name in others)]
  shapes = ((24, 3072, 64), (24, 2048, 64), (24, 512, 32), (24, 112, 16))
  cells = [(method, *shape) for shape in shapes for method in ("exact", "cached")]
  cells += [("cached", 192, *shape[1:]) for shape in shapes]
  return [
    Item(
      f"learn {slots} × {window}, {width} targets, {method}",
      f"{steps}:learning_step",
      120,
      {"method": method, "shape": [slots, window, width]},
    )
    for method, slots, window, width in cells
  ]


def gpu_day(
  plan: Positional[PlanName],
  budget: float = 560.0,
  out: Path | None = None,
  carry: Path | None = None,
  tiny: bool = False,
  again: bool = False,
) -> int:
  """Measure on a card, in one call of ten minutes, what decides how the program should run there.

  A: every kernel against XLA in float32, repeated and with poisoned outputs; its times, and the card's ceilings. B: the
  training step by kernels, by XLA alone and by PyTorch; the optimizer, a trace, XLA's options. C: steps of test-time
  training. On a TPU the kernels are those for TPUs; PyTorch has no part there.

  The folder holds results.jsonl, the table, the tuned block sizes, the compile cache and a log. A call that finds an
  earlier one's folder goes on from it: what is measured on the same kind of device, at the same commit, is not measured
  again; what was never tried comes first, then what ended badly.

  Example: pgolf bench gpu-day A --budget 560

  Args:
    plan: A, B or C.
    budget: seconds for everything.
    out: folder of the results; $OUT if that is set, gpu_day if not.
    carry: folder of an earlier call to go on from; the results' folder if not given.
    tiny: shapes so small that a CPU computes them in seconds; always so on a CPU.
    again: measure everything again.
  """
  ends = time.monotonic() + budget
  out = Path(out or os.environ.get("OUT") or "gpu_day")
  out.mkdir(parents=True, exist_ok=True)
  day = Call(out, Path(carry or out), ends - _CLOSING_S, tiny, again)
  facts = day.look()
  return 1 if day.run(items_of(plan), facts, title=f"plan {plan}") else 0


class Call:
  """One call of the kit.

  Args:
    out: folder of the results.
    carry: folder of an earlier call.
    ends: the monotonic clock's time by which items must have ended.
    tiny: whether shapes are tiny.
    again: whether what was done before is done again.
  """

  def __init__(self, out: Path, carry: Path, ends: float, tiny: bool = False, again: bool = False):
    self.out, self.carry, self.ends, self.tiny, self.again = out, carry, ends, tiny, again
    self.rows: list[Row] = []

  def look(self) -> Row:
    """Returns what the device and the programs are, as a process of its own sees them.

    Raises:
      UserError: that process fails; the message has its last line.
    """
    with tempfile.TemporaryDirectory() as cache:
      rows, status = self._child(Item("device", f"{_ITEMS[0]}:device"), 120.0, {}, Path(cache))
    if not rows:
      raise UserError(f"no device answers: {status}; see {self.out / 'log.txt'}")
    return {**rows[0], "commit": commit(), "tiny": self.tiny or rows[0]["platform"] == "cpu"}

  def run(self, items: Sequence[Item], facts: Row, title: str) -> int:
    """Runs items until the time is over, prints the table, and returns how many did not end well.

    Those that were never tried come in order, then those that ended badly, the one that waits longest first.
    """
    bad = 0
    with tempfile.TemporaryDirectory() as cache:
      self.rows = record.take_up(self.carry, self.out, facts, Path(cache))
      ended = [row for row in self.rows if row.get("status", record.NOT_RUN) != record.NOT_RUN]
      status_of = {row["item"]: row["status"] for row in ended if record.same(row, facts) and not self.again}
      tried = list(status_of)
      try:
        for item in sorted(items, key=lambda item: tried.index(item.name) if item.name in tried else -1):
          if status_of.get(item.name) == "done":
            continue
          began = time.monotonic()
          left = self.ends - began
          if left < _LEAST_S:
            rows, status = [], record.NOT_RUN
          else:
            rows, status = self._child(item, min(left, item.limit_s), facts, Path(cache))
          end = {"item": item.name, "seconds": round(time.monotonic() - began, 1), "status": status}
          self._enter([{**row, "item": item.name} for row in rows], end, facts)
          bad += status != "done"
      finally:
        names = {item.name for item in items}
        table = record.table(title, [r for r in self.rows if r["item"] in names and record.same(r, facts)], facts)
        (self.out / "table.txt").write_text(table + "\n", encoding="utf-8")
        record.pack(Path(cache), self.out / record.CACHE)
        record.shorten(self.out / "log.txt")
        print(table)
    return bad

  def _enter(self, rows: Sequence[Row], end: Row, facts: Row) -> None:
    """Puts an item's rows and its end in the place of earlier ones; what an earlier try alone has measured stays."""
    earlier = [row for row in self.rows if row["item"] == end["item"] and record.same(row, facts)]
    others = [row for row in self.rows if row not in earlier]
    if end["status"] == record.NOT_RUN and earlier:
      return
    if end["status"] != "done":
      measured = {row.get("config") for row in rows}
      others += [row for row in earlier if "status" not in row and row.get("config") not in measured]
    self.rows = others + [{**row, **facts} for row in (*rows, end)]
    record.write_lines(self.out / record.RESULTS, self.rows)

  def _child(self, item: Item, limit_s: float, facts: Row, cache: Path) -> tuple[list[Row], str]:
    """Runs an item in a process; returns its rows and "done", or what became of it."""
    with tempfile.TemporaryDirectory() as folder:
      lines, earlier = Path(folder, "rows.jsonl"), Path(folder, "earlier.jsonl")
      record.write_lines(earlier, self.rows)
      tiny = facts.get("tiny", self.tiny)
      task = {"call": item.call, "arguments": dict(item.arguments), "lines": str(lines), "earlier": str(earlier)}
      task |= {"out": str(self.out), "tiny": tiny}
      command = [sys.executable, "-m", "pgolf_jax.bench.gpu_day", "--child", json.dumps(task)]
      with (self.out / "log.txt").open("a", encoding="utf-8") as log:
        print(f"==== {item.name}", file=log, flush=True)
        begins = log.tell()
        process = subprocess.Popen(
          command, stdout=log, stderr=subprocess.STDOUT, env=_environ(self.out, cache), start_new_session=True
        )
        try:
          status = _ending(process.wait(limit_s), self.out / "log.txt", begins)
        except subprocess.TimeoutExpired:
          status = f"killed at its limit of {limit_s:.0f} s"
        finally:
          _end(process)
      return record.read_lines(lines), status


def _environ(out: Path, cache: Path) -> dict[str, str]:
  """The environment of an item: the checkout on the path, caches that come back, no GPU memory taken at once."""
  path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
  return os.environ | {
    "PYTHONPATH": path,
    "PYTHONUNBUFFERED": "1",
    "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    "TRITON_CACHE_DIR": str(cache / "triton"),
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  }


def _ending(code: int, log: Path, begins: int) -> str:
  if code == 0:
    return "done"
  if code < 0:
    return f"ended by {signal.Signals(-code).name}"
  with log.open("rb") as file:
    file.seek(begins)
    lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
  return f"failed: {lines[-1][:200] if lines else f'exit status {code}'}"


def _end(process: subprocess.Popen) -> None:
  """Kills what is left of an item's processes; one that the driver holds may outlast this."""
  try:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
  except (ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
    pass


def commit() -> str:
  """Returns the checkout's commit, and a hash of the package's files where they differ from it or git says nothing."""

  def git(*arguments: str) -> str:
    try:
      done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
      return ""
    return done.stdout.strip() if done.returncode == 0 else ""

  head = git("rev-parse", "--short=10", "HEAD")
  if head and not git("status", "--porcelain", "--untracked-files=no"):
    return head
  content = hashlib.sha256()
  for folder in ("pgolf_jax", "kernels"):
    for file in sorted((ROOT / folder).rglob("*.py")):
      content.update(file.read_bytes())
  return f"{head}+{content.hexdigest()[:8]}"


def find_rooms() -> None:
  """Lets a checkout that is not installed import the rooms that lie beside the package, such as kernels/."""
  if importlib.util.find_spec("pgolf_jax.kernels") is None:
    pgolf_jax.__path__.append(str(ROOT))


def work(task: Row) -> None:
  """Runs one item in this process, with XLA's options of a run, and writes each row as soon as it is measured."""
  find_rooms()
  importlib.import_module("pgolf_jax.runtime.jax_setup").set_xla_options()
  module, function = task["call"].split(":")
  day = Day(Path(task["out"]), task["tiny"], record.read_lines(Path(task["earlier"])))
  rows: Iterator[Row] = getattr(importlib.import_module(module), function)(day, **task["arguments"])
  with Path(task["lines"]).open("a", encoding="utf-8") as file:
    for row in rows:
      date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M")
      print(json.dumps({**row, "date": date}), file=file, flush=True)


def main(words: Sequence[str]) -> int:
  """The command of a checkout that is not installed; its options are those of `pgolf bench gpu-day`."""
  if words[:1] == ["--child"]:
    work(json.loads(words[1]))
    return 0
  # Else a call that is told to end would leave its item on the device, for an item has a session of its own.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  try:
    return call("python3 -m pgolf_jax.bench.gpu_day", gpu_day, list(words)) or 0
  except UserError as error:
    print(f"gpu_day: {error}", file=sys.stderr)
    return 1


COMMAND = gpu_day

if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
