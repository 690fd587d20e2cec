"""The validation stream: tokens of the held-out documents laid end to end, with the bytes that each stands for."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer

from pgolf_jax.data.shards import list_shards, read_shard
from pgolf_jax.errors import UserError


class ValidationData(NamedTuple):
  """The validation stream.

  Attributes:
    tokens: token ids, of which all but the first are targets.
    token_bytes: UTF-8 bytes of original text that each token stands for.
  """

  tokens: Integer[np.ndarray, "N1"]
  token_bytes: Integer[np.ndarray, "N1"]


def load_validation(folder: str | Path) -> ValidationData:
  """Returns the validation stream of a data folder.

  Raises:
    UserError: a shard is damaged or missing, the sidecar has another length than the tokens, or there is no target.
  """
  tokens, token_bytes = (
    np.concatenate([np.asarray(read_shard(path)) for path in list_shards(Path(folder), split)]).astype(np.int32)
    for split in ("val", "val_bytes")
  )
  if len(tokens) != len(token_bytes):
    raise UserError(
      f"{folder}: {len(tokens)} validation tokens but {len(token_bytes)} sidecar entries; prepare the data again."
    )
  if len(tokens) < 2:
    raise UserError(f"{folder}: {len(tokens)} validation tokens leave nothing to predict; prepare the data again.")
  return ValidationData(tokens, token_bytes)
