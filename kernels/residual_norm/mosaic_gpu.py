"""The residual sum and its norm for Hopper GPUs, in Pallas' Mosaic GPU: one pass over memory forward, one backward.

A row lies in the registers of one warp, which sums over it without a barrier. Every thread keeps to its columns, so
that the factors' gradients, sums over all rows, add up in registers as well; a thread block writes four rows of them,
one for each warp, at its end.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pgolf_jax.kernels import hardware, hopper
from pgolf_jax.kernels.numerics import EPS

_ROWS = 8
"""Rows of a tile, which arrive and leave together."""
_STAGES = 2
"""Tiles in flight."""
_WIDTHS = (256, 512)
_BLOCKS = 2
"""Thread blocks for each multiprocessor, which share its registers and shared memory."""


def obstacle(x_BxTxD, added_BxTxD, add_D, keep_D, *, scale: float) -> str | None:
  """Returns why this backend cannot compute the operation for these shapes and types, or None."""
  if x_BxTxD.dtype not in (jnp.bfloat16, jnp.float16):
    return f"it needs bfloat16 or float16, not {x_BxTxD.dtype}"
  width, rows = x_BxTxD.shape[-1], x_BxTxD.size // x_BxTxD.shape[-1]
  if width not in _WIDTHS or rows % _ROWS:
    return f"it needs rows of 256 or 512 numbers, a multiple of {_ROWS} in all, not {rows} of {width}"
  return None


def residual_norm(
  x_BxTxD: jax.Array, added_BxTxD: jax.Array, add_D: jax.Array, keep_D: jax.Array | None, *, scale: float
) -> tuple[jax.Array, jax.Array]:
  """Computes the operation."""
  x, added = (a.reshape(-1, *_parts(add_D)) for a in (x_BxTxD, added_BxTxD))
  add, keep = (None if factor is None else factor.reshape(_parts(factor)) for factor in (add_D, keep_D))
  y, n = _differentiable(x, added, add, keep, scale)
  return y.reshape(x_BxTxD.shape), n.reshape(x_BxTxD.shape)


def _parts(factor_D: jax.Array) -> tuple[int, int]:
  return factor_D.shape[0] // hopper.ROW_PART, hopper.ROW_PART


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _differentiable(x, added, add, keep, scale):
  return _sum_and_norm(x, added, add, keep, scale)


def _forward(x, added, add, keep, scale):
  return _sum_and_norm(x, added, add, keep, scale), (x, added, add, keep)


def _backward(scale, residuals, cotangents):
  keep = residuals[3]
  dx, d_added, *d_factors = _gradients(*residuals, *cotangents, scale)
  d_add, d_keep = (*(d.sum((0, 1)) for d in d_factors), None)[:2]
  return dx, d_added, d_add, d_keep if keep is not None else None


_differentiable.defvjp(_forward, _backward)


def _sum(x: jax.Array, added: jax.Array, add: jax.Array, keep: jax.Array | None, dtype) -> jax.Array:
  """Returns the sum as it is stored, in float32."""
  y = (x if keep is None else x * keep) + added * add
  return y.astype(dtype).astype(jnp.float32)


def _inverse_norm(y: jax.Array) -> jax.Array:
  return lax.rsqrt(_mean(y * y) + EPS)


def _mean(x: jax.Array) -> jax.Array:
  """Returns the mean of each row."""
  return x.sum(axis=1).sum(axis=1) * (1 / math.prod(x.shape[1:]))


def _spread(x: jax.Array, shape: tuple[int, int, int], *axes: int) -> jax.Array:
  return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, axes), hopper.ROWS)


def _over_tiles(compute, in_refs, out_refs, out_smems, sums):
  """Runs this thread block's share of the tiles of the arrays, and returns the sums.

  Args:
    compute: (inputs of four rows, sums) → (outputs of these rows, sums), all in float32.
    out_smems: two tiles for each output, on their way out.
  """
  tiles, *width = in_refs[0].shape
  tiles //= _ROWS
  block, blocks = lax.axis_index("block"), lax.axis_size("block")

  def step(index, *refs):
    *in_smems, sums = refs
    slot = lax.rem(index[0], 2)
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    for first in range(0, _ROWS, hopper.WARPS):  # the warps take a row each
      rows = pl.ds(first, hopper.WARPS)
      inputs = [hopper.load(smem.at[rows], hopper.ROWS).astype(jnp.float32) for smem in in_smems]
      outputs, sums = compute(*inputs, sums)
      for smem, value in zip(out_smems, outputs, strict=True):
        smem[slot, rows] = value.astype(smem.dtype)
    plgpu.commit_smem()
    for smem, ref in zip(out_smems, out_refs, strict=True):
      tile = pl.ds((block + index[0] * blocks) * _ROWS, _ROWS)
      plgpu.copy_smem_to_gmem(smem.at[slot], ref.at[tile], commit_group=False)
    plgpu.commit_smem_to_gmem_group()
    return sums

  sums = plgpu.emit_pipeline(
    step,
    grid=(lax.div(tiles - block + blocks - 1, blocks),),
    in_specs=[plgpu.BlockSpec((_ROWS, *width), lambda i: (block + i * blocks, 0, 0))] * len(in_refs),
    max_concurrent_steps=_STAGES,
    init_carry=sums,
  )(*in_refs)
  plgpu.wait_smem_to_gmem(0)
  return sums


@functools.partial(jax.jit, static_argnums=4)
def _sum_and_norm(x, added, add, keep, scale):
  """Returns y and its norm."""
  factors, shape = _factors(add, keep), (hopper.WARPS, *x.shape[1:])

  def kernel(x_ref, added_ref, *refs):
    factor_refs, out_refs, out_smems = refs[:-4], refs[-4:-2], refs[-2:]
    add_D, keep_D = _read(factor_refs, shape)

    def compute(x_rows, added_rows, sums):
      y = _sum(x_rows, added_rows, add_D, keep_D, x.dtype)
      return (y, y * _spread(_inverse_norm(y) * scale, shape, 0)), sums

    _over_tiles(compute, (x_ref, added_ref), out_refs, out_smems, ())

  like = jax.ShapeDtypeStruct(x.shape, x.dtype)
  return plgpu.kernel(kernel, out_type=(like, like), scratch_types=_leaving(x), **_grid(x))(x, added, *factors)


@functools.partial(jax.jit, static_argnums=6)
def _gradients(x, added, add, keep, dy, dn, scale):
  """Returns the cotangents of x and of what is added, and of each factor one sum for each warp of each thread block.

  With y the sum, r = 1/√(mean y² + ε) and u = scale · dn, the sum's cotangent is dy + r·(u − y·r²·mean uy).
  """
  factors, shape = _factors(add, keep), (hopper.WARPS, *x.shape[1:])
  count = len(factors)

  def kernel(x_ref, added_ref, dy_ref, dn_ref, *refs):
    factor_refs, refs = refs[:count], refs[count:]
    out_refs, sum_refs, (*out_smems, sum_smem) = refs[:2], refs[2:][:count], refs[2 + count :]
    add_D, keep_D = _read(factor_refs, shape)

    def compute(x_rows, added_rows, dy_rows, dn_rows, sums):
      y = _sum(x_rows, added_rows, add_D, keep_D, x.dtype)
      norm = _inverse_norm(y)
      along = _mean(dn_rows * y) * norm * norm
      d = dy_rows + (dn_rows - y * _spread(along, shape, 0)) * _spread(norm * scale, shape, 0)
      sums = tuple(total + d * rows for total, rows in zip(sums, (added_rows, x_rows), strict=False))
      return (d if keep_D is None else d * keep_D, d * add_D), sums

    zeros = tuple(plgpu.layout_cast(jnp.zeros(shape, jnp.float32), hopper.ROWS) for _ in factors)
    sums = _over_tiles(compute, (x_ref, added_ref, dy_ref, dn_ref), out_refs, out_smems, zeros)
    for total, ref in zip(sums, sum_refs, strict=True):
      sum_smem[...] = total
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(sum_smem, ref.at[lax.axis_index("block")])
      plgpu.wait_smem_to_gmem(0)

  like, grid = jax.ShapeDtypeStruct(x.shape, x.dtype), _grid(x)
  sums = jax.ShapeDtypeStruct((*grid["grid"], *shape), jnp.float32)
  scratch = (*_leaving(x), plgpu.SMEM(shape, jnp.float32))
  call = plgpu.kernel(kernel, out_type=(like, like, *[sums] * count), scratch_types=scratch, **grid)
  return call(x, added, dy, dn, *factors)


def _factors(add: jax.Array, keep: jax.Array | None) -> tuple[jax.Array, ...]:
  return (add,) if keep is None else (add, keep)


def _read(factor_refs, shape: tuple[int, int, int]) -> tuple[jax.Array, jax.Array | None]:
  """Returns the factors of what is added and of x, repeated over rows; the second is None where there is none."""
  factors = [_spread(hopper.load(ref, hopper.ROWS.reduce(0)), shape, 1, 2) for ref in factor_refs]
  return (*factors, None)[:2]


def _leaving(x: jax.Array) -> tuple[plgpu.SMEM, plgpu.SMEM]:
  """Two tiles for each of two outputs, on their way out."""
  return (plgpu.SMEM((2, _ROWS, *x.shape[1:]), x.dtype),) * 2


def _grid(x: jax.Array) -> dict:
  return {
    "grid": (min(_BLOCKS * hardware.target().cores, x.shape[0] // _ROWS),),
    "grid_names": ("block",),
    "compiler_params": plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
  }
