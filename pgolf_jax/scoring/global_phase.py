"""The global phase: SGD on all model weights over documents that have been scored. Recipe section 5."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Integer

from pgolf_jax.model import packed, segments
from pgolf_jax.model import params as parameters
from pgolf_jax.model.gpt import bind, nll
from pgolf_jax.model.params import Params
from pgolf_jax.runtime.distributed import AXIS, place, replicated, world_size
from pgolf_jax.scoring.documents import Document
from pgolf_jax.settings import PhaseConfig, Settings


class PhaseStep(NamedTuple):
  """One update: a packed row for each rank, and its learning rate."""

  tokens_RxT1: np.ndarray  # [ranks, T + 1], padded with 0
  targets_R: np.ndarray  # targets of each row
  lr: float


class PhaseState(NamedTuple):
  """What an update changes."""

  params: Params  # float32
  momentum: optax.OptState


def join(tokens_N1: Integer[np.ndarray, "N1"], documents: Sequence[Document]) -> np.ndarray:
  """Returns the phase's stream: documents end to end, each with the bos that follows it."""
  parts = [tokens_N1[d.start : d.start + d.length] for d in documents]
  return np.concatenate(parts) if parts else tokens_N1[:0]


def learning_rate(phase: PhaseConfig, chunk: int, chunks: int) -> float:
  """Linear warm-up, if any, then lr·½(1 + cos(π·i/(chunks − 1)))."""
  warmup = max(0, min(phase.warmup_chunks, chunks - 1))
  if chunk < warmup:
    start = phase.warmup_start_lr
    return start + (phase.lr - start) * chunk / max(warmup - 1, 1)
  return phase.lr * 0.5 * (1 + math.cos(math.pi * (chunk - warmup) / max(chunks - 1 - warmup, 1)))


