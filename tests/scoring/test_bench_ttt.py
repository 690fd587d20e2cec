"""The benchmark of test-time training counts and times what it says."""

from ttt_case import SETTINGS, changed, random_documents

from pgolf_jax.bench import ttt
from pgolf_jax.data.shards import shard_path, write_shard


def test_measures(tmp_path):
  data = random_documents([30, 9, 75, 41, 22, 60])
  write_shard(shard_path(tmp_path, "val", 0), data.tokens)
  write_shard(shard_path(tmp_path, "val_bytes", 0), data.token_bytes)
  row = ttt.measure(changed(SETTINGS, method="cached"), tmp_path, "cached", 4)
  assert row.tokens == 9 + 22 + 41 + 75 - 1
  assert 0 < row.one_shape_share <= row.useful_share <= 1
  assert 0 < row.outside_share < 1
  assert row.flops_per_second > 0
  assert row.seconds > 0 and row.compile_seconds > 0
  assert row.shapes == 1
