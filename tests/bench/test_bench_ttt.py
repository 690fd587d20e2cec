"""The benchmark of test-time training counts and times what it says."""

from ttt_case import SETTINGS, random_documents

from pgolf_jax.bench import ttt
from pgolf_jax.data.shards import shard_path, write_shard


def test_measures(tmp_path):
  data = random_documents([30, 9, 75, 41, 22, 60])
  write_shard(shard_path(tmp_path, "val", 0), data.tokens)
  write_shard(shard_path(tmp_path, "val_bytes", 0), data.token_bytes)
  exact, cached = ttt.measure(SETTINGS, tmp_path, ("exact", "cached"), 4, repeats=2)
  for row in (exact, cached):
    assert row.way.work.amount == 9 + 22 + 41 + 75 - 1
    assert 0 < row.facts.one_shape_share <= row.facts.useful_share <= 1
    assert 0 < row.facts.outside_share < 1
    assert row.facts.flops_per_second > 0
    assert all(row.seconds > 0) and row.facts.compile_seconds > 0
    assert row.facts.shapes == 1
  assert cached.ratio > 0
