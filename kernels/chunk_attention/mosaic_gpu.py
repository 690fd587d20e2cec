"""Attention of a chunk for Hopper GPUs, in Pallas' Mosaic GPU.

What is long, the ring, is walked over by kernels: a block of 64 queries of one head takes the blocks of 64 places that
have been written, straight from the ring of all layers, so that nothing is copied out of it. The chunk's own square of
keys is left to XLA, and the two are joined by their sums. As nothing is learnt through the ring, its part of the
gradient is that of the queries alone.
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
  positions,
  product,
  rows_by,
)
from pgolf_jax.kernels.numerics import wide_product


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
  earlier, earlier_lse = _attend(attention.padded(q), ring_k, ring_v, where)
  scores, _, values = _itself(q, k, v)
  top = jnp.maximum(earlier_lse[..., : q.shape[1]], scores.max(axis=-1))
  shares = jnp.exp2(earlier_lse[..., : q.shape[1]] - top), jnp.exp2(scores - top[..., None])
  lse = top + jnp.log2(shares[0] + shares[1].sum(axis=-1))
  p = jnp.exp2(scores - lse[..., None]).astype(q.dtype)
  weight = jnp.exp2(earlier_lse[..., : q.shape[1]] - lse).swapaxes(1, 2)[..., None]
  y = weight * earlier[:, : q.shape[1]] + wide_product("bhxs,bshc->bxhc", p, values)
  y = y.astype(q.dtype)
  return y, (q, k, v, ring_k, ring_v, where, y, lse)


def _backward(residuals, dy):
  q, k, v, ring_k, ring_v, where, y, lse = residuals
  x, scale = q.shape[1], q.shape[3] ** -0.5
  delta = wide_product("bxhc,bxhc->bhx", y, dy)
  padded = attention.padded(q), attention.padded(dy), *(_padded_rows(each) for each in (lse, delta))
  dq = _query_gradient(*padded, ring_k, ring_v, where)[:, :x].astype(jnp.float32)
  scores, keys, values = _itself(q, k, v)
  p = jnp.exp2(scores - lse[..., None])
  ds = (p * (wide_product("bxhc,bshc->bhxs", dy, values) - delta[..., None]) * scale).astype(q.dtype)
  dq += wide_product("bhxs,bshc->bxhc", ds, keys)
  dk, dv = (wide_product("bhxs,bxhc->bshc", *pair) for pair in ((ds, q), (p.astype(q.dtype), dy)))
  dk, dv = (each.reshape(*k.shape[:3], -1, k.shape[3]).sum(axis=3) for each in (dk, dv))
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


_differentiable.defvjp(_forward, _backward)


def _itself(q, k, v) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns a chunk's scores by its own keys, [B, H, X, X] in units of log 2, and its keys and values for each head."""
  keys, values = (jnp.repeat(each, q.shape[2] // k.shape[2], axis=2) for each in (k, v))
  scores = wide_product("bxhc,bshc->bhxs", q, keys) * (LOG2E / math.sqrt(q.shape[3]))
  return jnp.where(jnp.tri(q.shape[1], dtype=bool), scores, -jnp.inf), keys, values


def _padded_rows(x_BxHxX: jax.Array) -> jax.Array:
  return jnp.pad(x_BxHxX, ((0, 0), (0, 0), (0, -x_BxHxX.shape[2] % BLOCK)))


def _written_blocks(place: Place, ring_length: int) -> jax.Array:
  """Returns how many blocks of the ring have been written to, but one at least."""
  return lax.max(lax.div(lax.min(place.first, ring_length) + BLOCK - 1, BLOCK), 1)


@jax.jit
def _attend(q, ring_k, ring_v, where):
  """Returns the outputs over the ring alone, and log2 Σ exp2 of the scores in units of log 2, [B, H, X] float32.

  Where nothing is visible these are 0 and −∞.
  """
  b, x, h, c = q.shape
  kv_heads, length = ring_k.shape[1], ring_k.shape[3]
  scale = LOG2E / math.sqrt(c)

  def kernel(q_ref, k_ref, v_ref, where_ref, y_ref, lse_ref, q_smem, lse_smem, arrived):
    row, tile, head = lax.axis_index("row"), lax.axis_index("tile"), lax.axis_index("head")
    place, queries = Place(where_ref[0], where_ref[1], where_ref[2]), pl.ds(tile * BLOCK, BLOCK)
    plgpu.copy_gmem_to_smem(q_ref.at[row, queries, head], q_smem, arrived)
    plgpu.barrier_wait(arrived)

    def step(index, k_smem, v_smem, carry):
      scores = product(q_smem, k_smem.T, (BLOCK, BLOCK))
      return attention.with_block(carry, _seen(scores, index[0], place, length), v_smem, scale)

    keys = plgpu.BlockSpec((BLOCK, c), lambda i: (i, 0), transforms=hopper.TILED)
    kv_head = lax.div(head, h // kv_heads)
    sums, top, total = plgpu.emit_pipeline(
      step,
      grid=(_written_blocks(place, length),),
      in_specs=[keys, keys],
      max_concurrent_steps=STAGES,
      init_carry=attention.nothing_seen(c),
    )(k_ref.at[place.position, kv_head, row], v_ref.at[place.position, kv_head, row])

    q_smem[...] = (sums * rows_by(jnp.where(total > 0, 1 / total, 0.0), sums.shape)).astype(q.dtype)
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
  )(q, ring_k, ring_v, where)


def _seen(scores, block, place: Place, ring_length: int):
  """Returns the scores of a block of the ring, −∞ where its keys are not visible."""
  return jnp.where(visible(positions(block * BLOCK, 1), place, ring_length), scores, -jnp.inf)


@jax.jit
def _query_gradient(q, dy, lse, delta, ring_k, ring_v, where):
  """Returns the ring's part of the queries' gradient."""
  b, x, h, c = q.shape
  kv_heads, length = ring_k.shape[1], ring_k.shape[3]
  scale = 1 / math.sqrt(c)

  def kernel(q_ref, dy_ref, lse_ref, delta_ref, k_ref, v_ref, where_ref, dq_ref, q_smem, dy_smem, arrived):
    row, tile, head = lax.axis_index("row"), lax.axis_index("tile"), lax.axis_index("head")
    place, queries = Place(where_ref[0], where_ref[1], where_ref[2]), pl.ds(tile * BLOCK, BLOCK)
    plgpu.copy_gmem_to_smem(q_ref.at[row, queries, head], q_smem, arrived)
    plgpu.copy_gmem_to_smem(dy_ref.at[row, queries, head], dy_smem, arrived)
    lse = hopper.load(lse_ref.at[row, head, queries], hopper.BY_ROW)
    delta = hopper.load(delta_ref.at[row, head, queries], hopper.BY_ROW)
    plgpu.barrier_wait(arrived)

    def step(index, k_smem, v_smem, dq):
      scores = _seen(product(q_smem, k_smem.T, (BLOCK, BLOCK)), index[0], place, length)
      return attention.with_gradient(dq, scores, k_smem, v_smem, dy_smem, lse, delta, scale)

    keys = plgpu.BlockSpec((BLOCK, c), lambda i: (i, 0), transforms=hopper.TILED)
    kv_head = lax.div(head, h // kv_heads)
    dq = plgpu.emit_pipeline(
      step,
      grid=(_written_blocks(place, length),),
      in_specs=[keys, keys],
      max_concurrent_steps=STAGES,
      init_carry=filled((BLOCK, c), 0.0, hopper.MATRIX),
    )(k_ref.at[place.position, kv_head, row], v_ref.at[place.position, kv_head, row])

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
  )(q, dy, lse, delta, ring_k, ring_v, where)
