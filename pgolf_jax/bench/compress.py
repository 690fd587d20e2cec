"""`pgolf bench compress`: GPTQ and the codecs, on the record's shape or on an artifact's integers."""

import dataclasses
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from pgolf_jax.bench import harness
from pgolf_jax.bench.harness import Measurement, Way, Work
from pgolf_jax.quantize.artifact import read, writer
from pgolf_jax.quantize.artifact.codecs import NAMES
from pgolf_jax.quantize.artifact.codecs.integers import Steps
from pgolf_jax.quantize.artifact.tensors import Grid, LogGrid, kind
from pgolf_jax.quantize.calibrate import Calibration
from pgolf_jax.quantize.make import quantize
from pgolf_jax.settings import QuantizeConfig

RECORD = {
  "attn.c_q.weight": (512, 512, 13.0),
  "attn.c_k.weight": (256, 512, 13.0),
  "attn.c_v.weight": (256, 512, 13.0),
  "attn.proj.weight": (512, 512, 13.0),
  "mlp.fc.weight": (2048, 512, 11.5),
  "mlp.proj.weight": (512, 2048, 11.5),
}
"""Rows, columns and clip of each kind of matrix in the record's 11 layers; its embedding is 8192 × 512, clip 14."""
LARGEST_SORTED = 8192
"""Most rows that are sorted by similarity, which takes time with their square."""


def compress(artifact: Path | None = None, layers: int = 11, gptq: bool = True, repeats: int = 5) -> None:
  """Time quantising and every codec, with bytes by kind of matrix; ZPAQ beside it where `lrzip` is installed.

  Bytes of a kind are compared with those of ZPAQ, or without `lrzip` with the entropy of one histogram of all values.

  Example: pgolf bench compress --artifact runs/demo/artifact.pgolf

  Args:
    artifact: an artifact whose integers are taken; random matrices of the record's shape, with columns of different
      size, if not given.
    layers: number of layers of random matrices.
    gptq: time GPTQ of all random matrices too.
    repeats: times that each way is run, in turn with the others.
  """
  tensors = read(artifact.read_bytes()).tensors if artifact else random_grids(layers)
  size = {
    "bytes": lambda m: m.facts and f"{m.facts:,}",
    "÷ first bytes": lambda m: m.facts and m.first and f"{m.facts / m.first.facts:.4f}",
  }
  times = {**harness.SECONDS, **harness.CORES, **harness.rate("M values", 1e6), **harness.COMPARISON}
  harness.show("whole file", measure_files(tensors, repeats), size | times)
  harness.show("by kind of matrix", measure_kinds(tensors, repeats), size | times)
  if gptq and artifact is None:
    harness.show("GPTQ", measure_gptq(tensors, repeats), times)


def measure_files(tensors: Mapping, repeats: int) -> list[Measurement]:
  """Measures the making and reading of whole artifacts, by codec."""
  work = Work(sum(t.q_MxN.size for t in tensors.values() if isinstance(t, Grid | LogGrid)), "values")
  files: dict[str, bytes] = {}

  def remember(name: str, data: bytes) -> int:
    files[name] = data
    return len(data)

  def way(do: str, name: str) -> Way:
    start = {
      "encode": lambda: functools.partial(writer.write, {}, tensors, name),
      "decode": lambda: functools.partial(read, files[name]),
      "dequantise": lambda: read(files[name]).params,
    }[do]
    inspect = functools.partial(remember, name) if do == "encode" else lambda _: None
    return Way({"do": do, "codec": name}, start, work, inspect=inspect)

  steps = ("encode", "decode", "dequantise")
  return [m for do in steps for m in harness.measure([way(do, name) for name in NAMES], repeats, warmups=0)[0]]


def measure_kinds(tensors: Mapping, repeats: int) -> list[Measurement]:
  """Measures the encoding of the integers of each kind of matrix; facts are its bytes."""
  groups: dict[tuple[str, type], list[Grid | LogGrid]] = {}
  for name, tensor in tensors.items():
    if isinstance(tensor, Grid | LogGrid):
      groups.setdefault((kind(name), type(tensor)), []).append(tensor)
  ways = [list(_coders(name, matrices)) for (name, _), matrices in groups.items()]
  return [m for coders in ways for m in harness.measure(coders, repeats, warmups=0)[0]]


