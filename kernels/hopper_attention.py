"""What kernels of attention for Hopper GPUs share: blocks of queries and keys, their products, and the running softmax.

A thread block is a single warpgroup with 64 queries of one head, which walks over blocks of 64 keys. An operation says
which, by a function `keys`: (*references to its operands) → walk, where walk(step, carry) returns the last carry of
step(block of keys, block of values, confine, carry). `confine` puts −∞ in place of scores of keys that are not visible.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pgolf_jax.kernels import hopper

BLOCK = 64
"""Rows in a block of queries and in a block of keys: as many as one warpgroup multiplies at once."""
STAGES = 2
"""Blocks of keys, or of queries, in flight: other thread blocks on the multiprocessor hide the remaining latency."""
LOG2E = math.log2(math.e)
COMPILER = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
_HEAD_WIDTHS = (64, 128)


def obstacle(q_BxTxHxC) -> str | None:
  """Returns why such queries cannot be multiplied, or None."""
  if q_BxTxHxC.dtype not in (jnp.bfloat16, jnp.float16):
    return f"it needs bfloat16 or float16, not {q_BxTxHxC.dtype}"
  if q_BxTxHxC.shape[3] not in _HEAD_WIDTHS:
    return f"it needs a head width of {' or '.join(map(str, _HEAD_WIDTHS))}, not {q_BxTxHxC.shape[3]}"
  return None


def padded(x: jax.Array) -> jax.Array:
  """Returns rows [B, T, heads, C] with zeros after them up to a whole number of blocks."""
  return jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK), (0, 0), (0, 0)))


def rows_by(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Returns one number for each row, repeated along it."""
  return lax.broadcast_in_dim(x, shape, [0])


def columns_by(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Returns one number for each column, repeated along it."""
  return lax.broadcast_in_dim(x, shape, [1])


def positions(first: jax.Array, dimension: int) -> jax.Array:
  """Returns the position that each row, or each column, of a square of blocks stands for."""
  return first + plgpu.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), dimension, layout=hopper.MATRIX)


def product(a, b, shape: tuple[int, int]) -> jax.Array:
  """Returns a · b of operands in shared memory, in float32."""

  def compute(acc):
    plgpu.wgmma(acc, a, b)
    return acc[...]

  return pl.run_scoped(compute, plgpu.ACC(shape, jnp.float32))


def plus_product(sums: jax.Array, a: jax.Array, b) -> jax.Array:
  """Returns sums + a · b of a in registers and b in shared memory."""
  return pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(plgpu.ACC.init(sums))


def filled(shape: tuple[int, ...], value: float, layout) -> jax.Array:
  """Returns float32 registers of one value."""
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def operand(width: int, dtype) -> plgpu.SMEM:
  """Returns room in shared memory for a block that is multiplied."""
  return plgpu.SMEM((BLOCK, width), dtype, transforms=hopper.TILED)


def over_blocks(step: Callable, first, count, carry, keys_and_values, stages: int):
  """Returns the last carry of step(i, block of keys, block of values, carry) over `count` blocks from `first` on.

  Args:
    keys_and_values: two references [rows, C] in global memory.
    stages: blocks in flight.
  """
  width = keys_and_values[0].shape[1]
  block = plgpu.BlockSpec((BLOCK, width), lambda i: (first + i, 0), transforms=hopper.TILED)
  pipeline = plgpu.emit_pipeline(
    lambda index, k_smem, v_smem, carry: step(index[0], k_smem, v_smem, carry),
    grid=(count,),
    in_specs=[block, block],
    max_concurrent_steps=stages,
    init_carry=carry,
  )
  return pipeline(*keys_and_values)


def attend(keys: Callable, q: jax.Array, *operands: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the outputs, and log2 Σ exp2 of each query's scores in units of log 2, [B, H, T] float32."""
  b, t, h, c = q.shape
  scale = LOG2E / math.sqrt(c)

  def kernel(q_ref, *refs):
    *operand_refs, y_ref, lse_ref, q_smem, lse_smem, arrived = refs
    row, tile, head = lax.axis_index("row"), lax.axis_index("tile"), lax.axis_index("head")
    queries = pl.ds(tile * BLOCK, BLOCK)
    plgpu.copy_gmem_to_smem(q_ref.at[row, queries, head], q_smem, arrived)
    walk = keys(*operand_refs)
    plgpu.barrier_wait(arrived)

    def step(k_smem, v_smem, confine, carry):
      return _with_block(carry, confine(product(q_smem, k_smem.T, (BLOCK, BLOCK))), v_smem, scale)

    sums, top, total = walk(step, _nothing_seen(c))
    q_smem[...] = (sums * rows_by(1 / total, sums.shape)).astype(q.dtype)
    lse_smem[...] = top + jnp.log(total) * LOG2E
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_smem, y_ref.at[row, queries, head])
    plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[row, head, queries])
    plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
    kernel,
    out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, h, t), jnp.float32)),
    scratch_types=(operand(c, q.dtype), plgpu.SMEM((BLOCK,), jnp.float32), plgpu.Barrier()),
    grid=(b, t // BLOCK, h),
    grid_names=("row", "tile", "head"),
    compiler_params=COMPILER,
  )(q, *operands)


