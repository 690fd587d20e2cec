"""The softcapped cross-entropy's two passes for Hopper GPUs, in Pallas' Mosaic GPU.

Both stream blocks of 64 rows through shared memory. Their bounds are memory and the unit for exp2 and 1/√x, three
calls a logit. Several thread blocks share a multiprocessor and hide each other's copies.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pgolf_jax.kernels import hopper
from pgolf_jax.kernels.numerics import BySign, softcap_and_tanh
from pgolf_jax.kernels.softcapped_xent.vjp import with_gradient

_ROWS = 64
_COLUMNS = 64
_STAGES = 4
_LOG2E = math.log2(math.e)
_SHAPE = (_ROWS, _COLUMNS)
_COMPILER = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


def obstacle(z_NxV, target_N, hint_N, *, cap_pos, cap_neg) -> str | None:
  """Returns why this backend cannot compute the operation for logits of this shape and type, or None."""
  if z_NxV.dtype not in (jnp.bfloat16, jnp.float16):
    return f"it needs bfloat16 or float16, not {z_NxV.dtype}"
  if z_NxV.shape[0] % _ROWS or z_NxV.shape[1] % _COLUMNS:
    return f"it needs N divisible by {_ROWS} and V by {_COLUMNS}, not N={z_NxV.shape[0]} and V={z_NxV.shape[1]}"
  return None


def _by_row(x: jax.Array) -> jax.Array:
  return lax.broadcast_in_dim(x, _SHAPE, [0])


def _constants(cap_pos: jax.Array, cap_neg: jax.Array) -> jax.Array:
  """Returns cap·log2 e and 2·log2 e/cap, each for positive and for other logits."""
  caps = jnp.stack([cap_pos, cap_neg])
  return jnp.concatenate([caps * _LOG2E, 2 * _LOG2E / caps])


def _tanh(exponent: jax.Array) -> jax.Array:
  """Returns tanh x for exponent = 2x·log2 e.

  tanh x = 1 − 2/(1 + exp 2x), with 1/y as (1/√y)², is precise to float32's rounding beside 1. The GPU's own tanh has
  11 bits, and a division takes several instructions more.
  """
  root = lax.rsqrt(1 + jnp.exp2(exponent))
  return 1 - 2 * (root * root)


def _capped(z_smem, constants: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
  """Returns a block's softcapped logits in units of log 2, and the tanh in them."""
  z = z_smem[...].astype(jnp.float32)
  return softcap_and_tanh(z, BySign(*constants[:2]), BySign(*constants[2:]), _tanh)


@jax.jit
def log_sum_exp(z_NxV: jax.Array, cap_pos: jax.Array, cap_neg: jax.Array) -> jax.Array:
  """Returns log Σ exp of each row; see `with_gradient`. A running maximum keeps the sums finite, whatever the caps."""
  n, v = z_NxV.shape

  def kernel(z_ref, constants_ref, lse_ref, lse_smem):
    rows = pl.ds(lax.axis_index("rows") * _ROWS, _ROWS)
    constants = [constants_ref[i] for i in range(4)]

    def step(_, z_smem, carry):
      top, total = carry
      logits, _ = _capped(z_smem, constants)
      plgpu.commit_smem()  # z has been read before a copy may overwrite it
      new_top = jnp.maximum(top, logits.max(axis=1))
      return new_top, total * jnp.exp2(top - new_top) + jnp.exp2(logits - _by_row(new_top)).sum(axis=1)

    top, total = plgpu.emit_pipeline(
      step,
      grid=(v // _COLUMNS,),
      in_specs=[plgpu.BlockSpec(_SHAPE, lambda i: (0, i), transforms=hopper.TILED)],
      max_concurrent_steps=_STAGES,
      init_carry=tuple(
        plgpu.layout_cast(jnp.full((_ROWS,), value, jnp.float32), hopper.BY_ROW) for value in (-jnp.inf, 0.0)
      ),
    )(z_ref.at[rows])
    lse_smem[...] = top / _LOG2E + jnp.log(total)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[rows])
    plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((n,), jnp.float32),
    scratch_types=(plgpu.SMEM((_ROWS,), jnp.float32),),
    grid=(n // _ROWS,),
    grid_names=("rows",),
    compiler_params=_COMPILER,
  )(z_NxV, _constants(cap_pos, cap_neg))


@jax.jit
def gradient(z_NxV, lse_N, target_N, d_target_N, hint_N, d_hint_N, d_lse_N, cap_pos, cap_neg) -> jax.Array:
  """Returns the cotangent of z; see `with_gradient`."""
  n, v = z_NxV.shape
  hinted = hint_N is not None
  vectors = (lse_N, d_lse_N, target_N, d_target_N, *((hint_N, d_hint_N) if hinted else ()))

  def kernel(z_ref, constants_ref, *refs):
    *vector_refs, dz_ref, dz_smem = refs
    rows = pl.ds(lax.axis_index("rows") * _ROWS, _ROWS)
    constants = [constants_ref[i] for i in range(4)]
    lse, d_lse, *picked = [hopper.load(ref.at[rows], hopper.BY_ROW) for ref in vector_refs]
    lse *= _LOG2E

    def step(index, z_smem):
      first, slot = index[0] * _COLUMNS, lax.rem(index[0], 2)
      logits, tanh = _capped(z_smem, constants)
      d_capped = _by_row(d_lse) * jnp.exp2(logits - _by_row(lse))
      column = first + plgpu.broadcasted_iota(jnp.int32, _SHAPE, 1, layout=hopper.MATRIX)
      for place, cotangent in zip(picked[::2], picked[1::2], strict=True):
        d_capped += jnp.where(column == _by_row(place), _by_row(cotangent), 0.0)
      plgpu.wait_smem_to_gmem(1, wait_read_only=True)
      dz_smem[slot] = (d_capped * (1 - tanh * tanh)).astype(z_NxV.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(dz_smem.at[slot], dz_ref.at[rows, pl.ds(first, _COLUMNS)])

    block = plgpu.BlockSpec(_SHAPE, lambda i: (0, i), transforms=hopper.TILED)
    plgpu.emit_pipeline(step, grid=(v // _COLUMNS,), in_specs=[block], max_concurrent_steps=_STAGES)(z_ref.at[rows])
    plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((n, v), z_NxV.dtype),
    scratch_types=(plgpu.SMEM((2, *_SHAPE), z_NxV.dtype, transforms=hopper.TILED),),
    grid=(n // _ROWS,),
    grid_names=("rows",),
    compiler_params=_COMPILER,
  )(z_NxV, _constants(cap_pos, cap_neg), *vectors)


softcapped_xent = with_gradient(log_sum_exp, gradient)
