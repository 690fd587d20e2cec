"""Plain BPB: the validation stream in order, every target once, no adaptation. Recipe section 5."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pgolf_jax.data.shards import ValidationData
from pgolf_jax.model.gpt import bind, packed_nll
from pgolf_jax.model.params import Params
from pgolf_jax.runtime import distributed
from pgolf_jax.runtime.distributed import AXIS, place, replicated, world_size
from pgolf_jax.runtime.log import progress
from pgolf_jax.settings import Settings


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


def spans(targets: int, *, ranks: int, length: int) -> list[tuple[int, int]]:
  """Returns (first, end) target of every span: each rank's share, ⌊targets·r/ranks⌋, cut into this length."""
  cut = []
  for rank in range(ranks):
    end = targets * (rank + 1) // ranks
    cut += [(begin, min(begin + length, end)) for begin in range(targets * rank // ranks, end, length)]
  return cut


def score(
  settings: Settings,
  params: Params,
  data: ValidationData,
  mesh: Mesh,
  *,
  description: str = "scoring",
  nll_N: np.ndarray | None = None,
) -> Score:
  """Scores every target of the stream once, with looping on.

  The stream is shared out over the ranks of `train.world_size`, each share cut into spans of ⌊eval.batch_tokens /
  eval.micro_batches⌋ tokens, rounded down to a multiple of `eval.seq_len`, the longest segment; a span's first token
  has no context. The computation is in `train.compute_dtype`.

  Args:
    params: float32, under the recipe's names.
    mesh: has the axis `data`; spans are shared out over it.
    description: shown beside the progress.
    nll_N: takes the nats of every target, in the stream's order, if given.

  Returns:
    The total; nats are added in float64.
  """
  targets, seq_len = len(data.tokens) - 1, settings.eval.seq_len
  span = settings.eval.batch_tokens // settings.eval.micro_batches // seq_len * seq_len
  to_score = spans(targets, ranks=world_size(settings, mesh), length=span)
  longest = max(end - begin for begin, end in to_score)
  dtype = jnp.dtype(settings.train.compute_dtype)

  def device_nll(params, tokens_RxT1):
    model = bind(settings.model, params)
    row_nll = lambda row: packed_nll(  # noqa: E731
      model, row[None], looping=True, seq_len=seq_len, evaluation=True, dtype=dtype
    )[0]
    return jax.lax.map(row_nll, tokens_RxT1)

  on_devices = jax.shard_map(device_nll, mesh=mesh, check_vma=False, in_specs=(P(), P(AXIS)), out_specs=P(AXIS))
  nll = jax.jit(on_devices, out_shardings=distributed.for_all_hosts(mesh))
  params = jax.device_put(params, replicated(mesh))
  nats = 0.0
  with progress(description, total=targets, unit="targets") as bar:
    for first in range(0, len(to_score), mesh.size):
      group = to_score[first : first + mesh.size]
      tokens = np.zeros((mesh.size, longest + 1), np.int32)
      for row, (begin, end) in zip(tokens, group, strict=False):
        row[: end - begin + 1] = data.tokens[begin : end + 1]
      losses = np.asarray(nll(params, place(mesh, tokens, P(AXIS))))
      for row, (begin, end) in zip(losses, group, strict=False):
        if nll_N is not None:
          nll_N[begin:end] = row[: end - begin]
        nats += float(np.sum(row[: end - begin], dtype=np.float64))
      bar.advance(sum(end - begin for begin, end in group))
  return Score(nats, targets, int(np.sum(data.token_bytes[1:], dtype=np.int64)))
