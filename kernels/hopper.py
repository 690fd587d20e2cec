"""What kernels for Hopper GPUs share: layouts, a walk over rows, and a call of Pallas that differs between releases."""

import inspect

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from pgolf_jax.kernels import hardware

TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
"""The layout in shared memory that wgmma needs for 16-bit operands of 64 columns or more."""

MATRIX = plgpu.Layout.WGMMA
"""The layout in which wgmma leaves its sums in a warpgroup's registers."""

BY_ROW = plgpu.Layout.WGMMA.reduce(1)
"""The layout of one number for each row of such a matrix."""

BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)
"""The layout of one number for each column of such a matrix."""

WARPS = 4
"""Warps of a warpgroup, and the rows that it takes at once, a warp each, where a kernel walks over rows."""

TILE_ROWS = 8
"""Rows that arrive and leave together where a kernel walks over rows."""

_STAGES = 2
"""Tiles of rows in flight."""

_BLOCKS = 2
"""Thread blocks that walk over rows for each multiprocessor, whose registers and shared memory they share."""

ROW_PART = 256
"""Numbers of a row that a warp holds in one register of 8 a thread, and the most that a copy takes along one axis."""

ROWS = plgpu.Layout.TILED(Tiling(((WARPS, 1, ROW_PART), (8,))), warp_dims=(-4,), lane_dims=(-2,), vector_dim=-1)
"""The layout of rows of some times `ROW_PART` numbers, [rows, parts, ROW_PART], each row in one warp."""


def load(ref, layout) -> jax.Array:
  """Returns what a reference in shared or global memory holds, in registers of that layout."""
  index = inspect.signature(plgpu.load).parameters.get("idx")
  # JAX 0.10 needs an index after the reference; later releases take it from the reference.
  whole = ((),) if index is not None and index.default is inspect.Parameter.empty else ()
  return plgpu.load(ref, *whole, layout=layout, optimized=False)


def store(ref, value: jax.Array) -> None:
  """Stores values to a reference in shared or global memory, however few of them a thread holds side by side."""
  if hasattr(plgpu, "store"):  # where it is, an assignment reads what it replaces, in wide parts alone
    plgpu.store(ref, value, optimized=False)
  else:
    ref[...] = value


def rows_grid(rows: int) -> dict:
  """Returns the arguments of `plgpu.kernel` for thread blocks that walk over so many rows, a multiple of a tile's."""
  return {
    "grid": (min(_BLOCKS * hardware.target().cores, rows // TILE_ROWS),),
    "grid_names": ("block",),
    "compiler_params": plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
  }


def leaving(like) -> plgpu.SMEM:
  """Returns room for two tiles of an array on their way out."""
  return plgpu.SMEM((2, TILE_ROWS, *like.shape[1:]), like.dtype)


def over_rows(compute, inputs, outputs, carry=()):
  """Runs a thread block's share of the rows, a multiple of a tile's, and returns the last carry.

  Args:
    compute: (rows, *values of the inputs in float32, carry) → (values of the outputs, carry), for `WARPS` rows.
    inputs: pairs of a reference [rows, …] in global memory and a layout.
    outputs: pairs of such a reference and of what `leaving` gave room for.
  """
  tiles = inputs[0][0].shape[0] // TILE_ROWS
  block, blocks = lax.axis_index("block"), lax.axis_size("block")

  def step(index, *refs):
    *smems, carry = refs
    first, slot = (block + index[0] * blocks) * TILE_ROWS, lax.rem(index[0], 2)
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    for i in range(0, TILE_ROWS, WARPS):
      here = pl.ds(i, WARPS)
      values = [load(smem.at[here], layout) for smem, (_, layout) in zip(smems, inputs, strict=True)]
      results, carry = compute(pl.ds(first + i, WARPS), *(x.astype(jnp.float32) for x in values), carry)
      for (_, smem), value in zip(outputs, results, strict=True):
        smem[slot, here] = value.astype(smem.dtype)
    plgpu.commit_smem()
    for ref, smem in outputs:
      plgpu.copy_smem_to_gmem(smem.at[slot], ref.at[pl.ds(first, TILE_ROWS)], commit_group=False)
    plgpu.commit_smem_to_gmem_group()
    return carry

  def tile_of(ref) -> plgpu.BlockSpec:
    return plgpu.BlockSpec((TILE_ROWS, *ref.shape[1:]), lambda i: (block + i * blocks, *[0] * (len(ref.shape) - 1)))

  carry = plgpu.emit_pipeline(
    step,
    grid=(lax.div(tiles - block + blocks - 1, blocks),),
    in_specs=[tile_of(ref) for ref, _ in inputs],
    max_concurrent_steps=_STAGES,
    init_carry=carry,
  )(*(ref for ref, _ in inputs))
  plgpu.wait_smem_to_gmem(0)
  return carry


def spread(x: jax.Array, shape: tuple[int, ...], axes: tuple[int, ...], layout) -> jax.Array:
  """Returns x, whose axes are these of the shape, repeated over the others."""
  return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, axes), layout)
