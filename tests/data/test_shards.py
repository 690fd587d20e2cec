"""Shards on disk: what is written is read back, and every way in which a file can be wrong is named."""

import numpy as np
import pytest

from pgolf_jax.data.shards import HEADER_WORDS, list_shards, read_count, read_shard, shard_path, write_shard
from pgolf_jax.errors import UserError


@pytest.fixture
def shard(tmp_path):
  path = shard_path(tmp_path, "train", 3)
  write_shard(path, np.arange(1000))
  return path


def patch(path, word, value):
  header = np.memmap(path, "<i4", mode="r+", shape=(HEADER_WORDS,))
  header[word] = value
  header.flush()


def test_layout_is_the_published_one(shard):
  raw = shard.read_bytes()
  assert shard.name == "fineweb_train_000003.bin"
  assert np.frombuffer(raw[:1024], "<i4").tolist() == [20240520, 1, 1000] + [0] * 253
  assert np.frombuffer(raw[1024:], "<u2").tolist() == list(range(1000))


def test_read_back(shard):
  tokens = read_shard(shard)
  assert tokens.dtype == np.uint16 and tokens.tolist() == list(range(1000))
  assert not tokens.flags.writeable


@pytest.mark.parametrize("count", [0, 1])
def test_smallest_shards(tmp_path, count):
  path = tmp_path / "fineweb_val_000000.bin"
  write_shard(path, np.full(count, 65535))
  assert read_shard(path).tolist() == [65535] * count


def test_listing_is_in_name_order_and_keeps_splits_apart(tmp_path):
  for split, index in [("val", 1), ("val_bytes", 0), ("val", 0), ("train", 10), ("train", 9)]:
    write_shard(shard_path(tmp_path, split, index), np.arange(2))
  (tmp_path / "fineweb_train_000011.bin.partial").touch()
  assert [path.name for path in list_shards(tmp_path, "train")] == [
    "fineweb_train_000009.bin",
    "fineweb_train_000010.bin",
  ]
  assert [path.name for path in list_shards(tmp_path, "val")] == [
    "fineweb_val_000000.bin",
    "fineweb_val_000001.bin",
  ]
  assert [path.name for path in list_shards(tmp_path, "val_bytes")] == ["fineweb_val_bytes_000000.bin"]


@pytest.mark.parametrize(
  "word, value, message",
  [
    (0, 20240521, "20240521.*20240520"),
    (1, 2, "version 2.*version 1"),
    (2, 999, "3024.*999.*3022"),
    (2, -1, "-1"),
  ],
)
def test_wrong_header_names_file_and_both_numbers(shard, word, value, message):
  patch(shard, word, value)
  for read in (read_count, read_shard):
    with pytest.raises(UserError, match=rf"fineweb_train_000003\.bin: .*{message}"):
      read(shard)


@pytest.mark.parametrize("size, message", [(3023, "3023 bytes.*3024"), (1023, "1023 bytes.*1024"), (0, "0 bytes")])
def test_truncated_file_is_refused(shard, size, message):
  shard.write_bytes(shard.read_bytes()[:size])
  with pytest.raises(UserError, match=message):
    read_shard(shard)


def test_missing_file_and_folder(tmp_path):
  with pytest.raises(UserError, match=r"nothing\.bin"):
    read_shard(tmp_path / "nothing.bin")
  with pytest.raises(UserError, match="no such folder"):
    list_shards(tmp_path / "nowhere", "train")
  with pytest.raises(UserError, match="fineweb_val_"):
    list_shards(tmp_path, "val")
  with pytest.raises(UserError, match="choose one of train"):
    list_shards(tmp_path, "test")


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("tokens", [[65536], [-1, 3], [[1, 2]]])
def test_values_that_do_not_fit_are_refused(tmp_path, tokens):
  with pytest.raises(UserError):
    write_shard(tmp_path / "x.bin", np.array(tokens))
  assert not list(tmp_path.iterdir())
