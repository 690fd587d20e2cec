"""XSA and the gate for Hopper GPUs, in Pallas' Mosaic GPU: one pass over memory forward, one backward.

All heads of a position lie in the registers of one warp, some lanes to a head, so that sums over a head are sums over
these lanes, and the heads of a value lie side by side.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from pgolf_jax.kernels import hopper


def obstacle(y_BxTxHxC, v_BxTxKxC, gate_BxTxH, *, scale: float) -> str | None:
  """Returns why this backend cannot compute the operation for these shapes and types, or None."""
  (b, t, h, c), kv_heads = y_BxTxHxC.shape, v_BxTxKxC.shape[2]
  if gate_BxTxH is None:
    return "it needs a gate"
  if y_BxTxHxC.dtype not in (jnp.bfloat16, jnp.float16):
    return f"it needs bfloat16 or float16, not {y_BxTxHxC.dtype}"
  if c not in (64, 128) or hopper.ROW_PART % (h // kv_heads * c) or h * c % hopper.ROW_PART or h * c > 512:
    return f"it needs heads of 64 or 128 numbers, 256 or 512 in all, not {h} of {c} for {kv_heads} values"
  if b * t % hopper.TILE_ROWS:
    return f"it needs a multiple of {hopper.TILE_ROWS} positions, not {b * t}"
  return None


def gated_xsa(y_BxTxHxC: jax.Array, v_BxTxKxC: jax.Array, gate_BxTxH: jax.Array, *, scale: float) -> jax.Array:
  """Computes the operation."""
  kv_heads, c = v_BxTxKxC.shape[2:]
  y, v = y_BxTxHxC.reshape(-1, kv_heads, y_BxTxHxC.shape[2] // kv_heads, c), v_BxTxKxC.reshape(-1, kv_heads, c)
  return _differentiable(y, v, gate_BxTxH.reshape(y.shape[:3]), scale).reshape(y_BxTxHxC.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _differentiable(y, v, gate, scale):
  return _gated(y, v, gate, scale)


def _forward(y, v, gate, scale):
  return _gated(y, v, gate, scale), (y, v, gate)


def _backward(scale, residuals, dx):
  return _gated_gradients(*residuals, dx, scale)


_differentiable.defvjp(_forward, _backward)


class _Layouts(NamedTuple):
  """Layouts of [rows, K, G, C], for G heads of each of K values, and of what is one for each head and each value."""

  heads: plgpu.Layout
  by_head: plgpu.Layout
  values: plgpu.Layout
  by_value: plgpu.Layout

  @classmethod
  def for_heads(cls, group: int, width: int) -> "_Layouts":
    beside = hopper.ROW_PART // (group * width)  # values whose heads a warp holds in one register of 8 a thread
    lanes = {-4: beside, -3: group, -2: width // 8}
    layout = plgpu.Layout.TILED(
      Tiling(((hopper.WARPS, beside, group, width), (8,))),
      warp_dims=(-5,),
      lane_dims=tuple(axis for axis, size in lanes.items() if size > 1),
      vector_dim=-1,
    )
    return cls(layout, layout.reduce(3), layout.reduce(2), layout.reduce((2, 3)))


def _parts(y: jax.Array, v: jax.Array, layouts: _Layouts) -> tuple[jax.Array, ...]:
  """Returns values repeated over their heads, 1/v·v, whether that is of a value other than zero, and y·v/v·v."""
  shape = (*v.shape[:2], y.shape[2])
  norm = (v * v).sum(axis=2)
  inverse = hopper.spread(1 / jnp.maximum(norm, 1e-24), shape, (0, 1), layouts.by_head)
  some = hopper.spread(jnp.where(norm > 1e-24, 1.0, 0.0), shape, (0, 1), layouts.by_head)
  v = hopper.spread(v, y.shape, (0, 1, 3), layouts.heads)
  return v, inverse, some, (y * v).sum(axis=3) * inverse


def _gates(gate_ref, rows, scale: float, layouts: _Layouts) -> jax.Array:
  gate = hopper.load(gate_ref.at[rows], layouts.by_head).astype(jnp.float32)
  return 1 / (1 + jnp.exp(-scale * gate))


@functools.partial(jax.jit, static_argnums=3)
def _gated(y, v, gate, scale):
  """Returns the operation's result."""
  layouts = _Layouts.for_heads(*y.shape[2:])

  def kernel(y_ref, v_ref, gate_ref, x_ref, x_smem):
    def compute(rows, y_rows, v_rows, nothing):
      spread = functools.partial(hopper.spread, shape=y_rows.shape, axes=(0, 1, 2), layout=layouts.heads)
      values, _, _, share = _parts(y_rows, v_rows, layouts)
      x = (y_rows - spread(share) * values) * spread(_gates(gate_ref, rows, scale, layouts))
      return (x,), nothing

    hopper.over_rows(compute, [(y_ref, layouts.heads), (v_ref, layouts.values)], [(x_ref, x_smem)])

  like = jax.ShapeDtypeStruct(y.shape, y.dtype)
  call = plgpu.kernel(kernel, out_type=like, scratch_types=(hopper.leaving(y),), **hopper.rows_grid(len(y)))
  return call(y, v, gate)


@functools.partial(jax.jit, static_argnums=4)
def _gated_gradients(y, v, gate, dx, scale):
  """Returns the cotangents of y, v and the gate.

  With s the gate's sigmoid, a = y·v/v·v and b = s·dx·v/v·v, that of y is s·dx − b·v, that of v the sum over its heads
  of 2ab·v − a·s·dx − b·y, and that of the gate scale·s·(1 − s)·(dx·y − a·dx·v).
  """
  layouts = _Layouts.for_heads(*y.shape[2:])

  def kernel(y_ref, v_ref, gate_ref, dx_ref, dy_ref, dv_ref, d_gate_ref, dy_smem, dv_smem):
    def compute(rows, y_rows, v_rows, dx_rows, nothing):
      spread = functools.partial(hopper.spread, shape=y_rows.shape, axes=(0, 1, 2), layout=layouts.heads)
      values, inverse, some, a = _parts(y_rows, v_rows, layouts)
      s = _gates(gate_ref, rows, scale, layouts)
      along = (dx_rows * values).sum(axis=3)
      d_gate = ((dx_rows * y_rows).sum(axis=3) - a * along) * (s * (1 - s) * scale)
      hopper.store(d_gate_ref.at[rows], d_gate.astype(gate.dtype))
      b, through = s * along * inverse, dx_rows * spread(s)
      dv = spread(2 * a * b * some) * values - spread(a) * through - spread(b) * y_rows
      return (through - spread(b) * values, dv.sum(axis=2)), nothing

    inputs = [(y_ref, layouts.heads), (v_ref, layouts.values), (dx_ref, layouts.heads)]
    hopper.over_rows(compute, inputs, [(dy_ref, dy_smem), (dv_ref, dv_smem)])

  like = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (y, v, gate)]
  scratch = (hopper.leaving(y), hopper.leaving(v))
  return tuple(plgpu.kernel(kernel, out_type=like, scratch_types=scratch, **hopper.rows_grid(len(y)))(y, v, gate, dx))
