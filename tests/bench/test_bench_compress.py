"""The benchmark of quantising and codecs counts the bytes that artifacts have."""

import numpy as np
import pytest

from pgolf_jax.bench import compress
from pgolf_jax.quantize.artifact import writer
from pgolf_jax.quantize.artifact.tensors import Grid, LogGrid

ROWS = {"attn.c_q": 32, "attn.c_k": 16, "attn.c_v": 16, "attn.proj": 32, "mlp.fc": 64, "mlp.proj": 32}


@pytest.fixture(scope="module")
def tensors() -> dict[str, Grid]:
  """All matrices of one layer, with seven equally likely values."""
  random = np.random.default_rng(0)
  grid = lambda rows: Grid(random.integers(-3, 4, (rows, 32)).astype(np.int8), np.ones(rows, np.float16))  # noqa: E731
  return {f"blocks.0.{name}.weight": grid(rows) for name, rows in ROWS.items()}


def test_whole_files_are_those_that_the_writer_makes(tensors):
  rows = compress.measure_files(tensors, 1)
  labels = [tuple(row.way.labels.values()) for row in rows]
  assert labels == [(do, codec) for do in ("encode", "decode", "dequantise") for codec in ("zstd", "entropy")]
  assert [row.facts for row in rows[:2]] == [len(writer.write({}, tensors, codec)) for codec in ("zstd", "entropy")]
  assert all(row.way.work.amount == 32 * sum(ROWS.values()) for row in rows)


def test_bytes_by_kind(tensors, monkeypatch):
  monkeypatch.setattr(compress.shutil, "which", lambda name: None)
  rows = compress.measure_kinds(tensors, 1)
  kinds = {row.way.labels["kind"] for row in rows}
  assert [row.way.labels["by"] for row in rows] == ["histogram", "zstd", "entropy"] * len(kinds)
  assert sum(row.way.work.amount for row in rows) == 3 * 32 * sum(ROWS.values())
  for row in rows:
    if row.way.labels["by"] == "histogram":
      assert row.facts == pytest.approx(row.way.work.amount * np.log2(7) / 8, rel=0.02)


def test_bytes_by_kind_of_matrices_with_steps_by_row_and_column(tensors, monkeypatch):
  """Of the integers of one of the grids."""
  monkeypatch.setattr(compress.shutil, "which", lambda name: None)
  steps = [np.zeros(32, np.int32), np.zeros(32, np.int32)]
  logs = {"blocks.0.attn.c_q.weight": LogGrid(tensors["blocks.0.attn.c_q.weight"].q_MxN.astype(np.int32), *steps)}
  histogram, zstd, entropy = compress.measure_kinds(logs, 1)
  assert histogram.facts == pytest.approx(32 * 32 * np.log2(7) / 8, rel=0.02)
  assert entropy.facts == pytest.approx(histogram.facts, rel=0.2) and zstd.facts > entropy.facts


def test_gptq_is_timed_with_and_without_compiling(tensors):
  with_compiling, compiled = compress.measure_gptq(tensors, 2)
  assert [len(row.seconds) for row in (with_compiling, compiled)] == [1, 2]
