"""What kernels of attention for Hopper GPUs share: blocks of queries and keys, their products, and the running softmax.

A thread block is a single warpgroup with 64 queries, which walks over blocks of 64 keys. Where query heads share a key
it has those of two heads, so that a block of keys and values is read once for both, and one's softmax runs beside
the other's product. An operation says which blocks, by a function `keys`: (*references to its operands) → walk, where
walk(step, carry) returns the last carry of step(block of keys, block of values, confine, carry). `confine` puts −∞ in
place of scores of keys that are not visible.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

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
HEADS = 2
"""Query heads in a thread block, where they share a key's head and their sums fit into its registers."""
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


def from_products(use: Callable, *operands: tuple):
  """Returns what `use` makes of products a · b of blocks in shared memory, [BLOCK, BLOCK] in float32.

  All products are begun at once. `use` takes a function for each, which waits for it and for those before it.
  """

  def compute(*sums):
    for acc, (a, b) in zip(sums, operands, strict=True):
      plgpu.wgmma(acc, a, b)
    later = reversed(range(len(sums)))
    return use(
      *(functools.partial(plgpu.wgmma_accumulator_load, acc, wait_n=n) for acc, n in zip(sums, later, strict=True))
    )

  return pl.run_scoped(compute, *[plgpu.ACC((BLOCK, BLOCK), jnp.float32)] * len(operands))


def plus_products(sums: Sequence[jax.Array], *operands: tuple) -> Sequence[jax.Array]:
  """Returns each of the sums plus a · b of its operands, a in registers and b in shared memory."""

  def multiply(accs):
    for acc, (a, b) in zip(accs, operands, strict=True):
      plgpu.wgmma(acc, a, b)

  return pl.run_state(multiply)(tuple(plgpu.ACC.init(x) for x in sums))


def filled(shape: tuple[int, ...], value: float, layout) -> jax.Array:
  """Returns float32 registers of one value."""
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def operand(width: int, dtype, *heads: int) -> plgpu.SMEM:
  """Returns room in shared memory for a block that is multiplied, or for one of each head."""
  return plgpu.SMEM((*heads, BLOCK, width), dtype, transforms=hopper.TILED)


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


def heads_together(heads: int, q_BxTxHxC: jax.Array, k_BxTxKxC: jax.Array) -> int:
  """Returns `heads`, or 1 where so many heads do not share a key's head, or would take too many registers."""
  *_, query_heads, width = q_BxTxHxC.shape
  return 1 if query_heads // k_BxTxKxC.shape[2] % heads or width > BLOCK else heads


