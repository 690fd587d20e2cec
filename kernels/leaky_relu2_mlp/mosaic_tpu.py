"""The LeakyReLU² MLP's two fused products for TPUs, in Pallas' Mosaic TPU.

Both are tiled matrix products that add up in a float32 accumulator in VMEM; the activation and its derivative live in
the epilogue, so that no pass over [N, F] is left to anything else. All of F up to 4 KiB a row is one tile: the matrix
is then fetched once and stays in VMEM while the tokens pass. Each is jitted on its own, so that a model of many layers
traces and lowers it once.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128
_TILE_N = 256
"""Tokens of a tile; the last one may be cut off by the end of the rows."""
_TILE_F_BYTES = 4096
"""Of a row of a tile of u, at most: two copies of every block and the accumulator then take 11 of VMEM's 16 MiB."""
_TILE_D = 512
"""Summed at a time, at most."""
_PATCH_N = 16
"""Rows that the epilogue handles at once: a packed register's of 16-bit numbers."""


def obstacle(x_NxD, up_FxD) -> str | None:
  """Why arguments of these shapes and types cannot take this backend, or None."""
  if x_NxD.dtype not in (jnp.bfloat16, jnp.float32):
    return f"it needs bfloat16 or float32, not {x_NxD.dtype}"
  f, d = up_FxD.shape
  if x_NxD.shape[0] == 0 or d % _LANES or f % _LANES:
    return f"it needs a token at least, and D and F divisible by {_LANES}, not N={x_NxD.shape[0]}, D={d} and F={f}"
  return None


@functools.partial(jax.jit, static_argnames="slope")
def up(x_NxD: jax.Array, up_FxD: jax.Array, *, slope: float) -> tuple[jax.Array, jax.Array]:
  """See xla.py."""
  dtype = x_NxD.dtype

  def epilogue(acc, rows, u_ref, a_ref):
    u = acc.astype(dtype)
    u_ref[rows] = u
    # The slope is at most 1, so that the greater of u and slope·u is LeakyReLU.
    leaky = jnp.maximum(u.astype(jnp.float32), slope * u.astype(jnp.float32))
    a_ref[rows] = (leaky * leaky).astype(dtype)

  u_NxF, a_NxF = _fused_product(x_NxD, up_FxD, "fd", outputs=2, epilogue=epilogue)
  return u_NxF, a_NxF


@functools.partial(jax.jit, static_argnames="slope")
def up_gradient(dy_NxD: jax.Array, down_DxF: jax.Array, u_NxF: jax.Array, *, slope: float) -> jax.Array:
  """See xla.py."""

  def epilogue(acc, rows, u_ref, du_ref):
    u = u_ref[rows].astype(jnp.float32)
    du_ref[rows] = (acc * (2 * jnp.maximum(u, slope * slope * u))).astype(du_ref.dtype)

  return _fused_product(dy_NxD, down_DxF, "df", u_NxF, outputs=1, epilogue=epilogue)[0]


def _largest_tile(size: int, most: int) -> int:
  """The greatest whole number of lanes, at most `most` elements, that divides `size`."""
  return max(tile for tile in range(_LANES, min(size, most) + 1, _LANES) if size % tile == 0)


def _fused_product(x_NxD, w, layout, *operands, outputs, epilogue):
  """Tiles of x · w, each handed over patch by patch before it is written.

  Args:
    w: the matrix, [F, D] where layout is "fd", [D, F] where it is "df".
    operands: further arrays [N, F] that the epilogue reads.
    outputs: how many arrays [N, F] of the type of x the epilogue writes.
    epilogue: (float32 [_PATCH_N, F tile] sums, rows, blocks of operands and outputs) → None; rows are where in the
      blocks these sums belong.
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
