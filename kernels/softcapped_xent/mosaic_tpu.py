"""The softcapped cross-entropy's two passes for TPUs, in Pallas' Mosaic TPU.

Both stream blocks of logits through VMEM, each logit once, and are bound by memory. Vectors with one number for each
row are stacked as the columns of one array, because a TPU pads an array of one column to 128.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pgolf_jax.kernels.numerics import BySign, softcap_and_tanh
from pgolf_jax.kernels.softcapped_xent.vjp import with_gradient

_LANES = 128
_ROWS = 256
"""Rows in a block; the last block may reach past the end of the rows."""
_COLUMNS = 2048
"""Columns in a block, at most."""
_PATCH = 16
"""Rows computed at once: as many as a packed register of 16-bit numbers holds."""


def obstacle(z_NxV, target_N, hint_N, *, cap_pos, cap_neg) -> str | None:
  """Returns why this backend cannot compute the operation for logits of this shape and type, or None."""
  if z_NxV.dtype not in (jnp.bfloat16, jnp.float32):
    return f"it needs bfloat16 or float32, not {z_NxV.dtype}"
  n, v = z_NxV.shape
  if n == 0 or v == 0 or v % _LANES:
    return f"it needs at least one row, and V divisible by {_LANES}, not N={n} and V={v}"
  return None


def _capped(z: jax.Array, caps: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
  """Returns a patch's softcapped logits, and the tanh in them; caps are those of `_call`."""
  return softcap_and_tanh(z.astype(jnp.float32), BySign(*caps[:2]), BySign(*caps[2:]))


def _patches(rows: int):
  """Returns a decorator that runs a function of a slice of rows for each patch of a block."""

  def run(f):
    @pl.loop(0, rows // _PATCH)
    def _(patch):
      f(pl.ds(pl.multiple_of(patch * _PATCH, _PATCH), _PATCH))

  return run


def _call(kernel, z_NxV, caps, by_row, *, output, scratch=()):
  """Runs kernel(z block, caps, blocks of by_row, block of the output, scratch) on a grid of rows and columns.

  The kernel reads four numbers as caps: those for positive and for other logits, then one over each.

  Args:
    by_row: arrays [N, S] of which each block reads its own rows.
    output: type of the result: an array [N, 1], written by rows, or [N, V], written by blocks.
    scratch: widths of float32 buffers with as many rows as a block.
  """
  n, v = z_NxV.shape
  rows = min(_ROWS, pl.cdiv(n, _PATCH) * _PATCH)
  columns = max(c for c in range(_LANES, min(_COLUMNS, v) + 1, _LANES) if v % c == 0)

  def spec(width):
    if width == v:
      return pl.BlockSpec((rows, columns), lambda i, j: (i, j))
    return pl.BlockSpec((rows, width), lambda i, j: (i, 0))

  caps = jnp.stack(caps)
  return pl.pallas_call(
    kernel,
    grid=(pl.cdiv(n, rows), v // columns),
    in_specs=[spec(v), pl.BlockSpec(memory_space=pltpu.SMEM), *[spec(x.shape[1]) for x in by_row]],
    out_specs=spec(output.shape[1]),
    out_shape=output,
    scratch_shapes=[pltpu.VMEM((rows, width), jnp.float32) for width in scratch],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
  )(z_NxV, jnp.concatenate([caps, 1 / caps]), *by_row)


@jax.jit
def log_sum_exp(z_NxV: jax.Array, cap_pos: jax.Array, cap_neg: jax.Array) -> jax.Array:
  """Returns log Σ exp of each row; see `with_gradient`. A running maximum keeps the sums finite, whatever the caps."""

  def kernel(z_ref, caps_ref, lse_ref, top_ref, total_ref):
    @pl.when(pl.program_id(1) == 0)
    def _():
      top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
      total_ref[...] = jnp.zeros_like(total_ref)

    caps = [caps_ref[i] for i in range(4)]

    @_patches(z_ref.shape[0])
    def _(rows):
      logits, _ = _capped(z_ref[rows], caps)
      top = top_ref[rows]
      new_top = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True))
      new = jnp.sum(jnp.exp(logits - new_top), axis=1, keepdims=True)
      total_ref[rows] = total_ref[rows] * jnp.exp(top - new_top) + new
      top_ref[rows] = new_top

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
      lse_ref[...] = top_ref[...] + jnp.log(total_ref[...])

  by_row = jax.ShapeDtypeStruct((z_NxV.shape[0], 1), jnp.float32)
  return _call(kernel, z_NxV, (cap_pos, cap_neg), (), output=by_row, scratch=(1, 1))[:, 0]


@jax.jit
def gradient(z_NxV, lse_N, target_N, d_target_N, hint_N, d_hint_N, d_lse_N, cap_pos, cap_neg) -> jax.Array:
  """Returns the cotangent of z; see `with_gradient`."""
  hinted = hint_N is not None
  numbers_NxS = jnp.stack([lse_N, d_lse_N, d_target_N, *([d_hint_N] if hinted else [])], axis=1)
  places_NxS = jnp.stack([target_N, *([hint_N] if hinted else [])], axis=1).astype(jnp.int32)

  def kernel(z_ref, caps_ref, numbers_ref, places_ref, dz_ref):
    first = pl.program_id(1) * z_ref.shape[1]
    caps = [caps_ref[i] for i in range(4)]

    @_patches(z_ref.shape[0])
    def _(rows):
      logits, tanh = _capped(z_ref[rows], caps)
      numbers, places = numbers_ref[rows], places_ref[rows]
      column = first + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
      d_capped = numbers[:, 1:2] * jnp.exp(logits - numbers[:, 0:1])
      for i in range(places.shape[1]):
        d_capped += jnp.where(column == places[:, i : i + 1], numbers[:, 2 + i : 3 + i], 0.0)
      dz_ref[rows] = (d_capped * (1 - tanh * tanh)).astype(dz_ref.dtype)

  output = jax.ShapeDtypeStruct(z_NxV.shape, z_NxV.dtype)
  return _call(kernel, z_NxV, (cap_pos, cap_neg), (numbers_NxS, places_NxS), output=output)


softcapped_xent = with_gradient(log_sum_exp, gradient)
