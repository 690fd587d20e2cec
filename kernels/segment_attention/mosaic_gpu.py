"""Segment-confined attention for Hopper GPUs, forward and backward, in Pallas' Mosaic GPU.

A block of 64 queries of one head walks over the blocks of 64 keys from its first query's segment start to itself, so
that the work grows with the length of segments and not with T. Segments are a few blocks long, and so short a loop does
not repay warp specialisation. A thread block is therefore a single warpgroup, and the two to four that fit on a
multiprocessor hide each other's copies, softmax and epilogue.

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

_BLOCK = 64
"""Rows in a block of queries and in a block of keys: as many as one warpgroup multiplies at once."""
_STAGES = 2
"""Blocks of keys, or of queries, in flight: other thread blocks on the multiprocessor hide the remaining latency."""
_HEAD_WIDTHS = (64, 128)
_LOG2E = math.log2(math.e)
_COMPILER = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


def obstacle(q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, start_BxT, *, max_segment: int) -> str | None:
  """Returns why this backend cannot compute the operation for these shapes and types, or None."""
  if q_BxTxHxC.dtype not in (jnp.bfloat16, jnp.float16):
    return f"it needs bfloat16 or float16, not {q_BxTxHxC.dtype}"
  if q_BxTxHxC.shape[3] not in _HEAD_WIDTHS:
    return f"it needs a head width of {' or '.join(map(str, _HEAD_WIDTHS))}, not {q_BxTxHxC.shape[3]}"
  return None


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
  padded = _padded(q), _padded(k), _padded(v), _padded_start(start)
  y, lse = _attend(*padded)
  return y[:, :t], (*padded, y, lse)


def _backward(residuals, dy):
  q, k, v, start, y, lse = residuals
  t, dy = dy.shape[1], _padded(dy)
  delta = jnp.einsum("bthc,bthc->bht", y, dy, preferred_element_type=jnp.float32)
  dq = _query_gradient(q, k, v, start, dy, lse, delta)
  dk, dv = _key_gradients(q, k, v, start, dy, lse, delta)
  return dq[:, :t], dk[:, :t], dv[:, :t], None


_differentiable.defvjp(_forward, _backward)


def _padded(x: jax.Array) -> jax.Array:
  return jnp.pad(x, ((0, 0), (0, -x.shape[1] % _BLOCK), (0, 0), (0, 0)))


def _padded_start(start: jax.Array) -> jax.Array:
  """Pads starts so that a padded query sees itself alone: its softmax then has a finite sum."""
  t = start.shape[1]
  itself = jnp.broadcast_to(jnp.arange(t, t + -t % _BLOCK, dtype=jnp.int32), (start.shape[0], -t % _BLOCK))
  return jnp.concatenate([start.astype(jnp.int32), itself], axis=1)


def _rows_by(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
  return lax.broadcast_in_dim(x, shape, [0])


def _columns_by(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
  return lax.broadcast_in_dim(x, shape, [1])


def _positions(first: jax.Array, dimension: int) -> jax.Array:
  return first + plgpu.broadcasted_iota(jnp.int32, (_BLOCK, _BLOCK), dimension, layout=hopper.MATRIX)


def _product(a, b, shape: tuple[int, int]) -> jax.Array:
  def compute(acc):
    plgpu.wgmma(acc, a, b)
    return acc[...]

  return pl.run_scoped(compute, plgpu.ACC(shape, jnp.float32))


def _plus_product(sums: jax.Array, a: jax.Array, b) -> jax.Array:
  return pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(plgpu.ACC.init(sums))


def _filled(shape: tuple[int, ...], value: float, layout) -> jax.Array:
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _operand(width: int, dtype) -> plgpu.SMEM:
  return plgpu.SMEM((_BLOCK, width), dtype, transforms=hopper.TILED)


def _visible_keys(start_ref, row, tile):
  """Returns the first block of keys that a block of queries sees, and the position before which keys need a mask."""
  first = lax.div(start_ref[row, tile * _BLOCK], _BLOCK)
  return first, start_ref[row, tile * _BLOCK + _BLOCK - 1]


def _confined(scores, query_tile, key_tile, start, last_start):
  """Returns a block's scores, a query in each row, with −∞ where the key is not visible."""

  def masked():
    key = _positions(key_tile * _BLOCK, 1)
    visible = (key <= _positions(query_tile * _BLOCK, 0)) & (key >= _rows_by(start, scores.shape))
    return jnp.where(visible, scores, -jnp.inf)

  return lax.cond((key_tile == query_tile) | (key_tile * _BLOCK < last_start), masked, lambda: scores)


