"""`pgolf bench ngram`: the n-gram hints of a whole validation stream, in both table modes, on one core and two."""

import dataclasses
import os
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
    first: seconds of the first time, which also has to get memory from the system.
    best: seconds of the fastest time; `core_seconds` of all cores together in the least busy one.
    state_bytes: counts held at the end, without results; None where they cannot be told.
    floor: seconds in which memory could move what the method must touch at random; None where not worked out.
    gated: hints whose gate is open.
    agrees: whether hints equal those of the first row of the same tables; None for that row.
  """

  what: str
  threads: int
  targets: int
  first: float
  best: float
  core_seconds: float
  state_bytes: int | None
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
  that copying a large array reaches on this machine.

  Example: pgolf bench ngram --data data/fineweb --published online_ngram_state.c

  Args:
    data: folder of shards; train first, then validation, as far as `targets`. Without it, a made-up stream with as
      much repetition as web text.
    targets: length of the stream.
    order: context tokens plus one.
    threads: numbers of threads to time.
    repeats: times that each is run.
    published: online_ngram_state.c of the published submission, compiled here to be timed on the same stream.
  """
  from rich.console import Console
  from rich.table import Table

  tokens = read_stream(data, targets + 1) if data else made_up_stream(targets + 1)
  rows = measure(tokens, order, threads, repeats, published)
  title = f"{len(tokens) - 1:,} targets, order {order}, {'made up' if data is None else data}"
  table = Table(title=title, title_justify="left")
  figures = ("threads", "first s", "best s", "core s", "M/s", "floor s", "bytes/target", "gated", "agrees")
  table.add_column("tables")
  for column in figures:
    table.add_column(column, justify="right")
  for row in rows:
    table.add_row(
      row.what,
      str(row.threads),
      f"{row.first:.2f}",
      f"{row.best:.2f}",
      f"{row.core_seconds:.2f}",
      f"{row.targets / row.best / 1e6:.2f}",
      "" if row.floor is None else f"{row.floor:.2f}",
      "" if row.state_bytes is None else f"{row.state_bytes / row.targets:.1f}",
      f"{row.gated:,}",
      {None: "", True: "yes", False: "NO"}[row.agrees],
    )
  Console().print(table)


def measure(
  tokens: np.ndarray, order: int, threads: tuple[int, ...], repeats: int, published: Path | None
) -> list[Row]:
  """The rows of the table; `tokens` has one more than there are targets."""
  from pgolf_jax.bench import _ngram_published
  from pgolf_jax.kernels.ngram import NgramState, reference

  if min(threads, default=0) < 1 or repeats < 1 or len(tokens) < 2:
    raise UserError("There must be a target, a number of threads and a repeat: give numbers from 1 up.")
  targets, vocab_size, threshold = np.ascontiguousarray(tokens[1:]), int(tokens.max()) + 1, 0.8
  bandwidth = _copy_bandwidth()

  def ours(mode: str, count: int) -> Callable:
    def run():
      state = NgramState(
        order, threshold=threshold, mode=mode, vocab_size=vocab_size, expected=len(targets), threads=count
      )
      state.seed(targets[:1])
      hint, gate = state.update(targets)
      return hint * gate, gate, state.nbytes

    return run

  def plain_python():
    model = reference.NgramModel(order, threshold=threshold, mode="exact")
    model.seed(targets[:1])
    hint, gate = model.update(part)
    return hint * gate, gate, None

  rows = []
  for mode, tables in (("exact", 1), ("reference", 2)):
    floor = len(targets) * tables * 2 * LINE / bandwidth
    expected = None
    for count in threads:
      row, found = _time(ours(mode, count), f"{mode}, C", count, repeats, floor, expected)
      rows.append(row)
      expected = expected or found
    if mode == "exact":
      part = targets[:100_000]
      begun = expected[0][: len(part)], expected[1][: len(part)]
      rows.append(_time(plain_python, "exact, plain Python", 1, 1, None, begun)[0])
  if published:
    with tempfile.TemporaryDirectory() as folder:
      library = _ngram_published.compile_source(published, Path(folder))

      def theirs():
        return *_ngram_published.hints(library, targets, order, threshold), None

      rows.append(_time(theirs, "reference, published C", 1, repeats, None, expected)[0])
  return rows


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


def _time(run: Callable, what: str, threads: int, repeats: int, floor: float | None, expected) -> tuple[Row, tuple]:
  walls, cores = [], []
  for _ in range(repeats):
    wall, core = time.perf_counter(), sum(os.times()[:2])
    *found, state_bytes = run()
    cores.append(sum(os.times()[:2]) - core)
    walls.append(time.perf_counter() - wall)
  agrees = None if expected is None else all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
  row = Row(
    what=what,
    threads=threads,
    targets=len(found[1]),
    first=walls[0],
    best=min(walls),
    core_seconds=min(cores),
    state_bytes=state_bytes,
    floor=floor,
    gated=int(found[1].sum()),
    agrees=agrees,
  )
  return row, tuple(found)


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
