"""The softcapped cross-entropy's two passes for TPUs, in Pallas' Mosaic TPU.

Both stream blocks of logits through VMEM, each logit once, and are bound by memory. What there is one number a row of
travels as columns of one array, because a TPU lays a column out as wide as 128 of them.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128
_ROWS = 256
"""Of a block; the last one may be cut off by the end of the rows."""
_COLUMNS = 2048
"""Of a block, at most."""
_PATCH = 16
"""Rows handled at once: a packed register's of 16-bit numbers."""


def obstacle(z_NxV) -> str | None:
  """Why logits of this shape and type cannot take this backend, or None."""
  if z_NxV.dtype not in (jnp.bfloat16, jnp.float32):
    return f"it needs bfloat16 or float32, not {z_NxV.dtype}"
  n, v = z_NxV.shape
  if n == 0 or v == 0 or v % _LANES:
    return f"it needs a row at least, and V divisible by {_LANES}, not N={n} and V={v}"
  return None


def _softcap(z: jax.Array, caps: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
  """A patch's softcapped logits, and the tanh in them; caps are those of `_call`."""
  z = z.astype(jnp.float32)
  positive = z > 0
  tanh = jnp.tanh(z * jnp.where(positive, caps[2], caps[3]))
  return tanh * jnp.where(positive, caps[0], caps[1]), tanh


def _patches(rows: int):
  """Runs a function of a slice of rows for each patch of a block."""

  def run(f):
    @pl.loop(0, rows // _PATCH)
    def _(patch):
      f(pl.ds(pl.multiple_of(patch * _PATCH, _PATCH), _PATCH))

  return run


def _call(kernel, z_NxV, caps, by_row, *, output, scratch=()):
  """Runs kernel(z block, caps, blocks of by_row, block of the output, scratch) on a grid of rows and columns.

  The kernel gets the caps for positive and for other logits, then one over each.

  Args:
    by_row: arrays [N, S] of which the kernel sees the block's rows.
    output: type of an array [N, 1], seen by rows, or [N, V], seen by block.
    scratch: widths of float32 buffers, each as many rows as a block has.
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
  """See xla.py. The sums run beside a running maximum, so that any caps will do."""

  def kernel(z_ref, caps_ref, lse_ref, top_ref, total_ref):
    @pl.when(pl.program_id(1) == 0)
    def _():
      top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
      total_ref[...] = jnp.zeros_like(total_ref)

    caps = [caps_ref[i] for i in range(4)]

    @_patches(z_ref.shape[0])
    def _(rows):
      logits, _ = _softcap(z_ref[rows], caps)
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
  """See xla.py."""
  hinted = hint_N is not None
  numbers_NxS = jnp.stack([lse_N, d_lse_N, d_target_N, *([d_hint_N] if hinted else [])], axis=1)
  places_NxS = jnp.stack([target_N, *([hint_N] if hinted else [])], axis=1).astype(jnp.int32)

  def kernel(z_ref, caps_ref, numbers_ref, places_ref, dz_ref):
    first = pl.program_id(1) * z_ref.shape[1]
    caps = [caps_ref[i] for i in range(4)]

    @_patches(z_ref.shape[0])
    def _(rows):
      logits, tanh = _softcap(z_ref[rows], caps)
      numbers, places = numbers_ref[rows], places_ref[rows]
      column = first + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
      d_capped = numbers[:, 1:2] * jnp.exp(logits - numbers[:, 0:1])
      for i in range(places.shape[1]):
        d_capped += jnp.where(column == places[:, i : i + 1], numbers[:, 2 + i : 3 + i], 0.0)
      dz_ref[rows] = (d_capped * (1 - tanh * tanh)).astype(dz_ref.dtype)

  output = jax.ShapeDtypeStruct(z_NxV.shape, z_NxV.dtype)
  return _call(kernel, z_NxV, (cap_pos, cap_neg), (numbers_NxS, places_NxS), output=output)