def query_gradient(keys: Callable, q, dy, lse, delta, *operands: jax.Array) -> jax.Array:
  """Returns dq.

  Args:
    lse: what `attend` returned.
    delta: Σ y·dy of each query, [B, H, T] float32.
  """
  b, t, h, c = q.shape
  scale = 1 / math.sqrt(c)

  def kernel(q_ref, dy_ref, lse_ref, delta_ref, *refs):
    *operand_refs, dq_ref, q_smem, dy_smem, arrived = refs
    row, tile, head = lax.axis_index("row"), lax.axis_index("tile"), lax.axis_index("head")
    queries = pl.ds(tile * BLOCK, BLOCK)
    plgpu.copy_gmem_to_smem(q_ref.at[row, queries, head], q_smem, arrived)
    plgpu.copy_gmem_to_smem(dy_ref.at[row, queries, head], dy_smem, arrived)
    walk = keys(*operand_refs)
    lse = hopper.load(lse_ref.at[row, head, queries], hopper.BY_ROW)
    delta = hopper.load(delta_ref.at[row, head, queries], hopper.BY_ROW)
    plgpu.barrier_wait(arrived)

    def step(k_smem, v_smem, confine, dq):
      square = (BLOCK, BLOCK)
      scores = confine(product(q_smem, k_smem.T, square))
      p = jnp.exp2(scores * (scale * LOG2E) - rows_by(lse, square))
      ds = p * (product(dy_smem, v_smem.T, square) - rows_by(delta, square))
      return plus_product(dq, ds.astype(q.dtype), k_smem)

    dq = walk(step, filled((BLOCK, c), 0.0, hopper.MATRIX))
    q_smem[...] = (dq * scale).astype(q.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_smem, dq_ref.at[row, queries, head])
    plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
    scratch_types=(operand(c, q.dtype), operand(c, q.dtype), plgpu.Barrier(num_arrivals=2)),
    grid=(b, t // BLOCK, h),
    grid_names=("row", "tile", "head"),
    compiler_params=COMPILER,
  )(q, dy, lse, delta, *operands)


def _nothing_seen(width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the carry of `_with_block` before the first block: sums of values, largest scores, sums of weights."""
  return (
    filled((BLOCK, width), 0.0, hopper.MATRIX),
    filled((BLOCK,), -jnp.inf, hopper.BY_ROW),
    filled((BLOCK,), 0.0, hopper.BY_ROW),
  )


def _with_block(carry, scores: jax.Array, v_smem, scale: float):
  """Returns the running softmax after a block of keys, the largest score in units of log 2.

  Args:
    scores: q·k, a query in each row, −∞ where a key is not visible.
    scale: log2 e / √C.
  """
  sums, top, total = carry
  new_top = jnp.maximum(top, scores.max(axis=1) * scale)
  # A query may see nothing of a whole block: nothing is subtracted until it has seen a key.
  shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)
  shrink = jnp.exp2(top - shift)
  p = jnp.exp2(scores * scale - rows_by(shift, scores.shape))
  total = total * shrink + p.sum(axis=1)
  return plus_product(sums * rows_by(shrink, sums.shape), p.astype(v_smem.dtype), v_smem), new_top, total
