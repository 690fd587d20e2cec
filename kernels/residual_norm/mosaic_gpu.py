"""The residual sum and its norm for Hopper GPUs, in Pallas' Mosaic GPU: one pass over memory forward, one backward.

A row lies in the registers of one warp, which sums over it without a barrier. Every thread keeps to its columns, so
that the factors' gradients, sums over all rows, add up in registers as well; a thread block writes four rows of them,
one for each warp, at its end. The norm's scale is read from memory, so that all layers share one compiled kernel.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pgolf_jax.kernels import hopper
from pgolf_jax.kernels.numerics import EPS

_WIDTHS = (256, 512)


def obstacle(x_BxTxD, added_BxTxD, add_D, keep_D, *, scale: float) -> str | None:
  """Returns why this backend cannot compute the operation for these shapes and types, or None."""
  if x_BxTxD.dtype not in (jnp.bfloat16, jnp.float16):
    return f"it needs bfloat16 or float16, not {x_BxTxD.dtype}"
  width, rows = x_BxTxD.shape[-1], x_BxTxD.size // x_BxTxD.shape[-1]
  if width not in _WIDTHS or rows % hopper.TILE_ROWS:
    return f"it needs rows of 256 or 512 numbers, a multiple of {hopper.TILE_ROWS} in all, not {rows} of {width}"
  return None


def residual_norm(
  x_BxTxD: jax.Array, added_BxTxD: jax.Array, add_D: jax.Array, keep_D: jax.Array | None, *, scale: float
) -> tuple[jax.Array, jax.Array]:
  """Computes the operation."""
  x, added = (a.reshape(-1, *_parts(add_D)) for a in (x_BxTxD, added_BxTxD))
  add, keep = (None if factor is None else factor.reshape(_parts(factor)) for factor in (add_D, keep_D))
  y, n = _differentiable(x, added, add, keep, jnp.full(1, scale, jnp.float32))
  return y.reshape(x_BxTxD.shape), n.reshape(x_BxTxD.shape)


def _parts(factor_D: jax.Array) -> tuple[int, int]:
  return factor_D.shape[0] // hopper.ROW_PART, hopper.ROW_PART


@jax.custom_vjp
def _differentiable(*arguments):
  return _sum_and_norm(*arguments)


def _backward(residuals, cotangents):
  dx, d_added, *d_factors = _gradients(*residuals, *cotangents)
  d_add, d_keep = (*(d.sum((0, 1)) for d in d_factors), None)[:2]
  return dx, d_added, d_add, d_keep, None


_differentiable.defvjp(lambda *arguments: (_sum_and_norm(*arguments), arguments), _backward)


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
  return hopper.spread(x, shape, axes, hopper.ROWS)


def _lanes(*refs):
  return [(ref, hopper.ROWS) for ref in refs]


@jax.jit
def _sum_and_norm(x, added, add, keep, scale_1):
  """Returns y and its norm."""
  factors, shape = _factors(add, keep), (hopper.WARPS, *x.shape[1:])

  def kernel(x_ref, added_ref, scale_ref, *refs):
    factor_refs, out_refs, out_smems = refs[:-4], refs[-4:-2], refs[-2:]
    add_D, keep_D = _read(factor_refs, shape)
    scale = scale_ref[0]

    def compute(_, x_rows, added_rows, nothing):
      y = _sum(x_rows, added_rows, add_D, keep_D, x.dtype)
      return (y, y * _spread(_inverse_norm(y) * scale, shape, 0)), nothing

    hopper.over_rows(compute, _lanes(x_ref, added_ref), list(zip(out_refs, out_smems, strict=True)))

  like = jax.ShapeDtypeStruct(x.shape, x.dtype)
  scratch, grid = (hopper.leaving(x),) * 2, hopper.rows_grid(len(x))
  return plgpu.kernel(kernel, out_type=(like, like), scratch_types=scratch, **grid)(x, added, scale_1, *factors)


@jax.jit
def _gradients(x, added, add, keep, scale_1, dy, dn):
  """Returns the cotangents of x and of what is added, and of each factor one sum for each warp of each thread block.

  With y the sum, r = 1/√(mean y² + ε) and u = scale · dn, the sum's cotangent is dy + r·(u − y·r²·mean uy).
  """
  factors, shape = _factors(add, keep), (hopper.WARPS, *x.shape[1:])
  count = len(factors)

  def kernel(x_ref, added_ref, scale_ref, dy_ref, dn_ref, *refs):
    factor_refs, refs = refs[:count], refs[count:]
    out_refs, sum_refs, (*out_smems, sum_smem) = refs[:2], refs[2:][:count], refs[2 + count :]
    add_D, keep_D = _read(factor_refs, shape)
    scale = scale_ref[0]

    def compute(_, x_rows, added_rows, dy_rows, dn_rows, sums):
      y = _sum(x_rows, added_rows, add_D, keep_D, x.dtype)
      norm = _inverse_norm(y)
      along = _mean(dn_rows * y) * norm * norm
      d = dy_rows + (dn_rows - y * _spread(along, shape, 0)) * _spread(norm * scale, shape, 0)
      sums = tuple(total + d * rows for total, rows in zip(sums, (added_rows, x_rows), strict=False))
      return (d if keep_D is None else d * keep_D, d * add_D), sums

    zeros = tuple(plgpu.layout_cast(jnp.zeros(shape, jnp.float32), hopper.ROWS) for _ in factors)
    inputs, outputs = _lanes(x_ref, added_ref, dy_ref, dn_ref), list(zip(out_refs, out_smems, strict=True))
    sums = hopper.over_rows(compute, inputs, outputs, zeros)
    for total, ref in zip(sums, sum_refs, strict=True):
      hopper.store(sum_smem, total)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(sum_smem, ref.at[lax.axis_index("block")])
      plgpu.wait_smem_to_gmem(0)

  like, grid = jax.ShapeDtypeStruct(x.shape, x.dtype), hopper.rows_grid(len(x))
  sums = jax.ShapeDtypeStruct((*grid["grid"], *shape), jnp.float32)
  scratch = (*[hopper.leaving(x)] * 2, plgpu.SMEM(shape, jnp.float32))
  call = plgpu.kernel(kernel, out_type=(like, like, *[sums] * count), scratch_types=scratch, **grid)
  return call(x, added, scale_1, dy, dn, *factors)


def _factors(add: jax.Array, keep: jax.Array | None) -> tuple[jax.Array, ...]:
  return (add,) if keep is None else (add, keep)


def _read(factor_refs, shape: tuple[int, int, int]) -> tuple[jax.Array, jax.Array | None]:
  """Returns the factors of what is added and of x, repeated over rows; the second is None where there is none."""
  factors = [_spread(hopper.load(ref, hopper.ROWS.reduce(0)), shape, 1, 2) for ref in factor_refs]
  return (*factors, None)[:2]