def _coders(name: str, tensors: list[Grid | LogGrid]) -> Iterator[Way]:
  matrices = [tensor.q_MxN for tensor in tensors]
  stream = ("grid", matrices)
  if isinstance(tensors[0], LogGrid):
    stream = ("matrix", matrices, [Steps(t.row_M, t.column_N, t.trellis_N, t.trellis_M) for t in tensors])
  work = Work(sum(q.size for q in matrices), "values")
  way = functools.partial(Way, work=work, inspect=int)
  if shutil.which("lrzip"):
    yield way({"kind": name, "by": "ZPAQ"}, lambda: lambda: zpaq_bytes(matrices), repeats=1)
  yield way({"kind": name, "by": "histogram"}, lambda: lambda: histogram_bytes(matrices))
  for codec in NAMES:
    run = lambda codec=codec: len(writer.encode_stream(codec, *stream))  # noqa: E731
    yield way({"kind": name, "by": codec}, lambda run=run: run)


def measure_gptq(tensors: Mapping[str, Grid], repeats: int) -> list[Measurement]:
  """Measures GPTQ over weights of the tensors' shapes: the first time, with compiling, and later times."""
  rng = np.random.default_rng(0)
  weights = {n: rng.standard_normal(t.q_MxN.shape, np.float32) for n, t in tensors.items()}
  hessian, rms = {}, {}
  for columns in {w.shape[1] for w in weights.values()}:
    inputs = rng.standard_normal((2 * columns, columns), np.float32) * np.exp(0.5 * rng.standard_normal(columns))
    moment = (inputs.T @ inputs).astype(np.float32)
    for name, weight in weights.items():
      if weight.shape[1] == columns:
        hessian[name], rms[name] = moment, np.sqrt(np.mean(inputs**2, axis=0)).astype(np.float32)
  config = dataclasses.replace(QuantizeConfig(), lqer=False)
  run = functools.partial(quantize, weights, Calibration(hessian, rms), config)
  work = Work(sum(w.size for w in weights.values()), "values")
  ways = [Way({"GPTQ": "with compiling"}, lambda: run, work, repeats=1), Way({"GPTQ": "compiled"}, lambda: run, work)]
  return harness.measure(ways, repeats, warmups=0)[0]


def random_grids(layers: int) -> dict[str, Grid]:
  """Returns integers of normal weights in the record's shapes."""
  rng = np.random.default_rng(0)

  def grid(rows: int, columns: int, clip: float, levels: int) -> Grid:
    width_N = np.exp(0.2 * rng.standard_normal(columns))
    weight_MxN = (rng.standard_normal((rows, columns)) * width_N).astype(np.float32)
    step_M = (clip * weight_MxN.std(axis=1) / levels).astype(np.float16)
    q_MxN = np.clip(np.rint(weight_MxN / step_M.astype(np.float32)[:, None]), -levels, levels)
    return Grid(q_MxN.astype(np.int8), step_M)

  grids = {f"blocks.{i}.{n}": grid(*shape, 31) for i in range(layers) for n, shape in RECORD.items()}
  return grids | {"tok_emb.weight": grid(8192, 512, 14.0, 63)}


def histogram_bytes(matrices: list[np.ndarray]) -> float:
  """Returns the entropy of all values under their own histogram."""
  count = np.unique(np.concatenate([q.reshape(-1) for q in matrices]), return_counts=True)[1].astype(float)
  return float(-np.sum(count * np.log2(count / count.sum()))) / 8


def zpaq_bytes(matrices: list[np.ndarray]) -> int:
  """Returns the bytes that ZPAQ needs for the matrices, column by column.

  As in the reference, rows are sorted by similarity where that is smaller, two bytes a row for their order included.
  """
  plain = _lrzip(b"".join(np.ascontiguousarray(q.T).tobytes() for q in matrices))
  rows = sum(q.shape[0] for q in matrices)
  if rows > LARGEST_SORTED:
    return plain
  ordered = _lrzip(b"".join(np.ascontiguousarray(q[_by_similarity(q)].T).tobytes() for q in matrices))
  return min(plain, ordered + 2 * rows)


def _lrzip(data: bytes) -> int:
  with tempfile.TemporaryDirectory() as folder:
    source, packed = Path(folder, "in"), Path(folder, "out")
    source.write_bytes(data)
    subprocess.run(["lrzip", "-z", "-L", "9", "-q", "-o", packed, source], check=True, capture_output=True)
    return packed.stat().st_size


def _by_similarity(q_MxN: np.ndarray) -> np.ndarray:
  """Returns an order of the rows in which each is followed by the nearest (by sum of differences) of those left."""
  rows_MxN, left = q_MxN.astype(np.float32), np.ones(len(q_MxN), bool)
  order = [0]
  left[0] = False
  while left.any():
    distance_M = np.where(left, np.abs(rows_MxN - rows_MxN[order[-1]]).sum(axis=1), np.inf)
    order.append(int(distance_M.argmin()))
    left[order[-1]] = False
  return np.array(order)


COMMAND = compress
