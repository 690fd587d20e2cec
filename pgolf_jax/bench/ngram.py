"""`pgolf bench ngram`: the n-gram hints of a whole validation stream, in both table modes, on one core and two."""

import ctypes
import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pgolf_jax.errors import UserError

LINE = 64
"""Bytes of a cache line."""


@dataclasses.dataclass(frozen=True)
class Row:
  """One way to the hints, timed some times over.

  Attributes:
    what: tables and compiler, `threads` how many at once.
    targets: how many hints were made.
    best: seconds of the fastest time, `median` of the one in the middle, `core_seconds` of all cores together in the
      least busy one; memory comes from the system anew each time.
    state_bytes: counts held at the end, without results; None where they cannot be told.
    peak_bytes: highest growth of the process, results and their making included; None where the system does not tell.
    floor: seconds in which memory could move what the method must touch at random; None where not worked out.
    gated: hints whose gate is open.
    agrees: whether hints equal those of the first row of the same tables; None for that row.
  """

  what: str
  threads: int
  targets: int
  best: float
  median: float
  core_seconds: float
  state_bytes: int | None
  peak_bytes: int | None
  floor: float | None
  gated: int
  agrees: bool | None


def ngram(
  data: Path | None = None,
  targets: int = 13_400_000,
  order: int = 16,
  threads: tuple[int, ...] = (1, 2),
  repeats: int = 3,
  published: Path | None = None,
) -> None:
  """Time the hints of a stream: both table modes, plain Python on a part, and the published C if its file is given.

  Floor: the cache lines that every target touches at random, one a table, read and written back, over the bandwidth
  that copying a large array reaches on this machine. B/target: bytes of the counts at the end; peak B: the highest
  growth of the process a target, results included. × published: how many times faster than the published C.

  Example: pgolf bench ngram --data data/fineweb --published online_ngram_state.c

  Args:
    data: folder of shards; train first, then validation, as far as `targets`. Without it, a made-up stream with as
      much repetition as web text.
    targets: length of the stream.
    order: context tokens plus one.
    threads: numbers of threads to time.
    repeats: times that each is run, in turns, so that other work on the machine slows all of them alike.
    published: online_ngram_state.c of the published submission, compiled here to be timed on the same stream.
  """
  from rich.console import Console
  from rich.table import Table

  tokens = read_stream(data, targets + 1) if data else made_up_stream(targets + 1)
  rows = measure(tokens, order, threads, repeats, published)
  table = Table(title_justify="left", title=f"{len(tokens) - 1:,} targets, order {order}, {data or 'made up'}")
  table.add_column("tables", no_wrap=True)
  figures = ("threads", "best s", "median s", "core s", "M/s", "floor s", "B/target", "peak B", "gated", "agrees")
  for column in (*figures, *(("× published", "by core s") if published else ())):
    table.add_column(column, justify="right")
  for row in rows:
    cells = [
      row.what,
      str(row.threads),
      f"{row.best:.2f}",
      f"{row.median:.2f}",
      f"{row.core_seconds:.2f}",
      f"{row.targets / row.best / 1e6:.2f}",
      "" if row.floor is None else f"{row.floor:.2f}",
      "" if row.state_bytes is None else f"{row.state_bytes / row.targets:.1f}",
      "" if row.peak_bytes is None else f"{row.peak_bytes / row.targets:.1f}",
      f"{row.gated:,}",
      {None: "", True: "yes", False: "NO"}[row.agrees],
    ]
    if published:  # its row is the last
      share = row.targets / rows[-1].targets
      cells += [f"{rows[-1].best * share / row.best:.2f}", f"{rows[-1].core_seconds * share / row.core_seconds:.2f}"]
    table.add_row(*cells)
  console = Console()
  if not console.is_terminal:
    console.width = 160  # a log file takes the whole table
  console.print(table)


@dataclasses.dataclass(frozen=True)
class _Way:
  """What a row measures. `run` returns (hint, gate, bytes of the counts or None); ways of one `group` must agree."""

  what: str
  threads: int
  group: str
  run: Callable
  floor: float | None = None
  repeats: int | None = None  # less than the others' where it takes long


