"""`pgolf bench ngram` on a short stream."""

from pathlib import Path

import numpy as np
import pytest

from pgolf_jax.bench import ngram as bench
from pgolf_jax.data.shards import shard_path, write_shard
from pgolf_jax.errors import UserError
from pgolf_jax.kernels.ngram import NgramState


def test_rows_agree_with_each_other():
  tokens = bench.made_up_stream(20_001)
  rows = bench.measure(tokens, order=4, threads=(1, 2), repeats=1, published=None)
  assert [(row.what, row.threads) for row in rows] == [
    ("exact, C", 1),
    ("exact, C", 2),
    ("exact, plain Python", 1),
    ("reference, C", 1),
    ("reference, C", 2),
  ]
  assert [row.agrees for row in rows] == [None, True, True, None, True]
  assert all(row.targets == 20_000 and row.gated for row in rows)
  assert all(row.median >= row.best > 0 and row.core_seconds > 0 for row in rows)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
def test_peak_memory_holds_the_counts_and_the_results():
  rows = bench.measure(bench.made_up_stream(1_000_001), order=16, threads=(1,), repeats=1, published=None)
  ours = [row for row in rows if row.state_bytes]
  assert len(ours) == 2
  assert all(row.state_bytes < row.peak_bytes < 2 * row.state_bytes + 5 * row.targets for row in ours)


def test_made_up_stream_repeats_as_often_as_text():
  tokens = bench.made_up_stream(200_000)
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
