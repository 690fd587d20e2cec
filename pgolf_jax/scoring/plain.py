"""Plain BPB: the validation stream in order, every target once, no adaptation. Recipe section 5."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Integer

from pgolf_jax.data.shards import ValidationData
from pgolf_jax.model import packed
from pgolf_jax.model.gpt import bind, packed_nll
from pgolf_jax.model.params import Params
from pgolf_jax.runtime import distributed
from pgolf_jax.runtime.distributed import AXIS, place, replicated, world_size
from pgolf_jax.runtime.log import progress
from pgolf_jax.settings import ModelConfig, Settings


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
  """Returns the total of `losses`, whose arguments these are; nats are added in float64.

  Args:
    nll_N: takes the nats of every target, in the stream's order, if given.
  """
  scored_N = losses(settings, params, data, mesh, description=description)
  if nll_N is not None:
    nll_N[:] = scored_N
  cut, _ = _cut(settings, len(scored_N), mesh)
  nats = sum(float(np.sum(scored_N[begin:end], dtype=np.float64)) for begin, end in cut)
  return Score(nats, len(scored_N), int(np.sum(data.token_bytes[1:], dtype=np.int64)))


def _cut(settings: Settings, targets: int, mesh: Mesh) -> tuple[list[tuple[int, int]], int]:
  """The spans of a stream, and the tokens of the longest that a longer stream would have."""
  seq_len = settings.eval.seq_len
  length = settings.eval.batch_tokens // settings.eval.micro_batches // seq_len * seq_len
  # A short text is not cut into as many parts as there are ranks: each part's first token would lack its context.
  ranks = min(world_size(settings, mesh), -(-targets // length))
  return spans(targets, ranks=ranks, length=length), length


def losses(
  settings: Settings, params: Params, data: ValidationData, mesh: Mesh, *, description: str = "scoring"
) -> Float32[np.ndarray, "N"]:
  """Scores every target of the stream once, with looping on, and returns the nats of each.

  The stream is shared out over the ranks of `train.world_size`, each share cut into spans of ⌊eval.batch_tokens /
  eval.micro_batches⌋ tokens, rounded down to a multiple of `eval.seq_len`, the longest segment; a span's first token
  has no context. The computation is in `train.compute_dtype`.

  Args:
    params: float32, under the recipe's names.
    mesh: has the axis `data`; spans are shared out over it.
    description: shown beside the progress.
  """
  nll_N = np.empty(len(data.tokens) - 1, np.float32)
  to_score, longest = _cut(settings, len(nll_N), mesh)
  # Powers of two, so that short texts of many lengths need few programs.
  longest = min(longest, 1 << (max(end - begin for begin, end in to_score) - 1).bit_length())
  nll = _program(settings.model, settings.eval.seq_len, settings.train.compute_dtype, mesh)
  params = jax.device_put(params, replicated(mesh))
  with progress(description, total=len(nll_N), unit="targets") as bar:
    for first in range(0, len(to_score), mesh.size):
      group = to_score[first : first + mesh.size]
      tokens = np.zeros((mesh.size, longest + 1), np.int32)
      for row, (begin, end) in zip(tokens, group, strict=False):
        row[: end - begin + 1] = data.tokens[begin : end + 1]
      for row, (begin, end) in zip(np.asarray(nll(params, place(mesh, tokens, P(AXIS)))), group, strict=False):
        nll_N[begin:end] = row[: end - begin]
      bar.advance(sum(end - begin for begin, end in group))
  return nll_N


@functools.lru_cache(maxsize=8)
def _program(config: ModelConfig, seq_len: int, dtype: str, mesh: Mesh):
  """(parameters, tokens of one row a device) → nats of every token of each row but the first."""

  def device_nll(params, tokens_RxT1):
    model = bind(config, params)
    row_nll = lambda row: packed_nll(  # noqa: E731
      model, row[None], looping=True, seq_len=seq_len, evaluation=True, dtype=jnp.dtype(dtype)
    )[0]
    return jax.lax.map(row_nll, tokens_RxT1)

  on_devices = jax.shard_map(device_nll, mesh=mesh, check_vma=False, in_specs=(P(), P(AXIS)), out_specs=P(AXIS))
  return jax.jit(on_devices, out_shardings=distributed.for_all_hosts(mesh))


def divergence(
  settings: Settings, params: Params, other: Params, rows_BxT: Integer[np.ndarray, "B T"], mesh: Mesh
) -> float:
  """Returns KL(params ‖ other) of the next token's distribution, in nats: the mean over all positions of the rows.

  Args:
    params: float32, under the recipe's names; `other` as well.
    rows_BxT: documents end to end, each row a segment.
    mesh: has the axis `data`; rows are shared out over it.
  """
  row_sums = _divergence(settings.model, settings.train.compute_dtype, mesh)
  params, other = jax.device_put((params, other), replicated(mesh))
  total = 0.0
  with progress("comparing distributions", total=len(rows_BxT), unit="rows") as bar:
    for first in range(0, len(rows_BxT), mesh.size):
      part = rows_BxT[first : first + mesh.size]
      tokens_BxT = np.zeros((mesh.size, rows_BxT.shape[1]), np.int32)
      tokens_BxT[: len(part)] = part
      sums_B = np.asarray(row_sums(params, other, place(mesh, tokens_BxT, P(AXIS))))
      total += float(np.sum(sums_B[: len(part)], dtype=np.float64))
      bar.advance(len(part))
  return total / rows_BxT.size


def row_divergence(
  config: ModelConfig, dtype: str, params: Params, other: Params, tokens_RxT: Integer[Array, "R T"]
) -> Float[Array, " R"]:
  """Returns KL(params ‖ other) of the next token's distribution in nats, added up over each row; differentiable."""
  form = {"seq_len": tokens_RxT.shape[1], "looping": True, "dtype": jnp.dtype(dtype)}
  context = packed(tokens_RxT, bos_id=config.bos_id, **form)
  models = (bind(config, values) for values in (params, other))
  logp, logq = (jax.nn.log_softmax(m.evaluation_logits(m(tokens_RxT, context).hidden)) for m in models)
  return jnp.sum(jnp.exp(logp) * (logp - logq), axis=(1, 2))


@functools.lru_cache(maxsize=8)
def _divergence(config: ModelConfig, dtype: str, mesh: Mesh):
  """(parameters, others, tokens of one row a device) → nats of KL, added up over each row."""

  on_devices = jax.shard_map(
    functools.partial(row_divergence, config, dtype),
    mesh=mesh,
    check_vma=False,
    in_specs=(P(), P(), P(AXIS)),
    out_specs=P(AXIS),
  )
  return jax.jit(on_devices, out_shardings=distributed.for_all_hosts(mesh))
