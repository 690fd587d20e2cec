"""The validation stream: all shards laid end to end, and what is refused."""

import numpy as np
import pytest

from pgolf_jax.data.shards import load_validation, shard_path, write_shard
from pgolf_jax.errors import UserError


def write(folder, split, *shards):
  for index, values in enumerate(shards):
    write_shard(shard_path(folder, split, index), np.array(values, np.int64))


def test_shards_are_laid_end_to_end(tmp_path):
  write(tmp_path, "val", [1, 40_000, 7], [1, 65_535])
  write(tmp_path, "val_bytes", [0, 3, 2], [0, 60_000])
  data = load_validation(tmp_path)
  assert data.tokens.dtype == data.token_bytes.dtype == np.int32
  assert data.tokens.tolist() == [1, 40_000, 7, 1, 65_535]
  assert data.token_bytes.tolist() == [0, 3, 2, 0, 60_000]


def test_a_sidecar_of_another_length_is_refused(tmp_path):
  write(tmp_path, "val", [1, 2, 3])
  write(tmp_path, "val_bytes", [0, 1])
  with pytest.raises(UserError, match="3 validation tokens but 2 sidecar entries"):
    load_validation(tmp_path)


@pytest.mark.parametrize("tokens", [[], [1]])
def test_a_stream_without_a_target_is_refused(tmp_path, tokens):
  write(tmp_path, "val", tokens)
  write(tmp_path, "val_bytes", [0] * len(tokens))
  with pytest.raises(UserError, match="leave nothing to predict"):
    load_validation(tmp_path)


def test_a_missing_sidecar_is_named(tmp_path):
  write(tmp_path, "val", [1, 2])
  with pytest.raises(UserError, match="no fineweb_val_bytes_"):
    load_validation(tmp_path)
