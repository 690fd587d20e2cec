"""The LeakyReLU² MLP's two fused products for TPUs, in Pallas' Mosaic TPU.

Both are tiled matrix products that sum in a float32 accumulator in VMEM. The epilogue applies the activation or its
derivative, which saves a pass over [N, F] through memory. A row of F of up to 4 KiB is one tile: the matrix is then
fetched once and stays in VMEM while the tokens pass. Each product has a jit around it, so that a model of many layers
traces and lowers it once.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pgolf_jax.kernels.leaky_relu2_mlp import with_gradient

_LANES = 128
_TILE_N = 256
"""Tokens in a tile; the last tile may reach past the end of the rows."""
_TILE_F_BYTES = 4096
"""Bytes in a row of a tile of u, at most: with two copies of all blocks this takes 11 of VMEM's 16 MiB."""
_TILE_D = 512
"""Terms summed in one step, at most."""
_PATCH_N = 16
"""Rows in which the epilogue works: as many as a packed register of 16-bit numbers holds."""


def obstacle(x_NxD, up_FxD, down_DxF, *, slope: float) -> str | None:
  """Returns why this backend cannot compute the operation for these shapes and types, or None."""
  if x_NxD.dtype not in (jnp.bfloat16, jnp.float32):
    return f"it needs bfloat16 or float32, not {x_NxD.dtype}"
  f, d = up_FxD.shape
  if x_NxD.shape[0] == 0 or d % _LANES or f % _LANES:
    return f"it needs at least one token, and D and F divisible by {_LANES}, not N={x_NxD.shape[0]}, D={d} and F={f}"
  return None


@functools.partial(jax.jit, static_argnames="slope")
def up(x_NxD: jax.Array, up_FxD: jax.Array, *, slope: float) -> tuple[jax.Array, jax.Array]:
  """Returns u = up · x and φ(u); see `with_gradient`."""
  dtype = x_NxD.dtype

  def epilogue(acc, rows, u_ref, a_ref):
    u = acc.astype(dtype)
    u_ref[rows] = u
    # The slope is at most 1, so LeakyReLU is the greater of u and slope·u.
    leaky = jnp.maximum(u.astype(jnp.float32), slope * u.astype(jnp.float32))
    a_ref[rows] = (leaky * leaky).astype(dtype)

  u_NxF, a_NxF = _fused_product(x_NxD, up_FxD, "fd", outputs=2, epilogue=epilogue)
  return u_NxF, a_NxF


@functools.partial(jax.jit, static_argnames="slope")
def up_gradient(dy_NxD: jax.Array, down_DxF: jax.Array, u_NxF: jax.Array, *, slope: float) -> jax.Array:
  """Returns the cotangent of u; see `with_gradient`."""

  def epilogue(acc, rows, u_ref, du_ref):
    u = u_ref[rows].astype(jnp.float32)
    du_ref[rows] = (acc * (2 * jnp.maximum(u, slope * slope * u))).astype(du_ref.dtype)

  return _fused_product(dy_NxD, down_DxF, "df", u_NxF, outputs=1, epilogue=epilogue)[0]


def _largest_tile(size: int, most: int) -> int:
  """Returns the greatest multiple of the lanes that divides `size` and is at most `most`."""
  return max(tile for tile in range(_LANES, min(size, most) + 1, _LANES) if size % tile == 0)


def _fused_product(x_NxD, w, layout, *operands, outputs, epilogue):
  """Computes x · w tile by tile and returns what the epilogue writes.

  Args:
    w: the matrix, [F, D] where layout is "fd", [D, F] where it is "df".
    operands: further arrays [N, F] that the epilogue reads.
    outputs: how many arrays [N, F] of the type of x the epilogue writes.
    epilogue: (float32 [_PATCH_N, F tile] sums, rows, blocks of operands and outputs) → None; rows are the place of
      these sums in the blocks.
  """
  n, d = x_NxD.shape
  f = w.shape[layout.index("f")]
  tile_d, tile_f = _largest_tile(d, _TILE_D), _largest_tile(f, _TILE_F_BYTES // x_NxD.dtype.itemsize)
  tile_n = min(_TILE_N, pl.cdiv(n, _PATCH_N) * _PATCH_N)
  d_steps = d // tile_d
  summed = (((1,), (layout.index("d"),)), ((), ()))

  def kernel(x_ref, w_ref, *refs):
    *blocks, acc_ref = refs
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
      acc_ref[...] = jnp.zeros_like(acc_ref)

    acc_ref[...] += lax.dot_general(x_ref[...], w_ref[...], summed, preferred_element_type=jnp.float32)

    @pl.when(step == d_steps - 1)
    def _():
      @pl.loop(0, tile_n // _PATCH_N)
      def _(patch):
        rows = pl.ds(pl.multiple_of(patch * _PATCH_N, _PATCH_N), _PATCH_N)
        epilogue(acc_ref[rows], rows, *blocks)

  # Columns move slowest and the sums fastest: a block that stays where it was is not fetched again.
  at_w = {"fd": lambda j, i, k: (j, k), "df": lambda j, i, k: (k, j)}[layout]
  tile = pl.BlockSpec((tile_n, tile_f), lambda j, i, k: (i, j))
  return pl.pallas_call(
    kernel,
    grid=(f // tile_f, pl.cdiv(n, tile_n), d_steps),
    in_specs=[
      pl.BlockSpec((tile_n, tile_d), lambda j, i, k: (i, k)),
      pl.BlockSpec((tile_f, tile_d) if layout == "fd" else (tile_d, tile_f), at_w),
      *[tile] * len(operands),
    ],
    out_specs=[tile] * outputs,
    out_shape=[jax.ShapeDtypeStruct((n, f), x_NxD.dtype)] * outputs,
    scratch_shapes=[pltpu.VMEM((tile_n, tile_f), jnp.float32)],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
  )(x_NxD, w, *operands)


leaky_relu2_mlp = with_gradient(up, up_gradient)
