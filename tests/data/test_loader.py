"""The training stream: spans of the ranks, the ends of shards, skipping, and continuing at a saved place."""

import numpy as np
import pytest

from pgolf_jax.data.loader import Loader
from pgolf_jax.data.shards import shard_path, write_shard
from pgolf_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
  """Three shards of 100, 90 and 80 distinct tokens; each has its first bos at 3."""
  for index, size in enumerate((100, 90, 80)):
    tokens = 1000 * (index + 1) + np.arange(size)
    tokens[3] = 1
    write_shard(shard_path(tmp_path, "train", index), tokens)
  return tmp_path


def test_ranks_take_consecutive_spans_from_the_first_bos(folder):
  rows = Loader(folder, world_size=2, row_tokens=4).micro_batch()
  assert rows.tolist() == [[1, 1004, 1005, 1006, 1007], [1008, 1009, 1010, 1011, 1012]]


def test_a_step_keeps_the_rows_of_a_rank_together(folder):
  rows = Loader(folder, world_size=2, row_tokens=4).step(2)
  assert rows[:, -1].tolist() == [1007, 1017, 1012, 1022]


def test_a_shard_is_left_where_all_spans_together_would_cross_its_end(folder):
  loader = Loader(folder, world_size=2, row_tokens=9)
  starts = [int(loader.micro_batch()[0, 1]) for _ in range(13)]
  # 97, 87 and 77 tokens hold 4, 4 and 3 micro-batches of 20; after the last shard comes the first.
  assert [s // 1000 for s in starts] == [1] * 4 + [2] * 4 + [3] * 3 + [1] * 2


def test_skipping_is_reading(folder):
  read, skipped = (Loader(folder, world_size=1, row_tokens=30) for _ in range(2))
  for _ in range(5):
    read.micro_batch()
  skipped.skip(5)
  assert read.state() == skipped.state()


def test_state_continues_the_stream(folder):
  loader = Loader(folder, world_size=2, row_tokens=9)
  loader.skip(6)
  other = Loader(folder, world_size=2, row_tokens=9)
  other.restore(loader.state())
  assert all(np.array_equal(loader.micro_batch(), other.micro_batch()) for _ in range(8))


def test_errors_name_the_shard(folder):
  with pytest.raises(UserError, match=r"fineweb_train_000000\.bin: 100 tokens are too few"):
    Loader(folder, world_size=8, row_tokens=20)
  write_shard(shard_path(folder, "train", 0), np.full(100, 7))
  with pytest.raises(UserError, match="no document starts"):
    Loader(folder, world_size=1, row_tokens=4)
