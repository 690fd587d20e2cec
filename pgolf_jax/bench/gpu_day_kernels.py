"""Items of plan A of `pgolf bench gpu-day`: the card's ceilings, and every kernel: right, then fast, then tuned."""

import contextlib
import functools
import importlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pgolf_jax.bench import gpu_day_record as record
from pgolf_jax.bench import harness
from pgolf_jax.bench.gpu_day import ROOT, Day, Row, commit
from pgolf_jax.bench.harness import Measurement, Way, Work
from pgolf_jax.bench.kernels import RECORD, Case, Sizes, cases, segment_starts
from pgolf_jax.bench.pytorch import torch_gpt_on
from pgolf_jax.kernels.hardware import peaks, target

_LIMITS = 5e-3, 1e-2
"""Largest relative error of a kernel in bfloat16 against XLA in float32: of the result, and of a gradient."""
_LIMITS_FLOAT32 = 1e-4, 1e-4
_TINY = Sizes(D=128, F=256, V=128, H=2, K=1, C=64, matrices=1)
"""The smallest that kernels take, on every hardware."""


def device(day: Day) -> Iterator[Row]:
  """What the device and the programs are."""
  here = target()
  row = {"device": here.kind, "platform": here.platform, "cores": here.cores, "jax": jax.__version__}
  row |= {"python": ".".join(map(str, sys.version_info[:3])), "torch": "", "triton": ""}
  for name in ("torch", "triton"):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      row[name] = importlib.metadata.version(name)
  yield row


def figures(measured: Measurement, **more: Any) -> Row:
  """Returns the row of a measurement: median, 10th and 90th percentile in milliseconds, and rates."""
  p10, median, p90 = np.percentile(measured.seconds, (10, 50, 90)) * 1e3
  row = {"ms": float(median), "p10": float(p10), "p90": float(p90), "n": len(measured.seconds)}
  work = measured.way.work
  for name, amount, scale in (("tflops", work.flops, 1e12), ("gbs", work.num_bytes, 1e9)):
    if amount:
      row[name] = amount / (median * 1e-3) / scale
  return {**row, **clock(), **more}


def clock() -> Row:
  """Returns the card's present clock in MHz, where its driver says it."""
  program = shutil.which("nvidia-smi") if target().is_gpu else None
  if program is None:
    return {}
  query = [program, "--query-gpu=clocks.sm,clocks.mem,temperature.gpu", "--format=csv,noheader,nounits"]
  try:
    words = subprocess.run(query, capture_output=True, text=True, timeout=15).stdout.splitlines()[0].split(",")
    return {"clock_mhz": int(words[0]), "memory_mhz": int(words[1]), "celsius": int(words[2])}
  except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
    return {}


def timed(way: Way, day: Day, config: str, **more: Any) -> Iterator[Row]:
  """Times one way and yields its row; one that fails or does not fit yields a row that says why."""
  try:
    measured, notes = harness.measure([way], 3 if day.tiny else 20, warmups=2, group_s=0.0 if day.tiny else 0.01)
  except Exception as error:  # the next way is still to be measured
    yield {"config": config, "verdict": "failed", "note": f"{type(error).__name__}: {str(error)[:300]}", **more}
    return
  for m in measured:
    yield figures(m, config=config, **more)
  for note in notes:
    yield {"config": config, "verdict": "failed", "note": note, **more}


def pytorch() -> ModuleType | None:
  """Returns `torch_gpt` where PyTorch computes on this platform."""
  return torch_gpt_on(target().platform)[0]


