"""What the kernels for Hopper GPUs share: operand layouts, and Pallas' Mosaic GPU calls that differ by JAX release."""

import inspect

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
"""How wgmma wants 16-bit operands of 64 columns or more in shared memory."""

MATRIX = plgpu.Layout.WGMMA
"""How wgmma leaves its sums in a warpgroup's registers."""

BY_ROW = plgpu.Layout.WGMMA.reduce(1)
"""One number for each row of such a matrix."""

BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)
"""One number for each column of such a matrix."""

_INDEX = inspect.signature(plgpu.load).parameters.get("idx")
_NO_INDEX = ((),) if _INDEX is not None and _INDEX.default is inspect.Parameter.empty else ()


def load(ref, layout) -> jax.Array:
  """What a reference in shared or global memory holds, in registers of that layout."""
  return plgpu.load(ref, *_NO_INDEX, layout=layout, optimized=False)
