"""Segment-confined attention for Hopper GPUs, forward and backward, in Pallas' Mosaic GPU.

A block of 64 queries walks over the blocks of 64 keys from its first query's segment start to itself, so that the work
grows with the length of segments and not with T. Segments are a few blocks long, and so short a loop does not repay
warp specialisation. A thread block is therefore a single warpgroup, and the few that fit on a multiprocessor hide each
other's copies, softmax and epilogue.

The gradient takes two kernels, one by queries (dq) and one by keys (dk, dv). They compute two of the five products
twice, but every sum has one order: gradients are the same to the bit from run to run.

Each kernel has a jit around it, so that a model of many layers traces and lowers it once.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pgolf_jax.kernels import hopper
from pgolf_jax.kernels import hopper_attention as attention
from pgolf_jax.kernels.hopper_attention import (
  BLOCK,
  COMPILER,
  HEADS,
  LOG2E,
  STAGES,
  columns_by,
  filled,
  from_products,
  heads_together,
  operand,
  padded,
  plus_products,
  positions,
  rows_by,
)
from pgolf_jax.kernels.segment_attention import padded_starts


def obstacle(q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, start_BxT, *, max_segment: int) -> str | None:
  """Returns why this backend cannot compute the operation for these shapes and types, or None."""
  return attention.obstacle(q_BxTxHxC)


def segment_attention(
  q_BxTxHxC: jax.Array, k_BxTxKxC: jax.Array, v_BxTxKxC: jax.Array, start_BxT: jax.Array, *, max_segment: int
) -> jax.Array:
  """Computes the operation. Rows of any length are padded to whole blocks of 64."""
  del max_segment  # each block of queries reads from `start_BxT` how far it goes back
  return _differentiable(q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, start_BxT)


@jax.custom_vjp
def _differentiable(q, k, v, start):
  return _forward(q, k, v, start)[0]


def _forward(q, k, v, start):
  t = q.shape[1]
  whole = padded(q), padded(k), padded(v), padded_starts(start, BLOCK)
  y, lse = _attend(*whole)
  return y[:, :t], (*whole, y, lse)


def _backward(residuals, dy):
  q, k, v, start, y, lse = residuals
  t, dy = dy.shape[1], padded(dy)
  dq, delta = _query_gradient(q, y, dy, lse, k, v, start)
  dk, dv = key_gradients(q, k, v, start, dy, lse, delta)
  return dq[:, :t], dk[:, :t], dv[:, :t], None


_differentiable.defvjp(_forward, _backward)


def _confined(scores, query_tile, key_tile, start, last_start):
  """Returns a block's scores, a query in each row, with −∞ where the key is not visible."""

  def masked():
    key = positions(key_tile * BLOCK, 1)
    visible = (key <= positions(query_tile * BLOCK, 0)) & (key >= rows_by(start, scores.shape))
    return jnp.where(visible, scores, -jnp.inf)

  return lax.cond((key_tile == query_tile) | (key_tile * BLOCK < last_start), masked, lambda: scores)


def _keys(blocks_of_a_key: int, *, without_lone: bool):
  """Returns `keys` of the shared kernels: the blocks from a block's first visible key to itself.

  Args:
    blocks_of_a_key: thread blocks side by side whose query heads share a key's head.
    without_lone: whether the last carry is 0 in the rows of queries that see one key.
  """

  def keys(k_ref, v_ref, start_ref):
    row, tile, heads = lax.axis_index("row"), lax.axis_index("tile"), lax.axis_index("heads")
    first = lax.div(start_ref[row, tile * BLOCK], BLOCK)
    last_start = start_ref[row, tile * BLOCK + BLOCK - 1]
    start = hopper.load(start_ref.at[row, pl.ds(tile * BLOCK, BLOCK)], hopper.BY_ROW)
    kv_head = lax.div(heads, blocks_of_a_key)

    def walk(step, carry):
      def in_row(i, k_smem, v_smem, carry):
        return step(k_smem, v_smem, lambda scores: _confined(scores, tile, first + i, start, last_start), carry)

      in_memory = [x.at[row, :, kv_head, :] for x in (k_ref, v_ref)]
      carry = attention.over_blocks(in_row, first, tile + 1 - first, carry, in_memory, STAGES)
      if not without_lone:
        return carry
      shape = carry[0].shape
      position = tile * BLOCK + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=hopper.MATRIX)
      return tuple(jnp.where(rows_by(start, shape) == position, 0.0, x) for x in carry)

    return walk

  return keys