def ceilings(day: Day) -> Iterator[Row]:
  """A copy, a large product, and the model's six products, by JAX and by PyTorch."""
  dtype = jnp.float32 if target().platform == "cpu" else jnp.bfloat16
  elements = 1 << (16 if day.tiny else 30)
  x = jax.random.normal(jax.random.key(0), (elements,), jnp.float32).astype(dtype)
  copy = jax.jit(lambda x: x + jnp.ones((), x.dtype))  # XLA gives a mere copy back as its own argument
  work = Work(num_bytes=2 * x.nbytes, peaks=peaks(target().kind))
  way = Way({"by": "JAX"}, lambda: functools.partial(copy, x), work)
  yield from timed(way, day, f"copy {x.nbytes >> 20} MiB, JAX", by="JAX")
  del x
  n = 64 if day.tiny else 98_304
  large = 64 if day.tiny else 8192
  D, F, V, H, K, C = (_TINY if day.tiny else RECORD)[:6]
  shapes = {
    "large": (large, large, large),
    "q, out": (n, D, H * C),
    "k, v": (n, D, K * C),
    "up": (n, D, F),
    "down": (n, F, D),
    "dW of up": (D, n, F),
    "head": (n, D, V),
  }
  for name, (rows, inner, columns) in shapes.items():
    config, work = f"{name} {rows}×{inner}×{columns}", Work(flops=2.0 * rows * inner * columns)
    a, b = (
      jax.random.normal(jax.random.key(i), s).astype(dtype) for i, s in ((1, (rows, inner)), (2, (inner, columns)))
    )
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(a.dtype))
    way = Way({"by": "JAX"}, lambda f=product, a=a, b=b: functools.partial(f, a, b), work)
    yield from timed(way, day, f"{config}, JAX", by="JAX")
    if (module := pytorch()) is not None:
      platform = target().platform
      tensors = [module.tensor(x, platform) for x in (a, b)]
      prepare = lambda m=module, t=tensors: functools.partial(m.torch.matmul, *t)  # noqa: E731
      way = Way({"by": "PyTorch"}, prepare, work, wait=lambda _, m=module, p=platform: m.synchronize(p))
      yield from timed(way, day, f"{config}, PyTorch", by="PyTorch")


def right(day: Day, operation: str) -> Iterator[Row]:
  """Every backend of an operation against XLA in float32, repeated, over poisoned memory."""
  for config, case in _cases_to_check(day, operation):
    reference = None
    for backend in case.backends()[0]:
      for gradient in case.passes:
        name = f"{config}, {'gradient' if gradient else 'forward'}, {backend}"
        try:
          if reference is None:
            reference = {g: _expected(day, case, g) for g in case.passes}
          row = check(case, backend, gradient, reference[gradient], repeats=3 if day.tiny else 20)
        except Exception as error:  # the next backend is still to be checked
          row = {"verdict": "failed", "note": f"{type(error).__name__}: {str(error)[:300]}"}
        yield {"config": name, "operation": operation, "by": backend, **row}


def _cases_to_check(day: Day, operation: str) -> Iterator[tuple[str, Case]]:
  """Real lengths in one row; and two rows, no multiple of any block, whose segments lie about the blocks' edges."""
  dtype = jnp.float32 if target().platform == "cpu" else jnp.bfloat16
  sizes = _TINY if day.tiny else RECORD
  T, longest = (65, 48) if day.tiny else (4097, 3072)
  edges = [1, 15, 16, 17] if day.tiny else [1, 63, 64, 65, 1024]
  rows = [[*edges, T], [longest, *edges, T]]
  hard = np.stack([segment_starts(T, longest, row) for row in rows])
  real = segment_starts(128 if day.tiny else 98_304, longest)[None]
  whole = hard[:, : 64 if day.tiny else 4096]  # as long as the cross-entropy's blocks need
  for config, start in (("real lengths", real), (f"2 × {T}, hard", hard), (f"2 × {whole.shape[1]}, hard", whole)):
    for case in cases(start, longest, dtype, sizes):
      if case.name == operation:
        yield config, case


def _weighted(case: Case, backend: str, gradient: bool) -> Callable[..., Any]:
  """Returns f(weights, *arguments) → the result, or the gradients of its sum under random weights."""

  def total(weights, *arguments):
    results = case.call(*arguments, implementation=backend)
    return sum(jax.tree.leaves(jax.tree.map(lambda x, w: (x.astype(jnp.float32) * w).sum(), results, weights)))

  if not gradient:
    return lambda weights, *arguments: case.call(*arguments, implementation=backend)
  return jax.grad(total, tuple(1 + i for i in case.differentiated))


def _weights(case: Case) -> Any:
  results = jax.eval_shape(functools.partial(case.call, implementation="xla"), *case.arguments)
  return jax.tree.map(lambda x: jax.random.normal(jax.random.key(7), x.shape), results)


def _expected(day: Day, case: Case, gradient: bool) -> list[jax.Array]:
  """The result, or the gradients, by XLA with every array and product in float32; of tiny ones straight by formula."""
  wide = [x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in case.arguments]
  with jax.default_matmul_precision("highest"):
    results = jax.jit(_weighted(case, "reference" if day.tiny else "xla", gradient))(_weights(case), *wide)
  return jax.tree.leaves(results)