def row_tokens(phase: PhaseConfig, seq_len: int, world: int) -> int:
  """Returns the targets of the longest row that a rank gets in one update."""
  return min(-(-(phase.chunk_tokens // seq_len) // world), phase.batch_seqs) * seq_len


def phase_steps(phase: PhaseConfig, stream_N: np.ndarray, *, seq_len: int, world: int) -> Iterator[PhaseStep]:
  """Yields the updates of one phase.

  Args:
    stream_N: what `join` returns.
    seq_len: rows are whole multiples of it; the rest of a chunk is not used.
    world: ranks among which a chunk's rows are shared out.
  """
  total, size = len(stream_N) - 1, phase.chunk_tokens
  chunks = -(-total // size)
  longest = row_tokens(phase, seq_len, world)
  per_chunk = size // seq_len
  for chunk in range(chunks - 1):
    lr = learning_rate(phase, chunk, chunks)
    ranks = [(per_chunk * r // world, per_chunk * (r + 1) // world) for r in range(world)]
    updates = -(-max(b - a for a, b in ranks) // phase.batch_seqs) if per_chunk else 0
    for _ in range(phase.epochs):
      for u in range(updates):
        tokens = np.zeros((world, longest + 1), np.int32)
        count = np.zeros(world, np.int32)
        for r, (a, b) in enumerate(ranks):
          first = a + u * phase.batch_seqs
          count[r] = max(min(b - first, phase.batch_seqs), 0) * seq_len
          begin = chunk * size + first * seq_len
          tokens[r, : count[r] + 1] = stream_N[begin : begin + count[r] + 1]
        yield PhaseStep(tokens, count, lr)


class GlobalPhase:
  """Updates of all weights, on a mesh that need not exist until they run.

  The mean loss of every rank's row counts equally. The averaged gradient is clipped to the norm `ttt.phase.grad_clip`;
  then m ← μ·m + g, w ← w − lr·m. Ranks' rows are shared out over devices where their number allows it.
  """

  def __init__(self, settings: Settings, mesh: Mesh):
    self._settings, self._mesh = settings, mesh
    phase = settings.ttt.phase
    self.seq_len, self.world = settings.eval.seq_len, world_size(settings, mesh)
    self.row_tokens = row_tokens(phase, self.seq_len, self.world)
    is_shared = self.world % mesh.size == 0
    self._row_spec = P(AXIS) if is_shared else P()
    clip = optax.clip_by_global_norm(phase.grad_clip) if phase.grad_clip > 0 else optax.identity()
    optimizer = optax.chain(clip, optax.trace(phase.momentum))

    def gradient(params, tokens_RxT1, targets_R):
      loss, grads = jax.value_and_grad(self._loss)(params, tokens_RxT1, targets_R)
      return jax.lax.psum((loss, grads), AXIS) if is_shared else (loss, grads)

    specs = (P(), self._row_spec, self._row_spec)
    on_devices = jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)

    def update(state: PhaseState, step: PhaseStep) -> tuple[PhaseState, jax.Array]:
      loss, grads = on_devices(state.params, step.tokens_RxT1, step.targets_R)
      direction, momentum = optimizer.update(grads, state.momentum)
      params = jax.tree.map(lambda p, m: p - step.lr * m, state.params, direction)
      return PhaseState(params, momentum), loss

    self._update = jax.jit(update, donate_argnums=0)
    self._compiled: jax.stages.Compiled | None = None
    self._init = jax.jit(optimizer.init, out_shardings=replicated(mesh))

  def _loss(self, params: Params, tokens_RxT1: jax.Array, targets_R: jax.Array) -> jax.Array:
    """The mean loss of each of this device's rows, their sum divided by the number of ranks."""
    model, dtype = self._settings.model, jnp.dtype(self._settings.train.compute_dtype)
    inputs, targets = tokens_RxT1[:, :-1], tokens_RxT1[:, 1:]
    if self._settings.ttt.phase.respect_documents:
      rows = inputs
      context = packed(rows, bos_id=model.bos_id, seq_len=self.seq_len, looping=True, dtype=dtype)
    else:
      rows = inputs.reshape(-1, self.seq_len)
      context = segments(jnp.zeros_like(rows), max_segment=self.seq_len, looping=True, dtype=dtype)
    loss_RxT = nll(bind(model, params), rows, targets.reshape(rows.shape), context).reshape(targets.shape)
    counted = jnp.arange(inputs.shape[1]) < targets_R[:, None]
    mean_R = jnp.where(counted, loss_RxT, 0).sum(axis=1) / jnp.maximum(targets_R, 1)
    return jnp.sum(mean_R) / self.world

  def abstract(self) -> tuple[PhaseState, PhaseStep]:
    """Returns an update's arguments as shapes with their shardings."""
    everywhere, by_row = replicated(self._mesh), NamedSharding(self._mesh, self._row_spec)
    params = {
      name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=everywhere)
      for name, shape in parameters.shapes(self._settings.model).items()
    }
    momentum = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), jax.eval_shape(self._init, params)
    )
    step = PhaseStep(
      jax.ShapeDtypeStruct((self.world, self.row_tokens + 1), jnp.int32, sharding=by_row),
      jax.ShapeDtypeStruct((self.world,), jnp.int32, sharding=by_row),
      jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere),
    )
    return PhaseState(params, momentum), step

  def trace(self) -> jax.stages.Traced:
    """Traces an update from shapes alone."""
    return self._update.trace(*self.abstract())

  def compile(self, params: Params) -> None:
    """Compiles an update, and the beginning of a phase; off the CPU both run once, on random tokens.

    Args:
      params: float32, on the mesh; only read.
    """
    if self._compiled is not None:
      return
    self._compiled = self.trace().lower().compile()
    momentum = self._init(params)
    if self._mesh.devices.flat[0].platform == "cpu":
      return  # nothing is loaded or tuned at the first run there
    tokens = np.random.default_rng(0).integers(0, 64, (self.world, self.row_tokens + 1), dtype=np.int32)
    step = PhaseStep(tokens, np.full(self.world, self.row_tokens, np.int32), 0.0)
    state = PhaseState(jax.tree.map(jnp.copy, params), momentum)
    jax.block_until_ready(self._compiled(state, self._place(step)))

  def run(self, params: Params, stream_N: np.ndarray) -> Params:
    """Returns the weights after a phase over this stream; those given are donated."""
    if not self.row_tokens:  # a chunk is shorter than a row
      return params
    state = PhaseState(params, self._init(params))
    for step in phase_steps(self._settings.ttt.phase, stream_N, seq_len=self.seq_len, world=self.world):
      state, _ = self._compiled(state, self._place(step))
    return jax.block_until_ready(state.params)

  def _place(self, step: PhaseStep) -> PhaseStep:
    return PhaseStep(
      place(self._mesh, step.tokens_RxT1, self._row_spec),
      place(self._mesh, step.targets_R, self._row_spec),
      place(self._mesh, np.float32(step.lr)[...], P()),
    )
