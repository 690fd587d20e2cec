"""The global phase: SGD on all model weights over documents that have been scored. Recipe section 5."""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Integer

from pgolf_jax.model.context import packed, segments
from pgolf_jax.model.gpt import bind
from pgolf_jax.model.loss import nll
from pgolf_jax.model.params import Params
from pgolf_jax.runtime.mesh import AXIS, place
from pgolf_jax.scoring.documents import Document
from pgolf_jax.settings.config import ModelConfig, TTTConfig


class PhaseStep(NamedTuple):
  """One update: a packed row for each rank, and its learning rate."""

  tokens_RxT1: np.ndarray  # [ranks, T + 1], padded with 0
  targets_R: np.ndarray  # targets of each row
  lr: float


def join(tokens_N1: Integer[np.ndarray, "N1"], documents: Sequence[Document]) -> np.ndarray:
  """The phase's stream: documents end to end, each with the bos that follows it."""
  parts = [tokens_N1[d.start : d.start + d.length] for d in documents]
  return np.concatenate(parts) if parts else tokens_N1[:0]


def learning_rate(ttt: TTTConfig, chunk: int, chunks: int) -> float:
  """Linear warm-up, if any, then lr·½(1 + cos(π·i/(chunks − 1)))."""
  warmup = max(0, min(ttt.phase.warmup_chunks, chunks - 1))
  if chunk < warmup:
    start = ttt.phase.warmup_start_lr
    return start + (ttt.phase.lr - start) * chunk / max(warmup - 1, 1)
  return ttt.phase.lr * 0.5 * (1 + math.cos(math.pi * (chunk - warmup) / max(chunks - 1 - warmup, 1)))


def row_tokens(ttt: TTTConfig, seq_len: int, world: int) -> int:
  """Targets of the longest row that a rank gets in one update."""
  return min(-(-(ttt.phase.chunk_tokens // seq_len) // world), ttt.phase.batch_seqs) * seq_len


def phase_steps(ttt: TTTConfig, stream_N: np.ndarray, *, seq_len: int, world: int) -> Iterator[PhaseStep]:
  """The updates of one phase.

  Args:
    stream_N: what `join` gives.
    seq_len: rows are whole multiples of it; what is left of a chunk is not used.
    world: ranks among which a chunk's rows are shared out.
  """
  total, size = len(stream_N) - 1, ttt.phase.chunk_tokens
  chunks = -(-total // size)
  longest = row_tokens(ttt, seq_len, world)
  per_chunk = size // seq_len
  for chunk in range(chunks - 1):
    lr = learning_rate(ttt, chunk, chunks)
    ranks = [(per_chunk * r // world, per_chunk * (r + 1) // world) for r in range(world)]
    updates = -(-max(b - a for a, b in ranks) // ttt.phase.batch_seqs) if per_chunk else 0
    for _ in range(ttt.phase.epochs):
      for u in range(updates):
        tokens = np.zeros((world, longest + 1), np.int32)
        count = np.zeros(world, np.int32)
        for r, (a, b) in enumerate(ranks):
          first = a + u * ttt.phase.batch_seqs
          count[r] = max(min(b - first, ttt.phase.batch_seqs), 0) * seq_len
          begin = chunk * size + first * seq_len
          tokens[r, : count[r] + 1] = stream_N[begin : begin + count[r] + 1]
        yield PhaseStep(tokens, count, lr)


def _row_loss(model: ModelConfig, ttt: TTTConfig, params: Params, tokens_RxT1, targets_R, seq_len: int, dtype):
  """Sum over rows of each row's mean training loss."""
  inputs, targets = tokens_RxT1[:, :-1], tokens_RxT1[:, 1:]
  counted = jnp.arange(inputs.shape[1]) < targets_R[:, None]
  rows = inputs
  if ttt.phase.respect_documents:
    context = packed(rows, bos_id=model.bos_id, seq_len=seq_len, looping=True, dtype=dtype)
  else:
    rows = inputs.reshape(-1, seq_len)
    context = segments(jnp.zeros_like(rows), max_segment=seq_len, looping=True, dtype=dtype)
  loss_RxT = nll(bind(model, params), rows, targets.reshape(rows.shape), context).reshape(targets.shape)
  return jnp.sum(jnp.where(counted, loss_RxT, 0).sum(axis=1) / jnp.maximum(targets_R, 1))


def make_update(mesh: Mesh, model: ModelConfig, ttt: TTTConfig, *, seq_len: int, world: int, dtype):
  """The compiled update: (params, momentum, tokens, targets, lr) → (params, momentum, loss).

  The mean loss of every rank's row counts equally. The averaged gradient is clipped to `global_grad_clip`; then
  m ← μ·m + g, w ← w − lr·m. Ranks' rows are shared out over devices where their number allows it.
  """
  shared = world % mesh.size == 0

  def gradient(params, tokens, targets):
    loss, grads = jax.value_and_grad(lambda p: _row_loss(model, ttt, p, tokens, targets, seq_len, dtype) / world)(
      params
    )
    return jax.lax.psum((loss, grads), AXIS) if shared else (loss, grads)

  rows = P(AXIS) if shared else P()
  on_devices = jax.shard_map(gradient, mesh=mesh, in_specs=(P(), rows, rows), out_specs=P(), check_vma=False)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(params, momentum, tokens, targets, lr):
    loss, grads = on_devices(params, tokens, targets)
    if ttt.phase.grad_clip > 0:
      norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
      grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, ttt.phase.grad_clip / (norm + 1e-6)), grads)
    momentum = jax.tree.map(lambda m, g: ttt.phase.momentum * m + g, momentum, grads)
    return jax.tree.map(lambda p, m: p - lr * m, params, momentum), momentum, loss

  return update, rows


def arguments(mesh: Mesh, rows: P, step: PhaseStep) -> tuple:
  """A step's arrays on the mesh."""
  lr = place(mesh, np.float32(step.lr)[...], P())
  return place(mesh, step.tokens_RxT1, rows), place(mesh, step.targets_R, rows), lr
