"""Plain BPB: the validation stream in order, every target once, no adaptation. Recipe section 5."""

import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pgolf_jax.data.shards import list_shards, read_shard
from pgolf_jax.errors import UserError
from pgolf_jax.model.gpt import bind
from pgolf_jax.model.loss import packed_nll
from pgolf_jax.model.params import Params
from pgolf_jax.runtime import distributed
from pgolf_jax.runtime.progress import progress
from pgolf_jax.settings.config import ModelConfig


class ValidationData(NamedTuple):
  tokens: np.ndarray  # [N + 1] token ids; targets are tokens[1:]
  token_bytes: np.ndarray  # [N + 1] bytes of original text that each token stands for


class Score(NamedTuple):
  """A total over targets."""

  nats: float
  targets: int
  text_bytes: int

  @property
  def loss(self) -> float:
    """Mean negative log-likelihood, nats per target."""
    return self.nats / self.targets

  @property
  def bpb(self) -> float:
    """Bits per byte of original text."""
    return self.nats / math.log(2) / self.text_bytes


def load_validation(folder: str | Path) -> ValidationData:
  """The validation stream of a data folder with its byte sidecar.

  Raises:
    UserError: a shard is damaged or missing, or the sidecar has another length than the tokens.
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


def spans(targets: int, *, ranks: int, batch_tokens: int, rows: int, seq_len: int) -> list[tuple[int, int]]:
  """(first, end) target of every span: shares of ⌊targets·r/ranks⌋, cut in ⌊batch_tokens/rows⌋ rounded to seq_len."""
  length = batch_tokens // rows // seq_len * seq_len
  found = []
  for rank in range(ranks):
    end = targets * (rank + 1) // ranks
    found += [(begin, min(begin + length, end)) for begin in range(targets * rank // ranks, end, length)]
  return found


def score(
  config: ModelConfig,
  params: Params,
  data: ValidationData,
  *,
  mesh: Mesh,
  ranks: int,
  batch_tokens: int,
  rows: int,
  seq_len: int,
  dtype=jnp.bfloat16,
  description: str = "scoring",
) -> Score:
  """Scores every target of the stream once, with looping on.

  Args:
    mesh: has the axis `data`; spans are shared out over it.
    ranks: shares of the stream, each cut into spans on its own; a span's first token has no context.
    batch_tokens, rows: a span has ⌊batch_tokens / rows⌋ tokens, rounded down to a multiple of seq_len.
    seq_len: longest segment, in tokens.
    dtype: of the computation.

  Returns:
    The total; nats are added in float64.
  """
  targets = len(data.tokens) - 1
  found = spans(targets, ranks=ranks, batch_tokens=batch_tokens, rows=rows, seq_len=seq_len)
  length = max(end - begin for begin, end in found)
  sharding = NamedSharding(mesh, P("data"))

  def device_nll(params, tokens_RxT1):
    row_nll = lambda row: packed_nll(  # noqa: E731
      bind(config, params), row[None], looping=True, seq_len=seq_len, evaluation=True, dtype=dtype
    )[0]
    return jax.lax.map(row_nll, tokens_RxT1)

  specs = {"in_specs": (P(), P("data")), "out_specs": P("data")}
  on_devices = jax.shard_map(device_nll, mesh=mesh, check_vma=False, **specs)
  nll = jax.jit(on_devices, out_shardings=distributed.for_all_hosts(mesh))
  params = jax.device_put(params, NamedSharding(mesh, P()))
  nats = 0.0
  with progress(description, total=targets, unit="targets") as bar:
    for first in range(0, len(found), mesh.size):
      group = found[first : first + mesh.size]
      tokens = np.zeros((mesh.size, length + 1), np.int32)
      for row, (begin, end) in zip(tokens, group, strict=False):
        row[: end - begin + 1] = data.tokens[begin : end + 1]
      placed = jax.make_array_from_callback(tokens.shape, sharding, lambda index, t=tokens: t[index])
      losses = np.asarray(nll(params, placed))
      for row, (begin, end) in zip(losses, group, strict=False):
        nats += float(np.sum(row[: end - begin], dtype=np.float64))
      bar.advance(sum(end - begin for begin, end in group))
  return Score(nats, targets, int(np.sum(data.token_bytes[1:], dtype=np.int64)))