@jax.jit
def _attend(q, k, v, start):
  heads = heads_together(HEADS, q, k)
  return attention.attend(_keys(q.shape[2] // k.shape[2] // heads, without_lone=False), heads, q, k, v, start)


@jax.jit
def _query_gradient(q, y, dy, lse, k, v, start):
  heads = heads_together(HEADS, q, k)
  keys = _keys(q.shape[2] // k.shape[2] // heads, without_lone=True)
  return attention.query_gradient(keys, heads, q, y, dy, lse, k, v, start)


def _seeing_queries(start_BxT: jax.Array) -> jax.Array:
  """Returns, for each block of keys, the ends of the blocks of queries that see all of it and that see any of it.

  An end is one past the last such block. Starts never fall along a row, so both are numbers of starts up to a position:
  counted by comparing all with all, in one kernel where a binary search would be a loop of small ones.
  """
  blocks = start_BxT.reshape(start_BxT.shape[0], -1, BLOCK)
  position = jnp.arange(blocks.shape[1], dtype=jnp.int32) * BLOCK

  def search(starts, keys):
    return jnp.searchsorted(starts, keys, side="right", method="compare_all").astype(jnp.int32)

  all_seen_end = jax.vmap(search, (0, None))(blocks[:, :, -1], position)
  any_seen_end = jax.vmap(search, (0, None))(blocks[:, :, 0], position + BLOCK - 1)
  return jnp.stack([all_seen_end, any_seen_end], axis=-1)


@jax.jit
def key_gradients(q, k, v, start, dy, lse, delta):
  """Returns dk and dv, of arguments padded to whole blocks.

  Args:
    start: first key that each query sees, [B, T] int32; itself where nothing is learnt of its key through it.
    lse: log2 Σ exp2 of each query's scores in units of log 2, [B, H, T] float32.
    delta: Σ y·dy of each query, likewise.
  """
  b, t, h, c = q.shape
  kv_heads = k.shape[2]
  group = h // kv_heads
  scale = 1 / math.sqrt(c)

  def kernel(
    q_ref, k_ref, v_ref, start_ref, dy_ref, lse_ref, delta_ref, seen_ref, dk_ref, dv_ref, k_smem, v_smem, arrived
  ):
    row, tile, kv_head = lax.axis_index("row"), lax.axis_index("tile"), lax.axis_index("kv_head")
    keys = pl.ds(tile * BLOCK, BLOCK)
    plgpu.copy_gmem_to_smem(k_ref.at[row, keys, kv_head], k_smem, arrived)
    plgpu.copy_gmem_to_smem(v_ref.at[row, keys, kv_head], v_smem, arrived)
    all_seen_end, any_seen_end = seen_ref[row, tile, 0], seen_ref[row, tile, 1]
    plgpu.barrier_wait(arrived)

    def step(index, q_smem, dy_smem, lse_smem, delta_smem, carry):
      query_tile = tile + index[0]
      square = (BLOCK, BLOCK)
      queries, position = pl.ds(query_tile * BLOCK, BLOCK), positions(query_tile * BLOCK, 1)

      def masked(scores):
        start = hopper.load(start_ref.at[row, queries], hopper.BY_COLUMN)
        key = positions(tile * BLOCK, 0)
        visible = (key <= position) & (key >= columns_by(start, square))
        return jnp.where(visible, scores, -jnp.inf)

      def of_others(ds):
        """Without what lone queries would give, which see a key of the block that they stand in."""
        start = hopper.load(start_ref.at[row, queries], hopper.BY_COLUMN)
        return jnp.where(columns_by(start, square) == position, 0.0, ds)

      def weights_and_gradient(scores, dp):
        lse = hopper.load(lse_smem, hopper.BY_COLUMN)
        delta = hopper.load(delta_smem, hopper.BY_COLUMN)
        plgpu.commit_smem()  # both have been read before copies may overwrite them
        scores = scores()
        scores = lax.cond((query_tile == tile) | (query_tile >= all_seen_end), masked, lambda scores: scores, scores)
        p = jnp.exp2(scores * (scale * LOG2E) - columns_by(lse, square))
        ds = p * (dp() - columns_by(delta, square))
        return p.astype(q.dtype), lax.cond(query_tile == tile, of_others, lambda ds: ds, ds).astype(q.dtype)

      p, ds = from_products(weights_and_gradient, (k_smem, q_smem.T), (v_smem, dy_smem.T))
      return plus_products(carry, (ds, q_smem), (p, dy_smem))

    def by_head(i, j):
      return tile + i, kv_head * group + j

    queries = plgpu.BlockSpec((BLOCK, None, c), lambda i, j: (*by_head(i, j), 0), transforms=hopper.TILED)
    by_query = plgpu.BlockSpec((None, BLOCK), lambda i, j: by_head(i, j)[::-1])
    zeros = filled((BLOCK, c), 0.0, hopper.MATRIX)
    dk, dv = plgpu.emit_pipeline(
      step,
      grid=(any_seen_end - tile, group),
      in_specs=[queries, queries, by_query, by_query],
      max_concurrent_steps=STAGES,
      init_carry=(zeros, zeros),
    )(q_ref.at[row], dy_ref.at[row], lse_ref.at[row], delta_ref.at[row])

    k_smem[...] = (dk * scale).astype(k.dtype)
    v_smem[...] = dv.astype(v.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(k_smem, dk_ref.at[row, keys, kv_head])
    plgpu.copy_smem_to_gmem(v_smem, dv_ref.at[row, keys, kv_head])
    plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
    kernel,
    out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
    scratch_types=(operand(c, k.dtype), operand(c, k.dtype), plgpu.Barrier(num_arrivals=2)),
    grid=(b, t // BLOCK, kv_heads),
    grid_names=("row", "tile", "kv_head"),
    compiler_params=COMPILER,
  )(q, k, v, start, dy, lse, delta, _seeing_queries(start))