@jax.jit
def _attend(q, k, v, start):
  """Returns the outputs, and log2 Σ exp2 of each query's scores in units of log 2, [B, H, T] float32."""
  b, t, h, c = q.shape
  scale = _LOG2E / math.sqrt(c)

  def kernel(q_ref, k_ref, v_ref, start_ref, y_ref, lse_ref, q_smem, lse_smem, arrived):
    row, tile, head = lax.axis_index("row"), lax.axis_index("tile"), lax.axis_index("head")
    queries = pl.ds(tile * _BLOCK, _BLOCK)
    plgpu.copy_gmem_to_smem(q_ref.at[row, queries, head], q_smem, arrived)
    first, last_start = _visible_keys(start_ref, row, tile)
    start = hopper.load(start_ref.at[row, queries], hopper.BY_ROW)
    plgpu.barrier_wait(arrived)

    def step(index, k_smem, v_smem, carry):
      sums, top, total = carry
      scores = _product(q_smem, k_smem.T, (_BLOCK, _BLOCK))
      scores = _confined(scores, tile, first + index[0], start, last_start)
      new_top = jnp.maximum(top, scores.max(axis=1) * scale)
      # A whole block may lie before a query's segment: nothing is subtracted until the query has seen a key.
      shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)
      shrink = jnp.exp2(top - shift)
      p = jnp.exp2(scores * scale - _rows_by(shift, scores.shape))
      total = total * shrink + p.sum(axis=1)
      return _plus_product(sums * _rows_by(shrink, sums.shape), p.astype(q.dtype), v_smem), new_top, total

    keys = plgpu.BlockSpec((_BLOCK, c), lambda i: (first + i, 0), transforms=hopper.TILED)
    start_values = (
      _filled((_BLOCK, c), 0.0, hopper.MATRIX),
      _filled((_BLOCK,), -jnp.inf, hopper.BY_ROW),
      _filled((_BLOCK,), 0.0, hopper.BY_ROW),
    )
    kv_head = lax.div(head, h // k.shape[2])
    sums, top, total = plgpu.emit_pipeline(
      step,
      grid=(tile + 1 - first,),
      in_specs=[keys, keys],
      max_concurrent_steps=_STAGES,
      init_carry=start_values,
    )(k_ref.at[row, :, kv_head, :], v_ref.at[row, :, kv_head, :])

    q_smem[...] = (sums * _rows_by(1 / total, sums.shape)).astype(q.dtype)
    lse_smem[...] = top + jnp.log(total) * _LOG2E
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_smem, y_ref.at[row, queries, head])
    plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[row, head, queries])
    plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
    kernel,
    out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, h, t), jnp.float32)),
    scratch_types=(_operand(c, q.dtype), plgpu.SMEM((_BLOCK,), jnp.float32), plgpu.Barrier()),
    grid=(b, t // _BLOCK, h),
    grid_names=("row", "tile", "head"),
    compiler_params=_COMPILER,
  )(q, k, v, start)