def check(case: Case, backend: str, gradient: bool, expected: Sequence[jax.Array], repeats: int) -> Row:
  """Returns the relative error of a backend and a verdict.

  NOT WRITTEN: a result is not finite, as it would be where memory that was filled with NaN is handed back. WRONG: the
  error is beyond the limit, or what is expected is not finite, which says nothing. RACE: a repetition differs in a bit.
  """
  program, weights = jax.jit(_weighted(case, backend, gradient)), _weights(case)
  run = functools.partial(program, weights, *case.arguments)
  first = jax.tree.leaves(jax.block_until_ready(run()))
  is_finite = all(bool(jnp.isfinite(x).all()) for x in first)
  worst = float(np.max([_distance(got, want) for got, want in zip(first, expected, strict=True)]))  # NaN if one is
  different = 0
  for _ in range(repeats):
    poison(first)
    again = jax.tree.leaves(jax.block_until_ready(run()))
    is_finite &= all(bool(jnp.isfinite(x).all()) for x in again)
    different += not all(bool(_same_bits(a, b)) for a, b in zip(first, again, strict=True))
  limits = _LIMITS_FLOAT32 if case.arguments[0].dtype == jnp.float32 else _LIMITS
  row = {"error": worst, "limit": limits[gradient], "repeats": repeats}
  if not is_finite:
    return {**row, "verdict": "NOT WRITTEN", "note": "not finite, where memory held NaN before"}
  if not all(bool(jnp.isfinite(x).all()) for x in expected):
    return {**row, "verdict": "WRONG", "note": "what is expected is not finite"}
  if not worst <= limits[gradient] and backend != "xla":
    return {**row, "verdict": "WRONG", "note": f"error {worst:.2g} > {limits[gradient]:g}"}
  if different:
    return {**row, "verdict": "RACE", "note": f"{different} of {repeats} repetitions differ"}
  return {**row, "verdict": "ok"}


def poison(like: Sequence[jax.Array]) -> None:
  """Fills memory of these arrays' sizes with NaN and frees it, so that the next results are likely to lie in it."""
  blocks = [jnp.full(x.shape, jnp.nan, x.dtype) for x in like for _ in range(3)]
  jax.block_until_ready(blocks)
  for block in blocks:
    block.delete()


@jax.jit
def _distance(got: jax.Array, want: jax.Array) -> jax.Array:
  """The norm of the difference over the norm of what is right."""
  return jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.maximum(jnp.linalg.norm(want), 1e-30)


@jax.jit
def _same_bits(a: jax.Array, b: jax.Array) -> jax.Array:
  kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[a.dtype.itemsize]
  return (jax.lax.bitcast_convert_type(a, kind) == jax.lax.bitcast_convert_type(b, kind)).all()


