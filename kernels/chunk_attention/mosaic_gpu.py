"""Attention of a chunk for Hopper GPUs, in Pallas' Mosaic GPU.

A block of 64 queries of one head walks over the blocks of 64 places of the ring that have been written, straight from
the ring of all layers, so that nothing is copied out of it; then over the blocks of the chunk's own keys up to itself.
As nothing is learnt through the ring, its part of the gradient is that of the queries alone: the gradient by keys and
values is that of a segment which begins with the chunk.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pgolf_jax.kernels import hopper
from pgolf_jax.kernels import hopper_attention as attention
from pgolf_jax.kernels.chunk_attention import Place, visible
from pgolf_jax.kernels.hopper_attention import (
  BLOCK,
  COMPILER,
  LOG2E,
  STAGES,
  filled,
  operand,
  padded,
  positions,
  product,
  rows_by,
)
from pgolf_jax.kernels.numerics import wide_product
from pgolf_jax.kernels.segment_attention.mosaic_gpu import key_gradients


def obstacle(q_BxXxHxC, k_BxXxKxC, v_BxXxKxC, ring, place, *, window: int) -> str | None:
  """Returns why this backend cannot compute the operation for these shapes and types, or None."""
  if ring.k.shape[3] % BLOCK:
    return f"it needs a ring of a multiple of {BLOCK} tokens, not {ring.k.shape[3]}"
  return attention.obstacle(q_BxXxHxC)


def chunk_attention(q_BxXxHxC, k_BxXxKxC, v_BxXxKxC, ring, place, *, window: int) -> jax.Array:
  """Returns the outputs. Chunks of any length are padded to whole blocks of 64 queries."""
  del window  # the kernels read from `place` how far the ring has been written
  where = jnp.stack([jnp.asarray(x, jnp.int32) for x in place])
  return _differentiable(q_BxXxHxC, k_BxXxKxC, v_BxXxKxC, *ring, where)


@jax.custom_vjp
def _differentiable(q, k, v, ring_k, ring_v, where):
  return _forward(q, k, v, ring_k, ring_v, where)[0]


def _forward(q, k, v, ring_k, ring_v, where):
  arguments = *map(padded, (q, k, v)), ring_k, ring_v, where
  y, lse = _attend_with_ring(*arguments)
  return y[:, : q.shape[1]], (*arguments, y, lse)


def _backward(residuals, dy):
  q, k, v, ring_k, ring_v, where, y, lse = residuals
  x, dy = dy.shape[1], padded(dy)
  delta = wide_product("bxhc,bxhc->bhx", y, dy)
  dq = _query_gradient_with_ring(q, k, v, ring_k, ring_v, where, dy, lse, delta)
  before = jnp.full(q.shape[:2], -1, jnp.int32)  # no query is alone: the ring is before them all
  dk, dv = key_gradients(q, k, v, before, dy, lse, delta)
  return dq[:, :x], dk[:, :x], dv[:, :x], None, None, None


_differentiable.defvjp(_forward, _backward)


def _over_keys(step, carry, k_ref, v_ref, ring_k_ref, ring_v_ref, where_ref, heads_of_a_key: int):
  """Walks over the keys that a thread block's queries may see, and returns the last carry.

  Args:
    step: (k, v, visible, carry) → carry, for a block of keys; visible tells which queries see which of them.
  """
  row, tile, head = lax.axis_index("row"), lax.axis_index("tile"), lax.axis_index("head")
  place, kv_head = Place(where_ref[0], where_ref[1], where_ref[2]), lax.div(head, heads_of_a_key)
  length, c = ring_k_ref.shape[3:]
  written = lax.div(lax.min(place.first, length) + BLOCK - 1, BLOCK)
  keys = plgpu.BlockSpec((BLOCK, c), lambda i: (i, 0), transforms=hopper.TILED)

  def walk(step, blocks, carry, *refs):
    pipeline = plgpu.emit_pipeline(
      step, grid=(blocks,), in_specs=[keys, keys], max_concurrent_steps=STAGES, init_carry=carry
    )
    return pipeline(*refs)

  def in_ring(index, k_smem, v_smem, carry):
    return step(k_smem, v_smem, visible(positions(index[0] * BLOCK, 1), place, length), carry)

  def in_chunk(index, k_smem, v_smem, carry):
    return step(k_smem, v_smem, positions(index[0] * BLOCK, 1) <= positions(tile * BLOCK, 0), carry)

  # One block at least: a pipeline of none is not defined. Of it nothing is visible then.
  rings = (x.at[place.position, kv_head, row] for x in (ring_k_ref, ring_v_ref))
  carry = walk(in_ring, lax.max(written, 1), carry, *rings)
  plgpu.commit_smem()  # all have read the last block before the next walk's copies may take its place
  return walk(in_chunk, tile + 1, carry, *(x.at[row, :, kv_head, :] for x in (k_ref, v_ref)))


@jax.jit
def _attend_with_ring(q, k, v, ring_k, ring_v, where):
  """Returns the outputs, and log2 Σ exp2 of each query's scores in units of log 2, [B, H, X] float32."""
  b, x, h, c = q.shape
  scale = LOG2E / math.sqrt(c)

  def kernel(q_ref, k_ref, v_ref, ring_k_ref, ring_v_ref, where_ref, y_ref, lse_ref, q_smem, lse_smem, arrived):
    row, tile, head = lax.axis_index("row"), lax.axis_index("tile"), lax.axis_index("head")
    queries = pl.ds(tile * BLOCK, BLOCK)
    plgpu.copy_gmem_to_smem(q_ref.at[row, queries, head], q_smem, arrived)
    plgpu.barrier_wait(arrived)

    def step(k_smem, v_smem, is_seen, carry):
      scores = jnp.where(is_seen, product(q_smem, k_smem.T, (BLOCK, BLOCK)), -jnp.inf)
      return attention.with_block(carry, scores, v_smem, scale)

    keys = k_ref, v_ref, ring_k_ref, ring_v_ref, where_ref
    sums, top, total = _over_keys(step, attention.nothing_seen(c), *keys, h // k.shape[2])
    q_smem[...] = (sums * rows_by(1 / total, sums.shape)).astype(q.dtype)
    lse_smem[...] = top + jnp.log(total) * LOG2E
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_smem, y_ref.at[row, queries, head])
    plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[row, head, queries])
    plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
    kernel,
    out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, h, x), jnp.float32)),
    scratch_types=(operand(c, q.dtype), plgpu.SMEM((BLOCK,), jnp.float32), plgpu.Barrier()),
    grid=(b, x // BLOCK, h),
    grid_names=("row", "tile", "head"),
    compiler_params=COMPILER,
  )(q, k, v, ring_k, ring_v, where)


