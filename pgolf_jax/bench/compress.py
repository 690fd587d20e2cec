"""`pgolf bench compress`: GPTQ and the codecs, on the record's shape or on an artifact's integers."""

import dataclasses
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from pgolf_jax.quantize.artifact import read, writer
from pgolf_jax.quantize.artifact.banks import kind
from pgolf_jax.quantize.artifact.codecs import NAMES
from pgolf_jax.quantize.artifact.tensors import Grid
from pgolf_jax.quantize.calibrate import Calibration
from pgolf_jax.quantize.quantize import quantize
from pgolf_jax.settings.config import QuantizeConfig

RECORD = {
  "attn.c_q.weight": (512, 512, 13.0),
  "attn.c_k.weight": (256, 512, 13.0),
  "attn.c_v.weight": (256, 512, 13.0),
  "attn.proj.weight": (512, 512, 13.0),
  "mlp.fc.weight": (2048, 512, 11.5),
  "mlp.proj.weight": (512, 2048, 11.5),
}
"""Rows, columns and clip of each kind of matrix in the record's 11 layers; its embedding is 8192 × 512, clip 14."""


def compress(artifact: Path | None = None, layers: int = 11, gptq: bool = True) -> None:
  """Time quantising and every codec, with bytes by kind of matrix; ZPAQ beside it where `lrzip` is installed.

  Example: pgolf bench compress --artifact runs/demo/artifact.pgolf

  Args:
    artifact: an artifact whose integers are taken; random matrices of the record's shape, with columns of different
      size, if not given.
    layers: number of layers of random matrices.
    gptq: time GPTQ of all random matrices too.
  """
  tensors = read(artifact.read_bytes()).tensors if artifact else _random_grids(layers)
  console = Console()
  for title, rows in (("whole file", measure_files(tensors)), ("bytes by kind", measure_kinds(tensors))):
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
      table.add_column(column, justify="right")
    for row in rows:
      table.add_row(*row.values())
    console.print(table)
  if gptq and artifact is None:
    cold, warm = measure_gptq(tensors)
    count = sum(t.q_MxN.size for t in tensors.values())
    console.print(
      f"GPTQ of {count:,} weights: {warm:.1f} s, {count / warm / 1e6:.1f}M weights/s; {cold:.1f} s with compiling"
    )


def measure_files(tensors: Mapping) -> list[dict[str, str]]:
  """Measures bytes and seconds of whole artifacts, by codec."""
  rows = []
  for name in NAMES:
    began = time.perf_counter()
    data = writer.write({}, tensors, name)
    encoded = time.perf_counter()
    loaded = read(data)
    decoded = time.perf_counter()
    loaded.params()
    done = time.perf_counter()
    rows.append(
      {
        "codec": name,
        "bytes": f"{len(data):,}",
        "encode s": f"{encoded - began:.2f}",
        "decode s": f"{decoded - encoded:.2f}",
        "dequantise s": f"{done - decoded:.2f}",
      }
    )
  return rows


def measure_kinds(tensors: Mapping) -> list[dict[str, str]]:
  """Measures bytes of the integers by kind of matrix: entropy of one histogram, both codecs, ZPAQ.

  ZPAQ gets the columns one after the other. Where the reference sorts rows by similarity, the better of sorted (with
  two bytes a row for the order) and unsorted counts.
  """
  groups: dict[str, list[np.ndarray]] = {}
  for name, tensor in tensors.items():
    if isinstance(tensor, Grid):
      groups.setdefault(kind(name), []).append(tensor.q_MxN)
  rows = []
  for name, matrices in groups.items():
    sizes = {codec: len(writer.encode_stream(codec, "grid", matrices)) for codec in NAMES}
    zpaq = _zpaq(matrices) if shutil.which("lrzip") else None
    row = {
      "kind": name,
      "values": f"{sum(q.size for q in matrices):,}",
      "histogram": f"{_histogram_bytes(matrices):,.0f}",
    }
    row |= {codec: f"{size:,}" for codec, size in sizes.items()}
    row |= {
      "ZPAQ": f"{zpaq:,}" if zpaq else "no lrzip",
      "entropy/ZPAQ": f"{sizes['entropy'] / zpaq:.4f}" if zpaq else "",
    }
    rows.append(row)
  return rows


def measure_gptq(tensors: Mapping[str, Grid]) -> tuple[float, float]:
  """Measures seconds of GPTQ over weights of the tensors' shapes: the first time, with compiling, and the second."""
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
  seconds = []
  for _ in range(2):
    began = time.perf_counter()
    quantize(weights, Calibration(hessian, rms), config)
    seconds.append(time.perf_counter() - began)
  return seconds[0], seconds[1]


def _random_grids(layers: int) -> dict[str, Grid]:
  rng = np.random.default_rng(0)

  def grid(rows: int, columns: int, clip: float, levels: int) -> Grid:
    width_N = np.exp(0.2 * rng.standard_normal(columns))
    weight_MxN = (rng.standard_normal((rows, columns)) * width_N).astype(np.float32)
    step_M = (clip * weight_MxN.std(axis=1) / levels).astype(np.float16)
    q_MxN = np.clip(np.rint(weight_MxN / step_M.astype(np.float32)[:, None]), -levels, levels)
    return Grid(q_MxN.astype(np.int8), step_M)

  grids = {f"blocks.{i}.{n}": grid(*shape, 31) for i in range(layers) for n, shape in RECORD.items()}
  return grids | {"tok_emb.weight": grid(8192, 512, 14.0, 63)}


def _histogram_bytes(matrices: list[np.ndarray]) -> float:
  count = np.unique(np.concatenate([q.reshape(-1) for q in matrices]), return_counts=True)[1].astype(float)
  return float(-np.sum(count * np.log2(count / count.sum()))) / 8


def _zpaq(matrices: list[np.ndarray]) -> int:
  plain = _lrzip(b"".join(np.ascontiguousarray(q.T).tobytes() for q in matrices))
  rows = sum(q.shape[0] for q in matrices)
  if rows > 8192:  # the sort takes time with the square of the rows
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
