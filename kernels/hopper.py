"""Operand layouts for kernels on Hopper GPUs, and a Mosaic GPU call of Pallas that differs between JAX releases."""

import inspect

import jax
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
"""The layout in shared memory that wgmma needs for 16-bit operands of 64 columns or more."""

MATRIX = plgpu.Layout.WGMMA
"""The layout in which wgmma leaves its sums in a warpgroup's registers."""

BY_ROW = plgpu.Layout.WGMMA.reduce(1)
"""The layout of one number for each row of such a matrix."""

BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)
"""The layout of one number for each column of such a matrix."""

WARPS = 4
"""Warps of a warpgroup."""

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