def attend(keys: Callable, heads: int, q: jax.Array, *operands: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the outputs, and log2 Σ exp2 of each query's scores in units of log 2, [B, H, T] float32.

  Args:
    heads: query heads in a thread block; all of them have the same key's head.
  """
  b, t, h, c = q.shape
  scale = LOG2E / math.sqrt(c)

  def kernel(q_ref, *refs):
    *operand_refs, y_ref, lse_ref, q_smem, lse_smem, arrived = refs
    row, queries, numbered = _place(heads)
    for i, head in numbered:
      plgpu.copy_gmem_to_smem(q_ref.at[row, queries, head], q_smem.at[i], arrived)
    walk = keys(*operand_refs)
    plgpu.barrier_wait(arrived)

    def step(k_smem, v_smem, confine, carry):
      def weights(*scores):
        return [_with_scores(*of_head, confine(wait()), scale) for of_head, wait in zip(carry, scores, strict=True)]

      weighed = from_products(weights, *((q_smem.at[i], k_smem.T) for i in range(heads)))
      sums = plus_products([x.sums for x in weighed], *((x.p.astype(v_smem.dtype), v_smem) for x in weighed))
      return tuple((new, x.top, x.total) for new, x in zip(sums, weighed, strict=True))

    carry = walk(step, (_nothing_seen(c),) * heads)
    for i, (sums, top, total) in enumerate(carry):
      q_smem[i] = (sums * rows_by(1 / total, sums.shape)).astype(q.dtype)
      lse_smem[i] = top + jnp.log(total) * LOG2E
    plgpu.commit_smem()
    for i, head in numbered:
      plgpu.copy_smem_to_gmem(q_smem.at[i], y_ref.at[row, queries, head])
      plgpu.copy_smem_to_gmem(lse_smem.at[i], lse_ref.at[row, head, queries])
    plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
    kernel,
    out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, h, t), jnp.float32)),
    scratch_types=(
      operand(c, q.dtype, heads),
      plgpu.SMEM((heads, BLOCK), jnp.float32),
      plgpu.Barrier(num_arrivals=heads),
    ),
    grid=(b, t // BLOCK, h // heads),
    grid_names=("row", "tile", "heads"),
    compiler_params=COMPILER,
  )(q, *operands)


def query_gradient(keys: Callable, heads: int, q, y, dy, lse, *operands: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns dq, and Σ y·dy of each query, [B, H, T] float32.

  Args:
    heads: as for `attend`.
    y, lse: what `attend` returned.
  """
  b, t, h, c = q.shape
  scale = 1 / math.sqrt(c)

  def kernel(q_ref, y_ref, dy_ref, lse_ref, *refs):
    *operand_refs, dq_ref, delta_ref, q_smem, dy_smem, lse_smem, delta_smem, arrived = refs
    row, queries, numbered = _place(heads)
    for i, head in numbered:
      for ref, smem in ((q_ref, q_smem), (dy_ref, dy_smem)):
        plgpu.copy_gmem_to_smem(ref.at[row, queries, head], smem.at[i], arrived)
      plgpu.copy_gmem_to_smem(lse_ref.at[row, head, queries], lse_smem.at[i], arrived)
    walk = keys(*operand_refs)
    plgpu.barrier_wait(arrived)

    for i, head in numbered:
      y, dy = (hopper.load(x, hopper.MATRIX).astype(jnp.float32) for x in (y_ref.at[row, queries, head], dy_smem.at[i]))
      delta_smem[i] = (y * dy).sum(axis=1)
    plgpu.commit_smem()
    for i, head in numbered:
      plgpu.copy_smem_to_gmem(delta_smem.at[i], delta_ref.at[row, head, queries])

    def step(k_smem, v_smem, confine, dq):
      def with_block(i, dq):
        def by_row(smem):
          return rows_by(hopper.load(smem.at[i], hopper.BY_ROW), (BLOCK, BLOCK))

        def of_scores(scores, dp):
          p = jnp.exp2(confine(scores()) * (scale * LOG2E) - by_row(lse_smem))
          return (p * (dp() - by_row(delta_smem))).astype(q.dtype)

        ds = from_products(of_scores, (q_smem.at[i], k_smem.T), (dy_smem.at[i], v_smem.T))
        return plus_products([dq], (ds, k_smem))[0]

      return tuple(with_block(i, of_head) for i, of_head in enumerate(dq))

    dq = walk(step, (filled((BLOCK, c), 0.0, hopper.MATRIX),) * heads)
    for i, of_head in enumerate(dq):
      q_smem[i] = (of_head * scale).astype(q.dtype)
    plgpu.commit_smem()
    for i, head in numbered:
      plgpu.copy_smem_to_gmem(q_smem.at[i], dq_ref.at[row, queries, head])
    plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
    kernel,
    out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, h, t), jnp.float32)),
    scratch_types=(
      *[operand(c, q.dtype, heads)] * 2,
      *[plgpu.SMEM((heads, BLOCK), jnp.float32)] * 2,
      plgpu.Barrier(num_arrivals=3 * heads),
    ),
    grid=(b, t // BLOCK, h // heads),
    grid_names=("row", "tile", "heads"),
    compiler_params=COMPILER,
  )(q, y, dy, lse, *operands)


def _place(heads: int):
  """Returns a thread block's row, its queries in it, and its heads by their numbers in the block."""
  row, tile, first = lax.axis_index("row"), lax.axis_index("tile"), lax.axis_index("heads") * heads
  return row, pl.ds(tile * BLOCK, BLOCK), [(i, first + i) for i in range(heads)]


def _nothing_seen(width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns a head's carry before the first block: sums of values, largest scores, sums of weights."""
  return (
    filled((BLOCK, width), 0.0, hopper.MATRIX),
    filled((BLOCK,), -jnp.inf, hopper.BY_ROW),
    filled((BLOCK,), 0.0, hopper.BY_ROW),
  )


class _Weighed(NamedTuple):
  """The running softmax after a block's scores, before its values are added.

  Attributes:
    sums: of values, in units of the new largest score.
    top: the largest score, in units of log 2.
    total: Σ of the weights.
    p: the block's weights, a query in each row.
  """

  sums: jax.Array
  top: jax.Array
  total: jax.Array
  p: jax.Array


def _with_scores(sums, top, total, scores: jax.Array, scale: float) -> _Weighed:
  """Returns the running softmax after a block.

  Args:
    scores: q·k, a query in each row, −∞ where a key is not visible.
    scale: log2 e / √C.
  """
  new_top = jnp.maximum(top, scores.max(axis=1) * scale)
  # A query may see nothing of a whole block: nothing is subtracted until it has seen a key.
  shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)
  shrink = jnp.exp2(top - shift)
  p = jnp.exp2(scores * scale - rows_by(shift, scores.shape))
  return _Weighed(sums * rows_by(shrink, sums.shape), new_top, total * shrink + p.sum(axis=1), p)