def measure(
  tokens: np.ndarray, order: int, threads: tuple[int, ...], repeats: int, published: Path | None
) -> list[Row]:
  """The rows of the table; `tokens` has one more than there are targets. The published C, if any, is the last row."""
  from pgolf_jax.bench import _ngram_published
  from pgolf_jax.kernels.ngram import NgramState, reference

  if min(threads, default=0) < 1 or repeats < 1 or len(tokens) < 2:
    raise UserError("There must be a target, a number of threads and a repeat: give numbers from 1 up.")
  targets, vocab_size, threshold = np.ascontiguousarray(tokens[1:]), int(tokens.max()) + 1, 0.8
  bandwidth = _copy_bandwidth()

  def ours(mode: str, count: int) -> tuple:
    state = NgramState(
      order, threshold=threshold, mode=mode, vocab_size=vocab_size, expected=len(targets), threads=count
    )
    state.seed(targets[:1])
    hint, gate = state.update(targets)
    hint *= gate
    return hint, gate, state.nbytes

  def plain_python() -> tuple:
    model = reference.NgramModel(order, threshold=threshold, mode="exact")
    model.seed(targets[:1])
    hint, gate = model.update(targets[:100_000])
    return hint * gate, gate, None

  ways = []
  for mode, tables in (("exact", 1), ("reference", 2)):
    floor = len(targets) * tables * 2 * LINE / bandwidth
    ways += [_Way(f"{mode}, C", count, mode, functools.partial(ours, mode, count), floor) for count in threads]
    if mode == "exact":
      ways.append(_Way("exact, plain Python", 1, mode, plain_python, repeats=1))
  with tempfile.TemporaryDirectory() as folder:
    if published:
      library = _ngram_published.compile_source(published, Path(folder))

      def theirs() -> tuple:
        return *_ngram_published.hints(library, targets, order, threshold), None

      ways.append(_Way("reference, published C", 1, "reference", theirs))
    return _in_turns(ways, repeats)


def read_stream(folder: Path, count: int) -> np.ndarray:
  """The first `count` tokens of a folder's train and then validation shards. Raises UserError if it has fewer."""
  from pgolf_jax.data.shards import list_shards, read_shard

  parts, missing = [], count
  for path in (path for split in ("train", "val") for path in list_shards(folder, split)):
    if missing:
      parts.append(read_shard(path)[:missing])
      missing -= len(parts[-1])
  if missing:
    raise UserError(f"{folder} holds {count - missing:,} tokens; take --targets {count - missing - 1} or fewer.")
  return np.concatenate(parts)


def made_up_stream(count: int, vocab_size: int = 8192) -> np.ndarray:
  """Tokens by Zipf's law, with copies of earlier spans: about one context of 15 in thirty has been seen before."""
  rng = np.random.default_rng(0)
  tokens = np.minimum(rng.zipf(1.3, count), vocab_size - 1).astype(np.uint16)
  span = 40
  for start in range(10 * span, count - span, 20 * span):
    source = rng.integers(0, start - span)
    tokens[start : start + span] = tokens[source : source + span]
  return tokens


def _in_turns(ways: list[_Way], repeats: int) -> list[Row]:
  times: list[list[tuple[float, float]]] = [[] for _ in ways]  # wall and core seconds
  seen: list[dict] = [{} for _ in ways]  # what the first time showed
  expected = {}
  for repeat in range(repeats):
    for way, seconds, fields in zip(ways, times, seen, strict=True):
      if repeat >= (way.repeats or repeats):
        continue
      before = _reset_peak()
      wall, core = time.perf_counter(), time.process_time()
      hint, gate, state_bytes = way.run()
      seconds.append((time.perf_counter() - wall, time.process_time() - core))
      if repeat:
        continue
      fields["peak_bytes"] = None if before is None else _memory("VmHWM") - before
      known = expected.setdefault(way.group, (hint, gate))
      same = all(np.array_equal(a, b[: len(a)]) for a, b in zip((hint, gate), known, strict=True))
      fields["agrees"] = None if known[1] is gate else same
      fields |= {"targets": len(gate), "state_bytes": state_bytes, "gated": int(gate.sum())}
  return [
    Row(
      what=way.what,
      threads=way.threads,
      floor=way.floor,
      best=min(wall for wall, _ in seconds),
      median=statistics.median(wall for wall, _ in seconds),
      core_seconds=min(core for _, core in seconds),
      **fields,
    )
    for way, seconds, fields in zip(ways, times, seen, strict=True)
  ]


def _reset_peak() -> int | None:
  """Bytes of memory that the process holds now, from where its peak is counted; None but on Linux with glibc.

  What was freed goes back to the system first: taken up again, it would not count as growth.
  """
  try:
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")
  except (AttributeError, OSError, TypeError):
    return None


def _memory(field: str) -> int:
  lines = Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _copy_bandwidth() -> float:
  """Bytes a second that one core moves, read and written both counted."""
  source, to = np.ones(2**24), np.ones(2**24)
  best = min(_seconds(lambda: np.copyto(to, source)) for _ in range(3))
  return 2 * source.nbytes / best


def _seconds(run: Callable) -> float:
  began = time.perf_counter()
  run()
  return time.perf_counter() - began


COMMAND = ngram
