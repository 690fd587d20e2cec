"""`pgolf bench ngram`: the n-gram hints of a whole validation stream, by every implementation."""

import ctypes
import functools
import math
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pgolf_jax.bench import harness
from pgolf_jax.bench.harness import Measurement, Peak, Way, Work
from pgolf_jax.data.shards import list_shards, read_shard
from pgolf_jax.errors import UserError
from pgolf_jax.kernels.hardware import Peaks
from pgolf_jax.kernels.ngram import NgramState, reference
from pgolf_jax.runtime.memory import process_bytes

CACHE_LINE = 64
"""Bytes."""
THRESHOLD = 0.8
PYTHON_TARGETS = 100_000
"""Targets for the implementation in plain Python, which is too slow for a whole stream."""
PUBLISHED_LOAD = 0.55
"""Share of the published context table that the targets may fill; its size is the power of two from there up."""


class Hints(NamedTuple):
  """An implementation's hints, 0 where the gate is closed, its gates, and the bytes of its counts."""

  hint_N: np.ndarray
  gate_N: np.ndarray
  state_bytes: int | None


class Facts(NamedTuple):
  """What the table says of some hints; `agrees` with the first hints from the same kind of table, None for those."""

  gated: int
  agrees: bool | None
  state_bytes: int | None


def ngram(
  data: Path | None = None,
  targets: int = 13_400_000,
  order: int = 16,
  threads: tuple[int, ...] = (1, 2),
  repeats: int = 5,
  published: Path | None = None,
) -> None:
  """Time the hints of a stream: both kinds of table in C, plain Python on a part, and the published C.

  GB/s counts the cache lines that every target touches at random, one a table, read and written back; the roofline is
  the time they take at the bandwidth with which one core copies a large array here. B/target are the bytes of the
  counts at the end; peak B/target is the highest growth of the process, results included. The published C, if its file
  is given, is the first way, with which all others are compared.

  Example: pgolf bench ngram --data data/fineweb --published online_ngram_state.c

  Args:
    data: folder of shards, of which the training and then the validation tokens are taken, as far as `targets`. If not
      given, a random stream with as much repetition as web text.
    targets: length of the stream.
    order: context tokens plus one.
    threads: numbers of threads to time.
    repeats: times that each way is run, in turn with the others.
    published: online_ngram_state.c of the published submission, which is compiled here.
  """
  tokens = read_stream(data, targets + 1) if data else random_stream(targets + 1)
  columns = {
    **harness.SECONDS,
    **harness.CORES,
    **harness.rate("M targets", 1e6),
    **harness.RATES,
    **harness.ROOFLINE,
    "B/target": lambda m: harness.figure(m.facts.state_bytes, m.way.work.amount),
    "peak B/target": lambda m: m.peak and harness.figure(m.peak.num_bytes, m.way.work.amount),
    "gated": lambda m: f"{m.facts.gated:,}",
    "agrees": lambda m: {None: "", True: "yes", False: "NO"}[m.facts.agrees],
    **harness.COMPARISON,
  }
  title = f"{len(tokens) - 1:,} targets, order {order}, {data or 'random stream'}"
  harness.show(title, measure(tokens, order, threads, repeats, published), columns)


def measure(
  tokens: np.ndarray, order: int, threads: tuple[int, ...], repeats: int, published: Path | None
) -> list[Measurement]:
  """The table's rows; `tokens` has one more than there are targets.

  Raises:
    UserError: there is nothing to measure, or `published` is not the published C.
  """
  if min(threads, default=0) < 1 or len(tokens) < 2:
    raise UserError("There must be a target and a number of threads: give numbers from 1 up.")
  targets, vocab_size = np.ascontiguousarray(tokens[1:]), int(tokens.max()) + 1
  bandwidth = copy_bandwidth()
  firsts: dict[str, Hints] = {}

  def way(kind: str, by: str, run: Callable[[], Hints], *, threads: int = 1, count: int = len(targets)) -> Way:
    tables = {"exact": 1, "reference": 2}[kind]
    return Way(
      {"tables": kind, "by": by, "threads": f"{threads}"},
      lambda: run,
      Work(count, "targets", num_bytes=2 * CACHE_LINE * tables * count, peaks=Peaks(math.inf, bandwidth)),
      count_memory=process_memory,
      inspect=functools.partial(_compare, firsts, kind),
    )

  def in_c(kind: str, threads: int) -> Hints:
    state = NgramState(
      order, threshold=THRESHOLD, mode=kind, vocab_size=vocab_size, expected=len(targets), threads=threads
    )
    state.seed(targets[:1])
    hint, gate = state.update(targets)
    hint *= gate
    return Hints(hint, gate, state.nbytes)

  def in_python() -> Hints:
    model = reference.NgramModel(order, threshold=THRESHOLD, mode="exact")
    model.seed(targets[:1])
    hint, gate = model.update(targets[:PYTHON_TARGETS])
    return Hints(hint * gate, gate, None)

  with tempfile.TemporaryDirectory() as folder:
    ways = []
    if published:
      library = compile_published(published, Path(folder))
      ways.append(way("reference", "published C", functools.partial(published_hints, library, targets, order)))
    for kind in ("exact", "reference"):
      ways += [way(kind, "C", functools.partial(in_c, kind, n), threads=n) for n in threads]
      if kind == "exact":
        ways.append(way(kind, "plain Python", in_python, count=min(PYTHON_TARGETS, len(targets))))
    return harness.measure(ways, repeats, warmups=0)[0]


