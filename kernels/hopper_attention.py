"""What kernels of attention for Hopper GPUs share: blocks of queries and keys, their products, and the running softmax.

A thread block is a single warpgroup with 64 queries of one head, which walks over blocks of 64 keys.
"""

import math

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


def nothing_seen(width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the carry of `with_block` before the first block: sums of values, the largest score, the sum of weights."""
  return (
    filled((BLOCK, width), 0.0, hopper.MATRIX),
    filled((BLOCK,), -jnp.inf, hopper.BY_ROW),
    filled((BLOCK,), 0.0, hopper.BY_ROW),
  )


def with_block(carry, scores: jax.Array, v_smem, scale: float):
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


def with_gradient(dq: jax.Array, scores: jax.Array, k_smem, v_smem, dy_smem, lse, delta, scale: float) -> jax.Array:
  """Returns √C · dq with what a block of keys adds.

  Args:
    scores: q·k, a query in each row, −∞ where a key is not visible.
    lse: log2 Σ exp2 of each query's scores in units of log 2.
    delta: Σ y·dy of each query.
    scale: 1 / √C.
  """
  square = (BLOCK, BLOCK)
  p = jnp.exp2(scores * (scale * LOG2E) - rows_by(lse, square))
  ds = p * (product(dy_smem, v_smem.T, square) - rows_by(delta, square))
  return plus_product(dq, ds.astype(k_smem.dtype), k_smem)
