"""`pgolf bench ngram` on a short stream."""

from pathlib import Path

import numpy as np
import pytest

from pgolf_jax.bench import ngram as bench
from pgolf_jax.data.shards import shard_path, write_shard
from pgolf_jax.errors import UserError
from pgolf_jax.kernels.ngram import NgramState


def test_rows_agree_with_each_other():
  rows = bench.measure(bench.random_stream(20_001), order=4, threads=(1, 2), repeats=1, published=None)
  assert [tuple(row.way.labels.values()) for row in rows] == [
    ("exact", "C", "1"),
    ("exact", "C", "2"),
    ("exact", "plain Python", "1"),
    ("reference", "C", "1"),
    ("reference", "C", "2"),
  ]
  assert [row.facts.agrees for row in rows] == [None, True, True, None, True]
  assert all(row.way.work.amount == 20_000 and row.facts.gated for row in rows)
  assert all(row.median > 0 and row.core_seconds[0] > 0 and row.roofline > 0 for row in rows)


def test_hints_that_differ_are_reported():
  hints = bench.Hints(np.array([1, 0, 2]), np.array([True, False, True]), None)
  firsts = {}
  assert bench._compare(firsts, "exact", hints) == bench.Facts(2, None, None)
  assert bench._compare(firsts, "exact", hints._replace(hint_N=np.array([1, 0]), gate_N=np.array([True, False]))).agrees
  assert not bench._compare(firsts, "exact", hints._replace(hint_N=np.array([1, 0, 3]))).agrees


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
def test_peak_memory_holds_the_counts_and_the_results():
  rows = bench.measure(bench.random_stream(1_000_001), order=16, threads=(1,), repeats=1, published=None)
  in_c = [row for row in rows if row.facts.state_bytes]
  assert len(in_c) == 2
  for row in in_c:
    assert row.facts.state_bytes < row.peak.num_bytes < 2 * row.facts.state_bytes + 5 * row.way.work.amount


def test_a_random_stream_repeats_as_often_as_text():
  tokens = bench.random_stream(200_000)
  _, gate = NgramState(16, threshold=1e-9).update(tokens)
  assert 0.02 < gate.mean() < 0.05
  assert tokens.max() < 8192


def test_reads_shards_in_order(tmp_path):
  stream = np.arange(3000, dtype=np.uint16)
  for split, index, part in [("train", 0, stream[:1000]), ("train", 1, stream[1000:2000]), ("val", 0, stream[2000:])]:
    write_shard(shard_path(tmp_path, split, index), part)
  np.testing.assert_array_equal(bench.read_stream(tmp_path, 2500), stream[:2500])
  with pytest.raises(UserError, match="holds 3,000 tokens"):
    bench.read_stream(tmp_path, 3001)


def test_a_file_that_is_not_the_published_one_is_refused(tmp_path):
  source = tmp_path / "other.c"
  source.write_text("int nothing(void) { return 0; }\n")
  with pytest.raises(UserError, match="no online_ngram_state_process_chunk"):
    bench.measure(np.arange(100), 2, (1,), 1, source)
  source.write_text("no C at all\n")
  with pytest.raises(UserError, match="did not compile"):
    bench.measure(np.arange(100), 2, (1,), 1, source)