def _compare(firsts: dict[str, Hints], kind: str, hints: Hints) -> Facts:
  first = firsts.setdefault(kind, hints)
  count = min(len(first.gate_N), len(hints.gate_N))
  agrees = all(np.array_equal(a[:count], b[:count]) for a, b in zip(first[:2], hints[:2], strict=True))
  return Facts(int(hints.gate_N.sum()), None if first is hints else agrees, hints.state_bytes)


def compile_published(source: Path, folder: Path) -> ctypes.CDLL:
  """Compiles the file into `folder`, with the flags of the published script. Raises UserError if that fails."""
  library = folder / "published_ngram.so"
  command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", "-o", str(library), str(source)]
  try:
    subprocess.run(command, check=True, capture_output=True, text=True)
  except (OSError, subprocess.CalledProcessError) as e:
    detail = (getattr(e, "stderr", "") or str(e)).strip().splitlines()[0]
    raise UserError(f"{source} did not compile ({detail}); give the published online_ngram_state.c.") from None
  loaded = ctypes.CDLL(str(library))
  if not hasattr(loaded, "online_ngram_state_process_chunk"):
    raise UserError(f"{source} has no online_ngram_state_process_chunk; give the published online_ngram_state.c.")
  return loaded


def published_hints(library: ctypes.CDLL, targets_N: np.ndarray, order: int) -> Hints:
  """Returns the hints that the published script makes: from the token channel, seeded by the first target.

  Its other two channels run too, on tables that stay empty, as in the script when their boosts are 0.
  """
  pointer, count = ctypes.c_void_p, len(targets_N)
  library.online_ngram_state_create.restype = pointer
  library.online_ngram_state_create.argtypes = [ctypes.c_int] * 3
  library.online_ngram_state_destroy.argtypes = [pointer]
  library.online_ngram_state_seed_prefix_token.argtypes = [pointer, ctypes.c_uint16]
  library.online_ngram_state_process_chunk.argtypes = [pointer, pointer, ctypes.c_int64] + [pointer] * 7

  def bits(entries: int, load: float) -> int:
    return min(max(math.ceil(math.log2(max(int(entries / load), 1))), 12), 28)

  targets_N = np.ascontiguousarray(targets_N, np.uint16)
  state = library.online_ngram_state_create(order - 1, bits(count, PUBLISHED_LOAD), bits(max(count // 2, 1), 0.60))
  if not state:
    raise MemoryError("the published tables do not fit")
  try:
    library.online_ngram_state_seed_prefix_token(state, int(targets_N[0]))
    every = np.ones(2**16, np.uint8)
    hint, share = np.zeros(count, np.uint16), np.zeros(count, np.float32)
    unused = np.zeros(count, np.uint16), np.zeros(count, np.float32), np.zeros(count, np.uint8)
    arrays = (every, every, hint, share, *unused)
    status = library.online_ngram_state_process_chunk(
      state, targets_N.ctypes.data, count, *(array.ctypes.data for array in arrays)
    )
    if status:
      raise RuntimeError(f"the published pass failed with status {status}")
  finally:
    library.online_ngram_state_destroy(state)
  gate = share >= np.float32(THRESHOLD)
  return Hints(np.where(gate, hint, 0).astype(np.int32), gate, None)


def read_stream(folder: Path, count: int) -> np.ndarray:
  """The first `count` tokens of a folder's train and then validation shards. Raises UserError if it has fewer."""
  parts, missing = [], count
  for path in (path for split in ("train", "val") for path in list_shards(folder, split)):
    if missing:
      parts.append(read_shard(path)[:missing])
      missing -= len(parts[-1])
  if missing:
    raise UserError(f"{folder} holds {count - missing:,} tokens; take --targets {count - missing - 1} or fewer.")
  return np.concatenate(parts)


def random_stream(count: int, vocab_size: int = 8192) -> np.ndarray:
  """Tokens by Zipf's law, with copies of earlier spans: about one context of 15 in thirty has been seen before."""
  rng = np.random.default_rng(0)
  tokens = np.minimum(rng.zipf(1.3, count), vocab_size - 1).astype(np.uint16)
  span = 40
  for start in range(10 * span, count - span, 20 * span):
    source = rng.integers(0, start - span)
    tokens[start : start + span] = tokens[source : source + span]
  return tokens


def copy_bandwidth() -> float:
  """Bytes a second that one core moves when it copies a large array, read and written bytes both counted."""
  source, target = np.ones(2**24), np.empty(2**24)
  copy = Way({}, lambda: lambda: np.copyto(target, source))
  return 2 * source.nbytes / harness.measure([copy], 3)[0][0].seconds.min()


def process_memory() -> Callable[[], Peak | None]:
  """Starts counting the growth of this process; returns a function that reads it. Counts on Linux with glibc alone.

  Freed memory is given back to the system first: used again, it would not count as growth.
  """
  try:
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = process_bytes("VmRSS")
  except (AttributeError, OSError, TypeError):
    return lambda: None
  return lambda: Peak(process_bytes("VmHWM") - before, is_bound=False)


COMMAND = ngram
