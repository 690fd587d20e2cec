"""Attention of a chunk for Hopper GPUs, in Pallas' Mosaic GPU.

A block of 64 queries walks over the blocks of 64 places of the ring that have been written, straight from the ring of
all layers, so that nothing is copied out of it; then over the blocks of the chunk's own keys up to itself. As nothing
is learnt through the ring, its part of the gradient is that of the queries alone: the gradient by keys and values is
that of a segment which begins with the chunk.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pgolf_jax.kernels import hopper_attention as attention
from pgolf_jax.kernels.chunk_attention import Place, visible
from pgolf_jax.kernels.hopper_attention import BLOCK, HEADS, STAGES, heads_together, padded, positions
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
  dq, delta = _query_gradient_with_ring(q, y, dy, lse, k, v, ring_k, ring_v, where)
  before = jnp.full(q.shape[:2], -1, jnp.int32)  # a query that sees one key is zero already
  dk, dv = key_gradients(q, k, v, before, dy, lse, delta)
  return dq[:, :x], dk[:, :x], dv[:, :x], None, None, None


_differentiable.defvjp(_forward, _backward)


def _keys(blocks_of_a_key: int):
  """Returns `keys` of the shared kernels: blocks of the ring that have been written, then the chunk's own.

  Args:
    blocks_of_a_key: thread blocks side by side whose query heads share a key's head.
  """

  def keys(k_ref, v_ref, ring_k_ref, ring_v_ref, where_ref):
    row, tile = lax.axis_index("row"), lax.axis_index("tile")
    kv_head = lax.div(lax.axis_index("heads"), blocks_of_a_key)
    place = Place(where_ref[0], where_ref[1], where_ref[2])
    length = ring_k_ref.shape[3]
    written = lax.div(lax.min(place.first, length) + BLOCK - 1, BLOCK)
    rings = [x.at[place.position, kv_head, row] for x in (ring_k_ref, ring_v_ref)]
    own = [x.at[row, :, kv_head, :] for x in (k_ref, v_ref)]

    def walk(step, carry):
      def in_ring(i, k_smem, v_smem, carry):
        is_seen = visible(positions(i * BLOCK, 1), place, length)
        return step(k_smem, v_smem, lambda scores: jnp.where(is_seen, scores, -jnp.inf), carry)

      def in_chunk(i, k_smem, v_smem, carry):
        is_seen = positions(i * BLOCK, 1) <= positions(tile * BLOCK, 0)
        return step(k_smem, v_smem, lambda scores: jnp.where(is_seen, scores, -jnp.inf), carry)

      # One block at least: a pipeline of none is not defined. Of it nothing is visible then.
      carry = attention.over_blocks(in_ring, 0, lax.max(written, 1), carry, rings, STAGES)
      plgpu.commit_smem()  # all have read the last block before the next walk's copies may take its place
      return attention.over_blocks(in_chunk, 0, tile + 1, carry, own, STAGES)

    return walk

  return keys


@jax.jit
def _attend_with_ring(q, k, v, ring_k, ring_v, where):
  heads = heads_together(HEADS, q, k)
  return attention.attend(_keys(q.shape[2] // k.shape[2] // heads), heads, q, k, v, ring_k, ring_v, where)


@jax.jit
def _query_gradient_with_ring(q, y, dy, lse, k, v, ring_k, ring_v, where):
  heads = heads_together(HEADS, q, k)
  keys = _keys(q.shape[2] // k.shape[2] // heads)
  return attention.query_gradient(keys, heads, q, y, dy, lse, k, v, ring_k, ring_v, where)