@jax.jit
def _query_gradient_with_ring(q, k, v, ring_k, ring_v, where, dy, lse, delta):
  b, x, h, c = q.shape
  scale = 1 / math.sqrt(c)

  def kernel(
    q_ref, k_ref, v_ref, ring_k_ref, ring_v_ref, where_ref, dy_ref, lse_ref, delta_ref, dq_ref, q_smem, dy_smem, arrived
  ):
    row, tile, head = lax.axis_index("row"), lax.axis_index("tile"), lax.axis_index("head")
    queries = pl.ds(tile * BLOCK, BLOCK)
    plgpu.copy_gmem_to_smem(q_ref.at[row, queries, head], q_smem, arrived)
    plgpu.copy_gmem_to_smem(dy_ref.at[row, queries, head], dy_smem, arrived)
    lse = hopper.load(lse_ref.at[row, head, queries], hopper.BY_ROW)
    delta = hopper.load(delta_ref.at[row, head, queries], hopper.BY_ROW)
    plgpu.barrier_wait(arrived)

    def step(k_smem, v_smem, is_seen, dq):
      scores = jnp.where(is_seen, product(q_smem, k_smem.T, (BLOCK, BLOCK)), -jnp.inf)
      return attention.with_gradient(dq, scores, k_smem, v_smem, dy_smem, lse, delta, scale)

    keys = k_ref, v_ref, ring_k_ref, ring_v_ref, where_ref
    dq = _over_keys(step, filled((BLOCK, c), 0.0, hopper.MATRIX), *keys, h // k.shape[2])
    q_smem[...] = (dq * scale).astype(q.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_smem, dq_ref.at[row, queries, head])
    plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
    scratch_types=(operand(c, q.dtype), operand(c, q.dtype), plgpu.Barrier(num_arrivals=2)),
    grid=(b, x // BLOCK, h),
    grid_names=("row", "tile", "head"),
    compiler_params=COMPILER,
  )(q, k, v, ring_k, ring_v, where, dy, lse, delta)