def times(day: Day, operation: str) -> Iterator[Row]:
  """Every backend of an operation and PyTorch, on real lengths and, for attention, on full segments; kernels last."""
  dtype = jnp.float32 if target().platform == "cpu" else jnp.bfloat16
  tokens, longest = (128, 48) if day.tiny else (98_304, 3072)
  rows = {"real lengths": None, "full segments": [longest] * (tokens // longest + 1)}
  for config, lengths in rows.items():
    if lengths and operation != "segment_attention":
      continue
    start = segment_starts(tokens, longest, lengths)[None]
    for case in cases(start, longest, dtype, _TINY if day.tiny else RECORD):
      if case.name == operation:
        yield from _times_of(day, case, config)


def _times_of(day: Day, case: Case, config: str) -> Iterator[Row]:
  module = pytorch()
  for gradient in case.passes:
    name = f"{config}, {'gradient' if gradient else 'forward'}"
    more = {"operation": case.name}
    for backend in case.backends()[0]:
      yield from timed(case.jax_way(backend, gradient), day, f"{name}, {backend}", by=backend, **more)
    if module is not None:
      yield from timed(case.torch_way(module, gradient), day, f"{name}, PyTorch", by="PyTorch", **more)
      if (fused := module.fused()) is not None:
        yield from timed(case.torch_way(fused, gradient), day, f"{name}, PyTorch fused", by="PyTorch fused", **more)


TUNABLE: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {
  ("segment_attention", "mosaic_gpu"): {"HEADS": (2, 1), "STAGES": (2, 3, 4)},
  ("segment_attention", "mosaic_tpu"): {"_BLOCK": (256, 512, 128)},
  ("chunk_attention", "mosaic_gpu"): {"HEADS": (2, 1), "STAGES": (2, 3, 4)},
  ("softcapped_xent", "mosaic_gpu"): {"_STAGES": (4, 2, 6)},
  ("softcapped_xent", "mosaic_tpu"): {"_ROWS": (256, 128, 512)},
  ("leaky_relu2_mlp", "mosaic_gpu"): {"_CLUSTER": (2, 1), "_STAGES": (3, 2)},
  ("leaky_relu2_mlp", "mosaic_tpu"): {"_TILE_N": (256, 128, 512)},
}
"""(operation, backend) → sizes in its module that may be tried, the default first."""


@contextlib.contextmanager
def trying(operation: str, backend: str, sizes: Mapping[str, int]) -> Iterator[None]:
  """Makes a backend that is traced inside take these sizes; everything is traced anew, inside and afterwards."""
  module = importlib.import_module(f"pgolf_jax.kernels.{operation}.{backend}")
  before = {name: getattr(module, name) for name in sizes}
  try:
    vars(module).update(sizes)
    jax.clear_caches()
    yield
  finally:
    vars(module).update(before)
    jax.clear_caches()


def tune(day: Day) -> Iterator[Row]:
  """Tries block sizes; those that win go into the table beside the results."""
  dtype = jnp.float32 if target().platform == "cpu" else jnp.bfloat16
  tokens, longest = (128, 48) if day.tiny else (98_304, 3072)
  start = segment_starts(tokens, longest)[None]
  for case in cases(start, longest, dtype, _TINY if day.tiny else RECORD):
    for backend in case.backends()[0]:
      for sizes in _one_changed(TUNABLE.get((case.name, backend), {})):
        yield from _tried(day, case, backend, sizes)


def _one_changed(choices: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, int]]:
  """The defaults, then each other size with the rest as they are: all with all would take too long."""
  default = {name: values[0] for name, values in choices.items()}
  if default:
    yield default
  for name, values in choices.items():
    yield from ({**default, name: value} for value in values[1:])


def _tried(day: Day, case: Case, backend: str, sizes: dict[str, int]) -> Iterator[Row]:
  """Checks an operation with these block sizes and, where it is right, times it and offers it to the table."""
  gradient, config = case.passes[-1], f"{case.name}, {', '.join(f'{k} {v}' for k, v in sizes.items())}"
  with trying(case.name, backend, sizes):
    try:
      checked = check(case, backend, gradient, _expected(day, case, gradient), repeats=3)
    except Exception as error:  # sizes that do not fit into shared memory, say
      checked = {"verdict": "does not work", "note": f"{type(error).__name__}: {str(error)[:200]}"}
    if checked["verdict"] != "ok":
      yield {"config": config, **checked, "verdict": f"no: {checked['verdict']}"}
      return
    for row in timed(case.jax_way(backend, gradient), day, config, error=checked["error"]):
      if row.get("ms"):
        entry = {"sizes": sizes, "correct": True, "commit": commit(), **{n: row[n] for n in ("ms", "p10", "p90")}}
        key = target().kind, f"{case.name}.{backend}", case.shapes
        row["verdict"] = "in the table" if record.propose(day.out / record.TUNED, key, entry) else "not better"
      yield row


def _suspects(rows: Sequence[Row]) -> Iterator[str]:
  """Operations with a kernel that came out badly; one that crashed or hung has no row but the end of its item."""
  for row in rows:
    if record.is_bad(row) and row.get("status") != record.NOT_RUN and row.get("by") != "xla":
      kind, _, name = row.get("item", "").partition(": ")
      yield from filter(None, [row.get("operation") or (name if kind == "right" else "")])


def sanitize(day: Day) -> Iterator[Row]:
  """compute-sanitizer on small cases of each operation that came out wrong or different, crashed or hung."""
  bad = set(_suspects(day.rows))
  program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
  if not bad or program is None:
    yield {"config": "nothing failed" if not bad else "no compute-sanitizer here", "verdict": "ok"}
    return
  out = day.out.resolve()  # the program runs in another folder
  for operation in sorted(bad):
    task = {"call": f"{__name__}:right", "arguments": {"operation": operation}, "tiny": True, "out": str(out)}
    for tool in ("memcheck", "racecheck"):
      lines = out / f"sanitizer-{operation}.part"
      given = json.dumps({**task, "lines": str(lines), "earlier": str(lines)})
      command = [program, "--tool", tool, "--print-limit", "5", sys.executable, "-m", "pgolf_jax.bench.gpu_day"]
      done = subprocess.run([*command, "--child", given], capture_output=True, text=True, cwd=ROOT)
      lines.unlink(missing_ok=True)
      said = [line.strip("= ") for line in done.stdout.splitlines() if line.startswith("=========")]
      print(done.stdout[-20_000:], done.stderr[-5_000:])
      row = {"config": f"{operation}, {tool}", "verdict": said[-1] if said else "said nothing"}
      if done.returncode:  # what did not run to its end is not without errors
        said, row["verdict"] = [f"exit status {done.returncode}", *said[-1:], *said], "failed"
      yield {**row, "note": " | ".join(said[:3])}