@jax.jit
def _query_gradient(q, k, v, start, dy, lse, delta):
  b, t, h, c = q.shape
  scale = 1 / math.sqrt(c)

  def kernel(q_ref, k_ref, v_ref, start_ref, dy_ref, lse_ref, delta_ref, dq_ref, q_smem, dy_smem, arrived):
    row, tile, head = lax.axis_index("row"), lax.axis_index("tile"), lax.axis_index("head")
    queries = pl.ds(tile * _BLOCK, _BLOCK)
    plgpu.copy_gmem_to_smem(q_ref.at[row, queries, head], q_smem, arrived)
    plgpu.copy_gmem_to_smem(dy_ref.at[row, queries, head], dy_smem, arrived)
    first, last_start = _visible_keys(start_ref, row, tile)
    start = hopper.load(start_ref.at[row, queries], hopper.BY_ROW)
    lse = hopper.load(lse_ref.at[row, head, queries], hopper.BY_ROW)
    delta = hopper.load(delta_ref.at[row, head, queries], hopper.BY_ROW)
    plgpu.barrier_wait(arrived)

    def step(index, k_smem, v_smem, dq):
      square = (_BLOCK, _BLOCK)
      scores = _product(q_smem, k_smem.T, square)
      scores = _confined(scores, tile, first + index[0], start, last_start)
      p = jnp.exp2(scores * (scale * _LOG2E) - _rows_by(lse, square))
      ds = p * (_product(dy_smem, v_smem.T, square) - _rows_by(delta, square))
      return _plus_product(dq, ds.astype(q.dtype), k_smem)

    keys = plgpu.BlockSpec((_BLOCK, c), lambda i: (first + i, 0), transforms=hopper.TILED)
    kv_head = lax.div(head, h // k.shape[2])
    dq = plgpu.emit_pipeline(
      step,
      grid=(tile + 1 - first,),
      in_specs=[keys, keys],
      max_concurrent_steps=_STAGES,
      init_carry=_filled((_BLOCK, c), 0.0, hopper.MATRIX),
    )(k_ref.at[row, :, kv_head, :], v_ref.at[row, :, kv_head, :])

    q_smem[...] = (dq * scale).astype(q.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_smem, dq_ref.at[row, queries, head])
    plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
    scratch_types=(_operand(c, q.dtype), _operand(c, q.dtype), plgpu.Barrier(num_arrivals=2)),
    grid=(b, t // _BLOCK, h),
    grid_names=("row", "tile", "head"),
    compiler_params=_COMPILER,
  )(q, k, v, start, dy, lse, delta)


def _seeing_queries(start_BxT: jax.Array) -> jax.Array:
  """Returns, for each block of keys, the ends of the blocks of queries that see all of it and that see any of it.

  An end is one past the last such block. Starts never fall along a row, so both are numbers of starts up to a position:
  counted by comparing all with all, in one kernel where a binary search would be a loop of small ones.
  """
  blocks = start_BxT.reshape(start_BxT.shape[0], -1, _BLOCK)
  position = jnp.arange(blocks.shape[1], dtype=jnp.int32) * _BLOCK

  def search(starts, keys):
    return jnp.searchsorted(starts, keys, side="right", method="compare_all").astype(jnp.int32)

  all_seen_end = jax.vmap(search, (0, None))(blocks[:, :, -1], position)
  any_seen_end = jax.vmap(search, (0, None))(blocks[:, :, 0], position + _BLOCK - 1)
  return jnp.stack([all_seen_end, any_seen_end], axis=-1)


@jax.jit
def _key_gradients(q, k, v, start, dy, lse, delta):
  b, t, h, c = q.shape
  kv_heads = k.shape[2]
  group = h // kv_heads
  scale = 1 / math.sqrt(c)

  def kernel(
    q_ref, k_ref, v_ref, start_ref, dy_ref, lse_ref, delta_ref, seen_ref, dk_ref, dv_ref, k_smem, v_smem, arrived
  ):
    row, tile, kv_head = lax.axis_index("row"), lax.axis_index("tile"), lax.axis_index("kv_head")
    keys = pl.ds(tile * _BLOCK, _BLOCK)
    plgpu.copy_gmem_to_smem(k_ref.at[row, keys, kv_head], k_smem, arrived)
    plgpu.copy_gmem_to_smem(v_ref.at[row, keys, kv_head], v_smem, arrived)
    all_seen_end, any_seen_end = seen_ref[row, tile, 0], seen_ref[row, tile, 1]
    plgpu.barrier_wait(arrived)

    def step(index, q_smem, dy_smem, lse_smem, delta_smem, carry):
      dk, dv = carry
      query_tile = tile + index[0]
      square = (_BLOCK, _BLOCK)
      scores = _product(k_smem, q_smem.T, square)

      def masked():
        queries = pl.ds(query_tile * _BLOCK, _BLOCK)
        start = hopper.load(start_ref.at[row, queries], hopper.BY_COLUMN)
        key = _positions(tile * _BLOCK, 0)
        visible = (key <= _positions(query_tile * _BLOCK, 1)) & (key >= _columns_by(start, square))
        return jnp.where(visible, scores, -jnp.inf)

      scores = lax.cond((query_tile == tile) | (query_tile >= all_seen_end), masked, lambda: scores)
      lse = hopper.load(lse_smem, hopper.BY_COLUMN)
      delta = hopper.load(delta_smem, hopper.BY_COLUMN)
      plgpu.commit_smem()  # both have been read before copies may overwrite them
      p = jnp.exp2(scores * (scale * _LOG2E) - _columns_by(lse, square))
      dv = _plus_product(dv, p.astype(q.dtype), dy_smem)
      ds = p * (_product(v_smem, dy_smem.T, square) - _columns_by(delta, square))
      return _plus_product(dk, ds.astype(q.dtype), q_smem), dv

    def by_head(i, j):
      return tile + i, kv_head * group + j

    queries = plgpu.BlockSpec((_BLOCK, None, c), lambda i, j: (*by_head(i, j), 0), transforms=hopper.TILED)
    by_query = plgpu.BlockSpec((None, _BLOCK), lambda i, j: by_head(i, j)[::-1])
    zeros = _filled((_BLOCK, c), 0.0, hopper.MATRIX)
    dk, dv = plgpu.emit_pipeline(
      step,
      grid=(any_seen_end - tile, group),
      in_specs=[queries, queries, by_query, by_query],
      max_concurrent_steps=_STAGES,
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
    scratch_types=(_operand(c, k.dtype), _operand(c, k.dtype), plgpu.Barrier(num_arrivals=2)),
    grid=(b, t // _BLOCK, kv_heads),
    grid_names=("row", "tile", "kv_head"),
    compiler_params=_COMPILER,
  )(q, k, v, start, dy, lse, delta, _seeing_queries(start))
