"""The training stream: spans of the ranks, the ends of shards, skipping, and continuing at a saved place."""

import logging

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


def test_a_last_shard_that_is_too_short_is_left_out_and_the_log_says_so(folder, caplog, monkeypatch):
  whole = Loader(folder, world_size=2, row_tokens=9)
  monkeypatch.setattr(logging.getLogger("pgolf"), "propagate", True)
  caplog.set_level(logging.INFO, "pgolf")
  for rest in (np.full(20, 1), np.full(500, 7)):  # one token less than a micro-batch from its bos on, and no bos
    rest[0] = 7
    write_shard(shard_path(folder, "train", 3), rest)
    loader = Loader(folder, world_size=2, row_tokens=9)
    whole.restore({"shard": 0, "cursor": 3})
    for _ in range(13):  # over the end of the last one
      np.testing.assert_array_equal(loader.micro_batch(), whole.micro_batch())
    assert "fineweb_train_000003.bin" in caplog.messages[-1] and "left out" in caplog.messages[-1]


@pytest.mark.parametrize(
  "fault, part", [(np.full(5, 1), "5 tokens are too few"), (np.full(90, 7), "no document starts")]
)
def test_any_other_shard_is_refused_at_once(folder, fault, part):
  write_shard(shard_path(folder, "train", 1), fault.astype(int))
  with pytest.raises(UserError, match=rf"fineweb_train_000001\.bin: {part}"):
    Loader(folder, world_size=2, row_tokens=9)


def test_a_token_outside_the_vocabulary_is_refused(folder):
  loader = Loader(folder, world_size=1, row_tokens=29, vocab_size=1092)
  assert [loader.micro_batch().max() for _ in range(2)] == [1032, 1062]
  with pytest.raises(UserError, match=r"000000\.bin holds token 1092, but model\.vocab_size=1092"):
    loader.micro_batch()


def test_errors_name_the_shard(folder):
  with pytest.raises(UserError, match=r"fineweb_train_000000\.bin: 100 tokens are too few"):
    Loader(folder, world_size=8, row_tokens=20)
  write_shard(shard_path(folder, "train", 0), np.full(100, 7))
  with pytest.raises(UserError, match="no document starts"):
    Loader(folder, world_size=1, row_tokens=4)
