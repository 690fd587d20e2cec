"""Attention's heads for Hopper GPUs, forward and backward, in Pallas' Mosaic GPU: one pass over memory each.

A thread block takes 64 positions and goes through their heads, which arrive and leave in shared memory behind one
another. Several thread blocks share a multiprocessor and hide each other's copies.

A rotation needs each number beside the other of its pair, which another register holds. A product with a matrix of 0
and ±1 brings it there: exact, and nothing beside the copies on units that have no other work here.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pgolf_jax.kernels import hopper
from pgolf_jax.kernels.numerics import EPS
from pgolf_jax.kernels.rotary_heads import head_width

_ROWS = 64
"""Positions of a thread block: as many rows as one warpgroup multiplies at once."""
_STAGES = 2
"""Heads in flight."""
_HEAD_WIDTHS = (64, 128)
_COMPILER = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


def obstacle(qkv_BxTxF, gain_H, cos_TxR, sin_TxR, *, kv_heads: int) -> str | None:
  """Returns why this backend cannot compute the operation for these shapes and types, or None."""
  if qkv_BxTxF.dtype not in (jnp.bfloat16, jnp.float16):
    return f"it needs bfloat16 or float16, not {qkv_BxTxF.dtype}"
  width, positions = head_width(qkv_BxTxF, gain_H, kv_heads), qkv_BxTxF.shape[1]
  if width not in _HEAD_WIDTHS or positions % _ROWS:
    return f"it needs heads of 64 or 128 numbers and T divisible by {_ROWS}, not {width} and T={positions}"
  return None


def rotary_heads(
  qkv_BxTxF: jax.Array, gain_H: jax.Array, cos_TxR: jax.Array, sin_TxR: jax.Array, *, kv_heads: int
) -> tuple[jax.Array, ...]:
  """Computes the operation."""
  return _differentiable(qkv_BxTxF, gain_H, cos_TxR, sin_TxR, kv_heads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _differentiable(qkv, gain, cos, sin, kv_heads):
  return _forward(qkv, gain, cos, sin, kv_heads)[0]


def _forward(qkv, gain, cos, sin, kv_heads):
  q, k, v = _split(qkv, gain, cos, sin, kv_heads)
  return (q, k, v, v), (qkv, gain, cos, sin)


def _backward(kv_heads, residuals, cotangents):
  qkv, gain, cos, sin = residuals
  d_qkv, d_gain_BxHxT = _join(qkv, gain, cos, sin, *cotangents, kv_heads)
  return d_qkv, d_gain_BxHxT.sum((0, 2)), None, None


_differentiable.defvjp(_forward, _backward)


def _swap(width: int, pairs: int, dtype) -> jax.Array:
  """Returns the [C, C] matrix for which x · swap holds b where x holds a, −a where it holds b, and 0 elsewhere."""
  a = jnp.arange(pairs)
  return jnp.zeros((width, width), dtype).at[a + pairs, a].set(1).at[a, a + pairs].set(-1)


def _by_row(x: jax.Array, width: int) -> jax.Array:
  return lax.broadcast_in_dim(x, (_ROWS, width), [0])


def _spread(x_ref, positions, width: int, beyond: float) -> jax.Array:
  """Returns [_ROWS, C]: in both columns of a pair what x, [R, T], holds for it, elsewhere a constant."""
  pairs = x_ref.shape[0]
  column = plgpu.broadcasted_iota(jnp.int32, (_ROWS, width), 1, layout=hopper.MATRIX)
  spread = plgpu.layout_cast(jnp.full((_ROWS, width), beyond, jnp.float32), hopper.MATRIX)
  for pair in range(pairs):
    value = _by_row(hopper.load(x_ref.at[pair, positions], hopper.BY_ROW), width)
    spread = jnp.where((column == pair) | (column == pair + pairs), value, spread)
  return spread


def _rotation(cos_ref, sin_ref, positions, width: int) -> tuple[jax.Array, jax.Array]:
  """Returns cos and sin of every column, 1 and 0 where it is not turned."""
  return _spread(cos_ref, positions, width, 1.0), _spread(sin_ref, positions, width, 0.0)


def _others(x_smem, swap_smem) -> jax.Array:
  """Returns x · swap, in float32."""

  def compute(acc):
    plgpu.wgmma(acc, x_smem, swap_smem)
    return acc[...]

  return pl.run_scoped(compute, plgpu.ACC((_ROWS, swap_smem.shape[1]), jnp.float32))


def _inverse_norm(x: jax.Array) -> jax.Array:
  return lax.rsqrt((x * x).sum(axis=1) * (1 / x.shape[1]) + EPS)


def _parts(heads: int, kv_heads: int):
  """First head, and number of heads, of queries, keys and values."""
  return (0, heads), (heads, kv_heads), (heads + kv_heads, kv_heads)


@functools.partial(jax.jit, static_argnums=4)
def _split(qkv, gain, cos, sin, kv_heads):
  """Returns queries, keys and values."""
  (b, t, _), h, width = qkv.shape, gain.shape[0], head_width(qkv, gain, kv_heads)

  def kernel(qkv_ref, gain_ref, cos_ref, sin_ref, swap_ref, *refs):
    *out_refs, out_smem, swap_smem, arrived = refs
    row, positions = lax.axis_index("row"), pl.ds(lax.axis_index("tile") * _ROWS, _ROWS)
    plgpu.copy_gmem_to_smem(swap_ref, swap_smem, arrived)
    cos_C, sin_C = _rotation(cos_ref, sin_ref, positions, width)
    plgpu.barrier_wait(arrived)

    def step(index, x_smem, *, first, out_ref):
      head, slot = index[0], lax.rem(first + index[0], 2)
      y = x_smem[...].astype(jnp.float32)
      if first < h + kv_heads:
        factor = _inverse_norm(y) * (gain_ref[head] if first == 0 else 1.0)
        y = (y * cos_C + _others(x_smem, swap_smem) * sin_C) * _by_row(factor, width)
      plgpu.wait_smem_to_gmem(1, wait_read_only=True)
      out_smem[slot] = y.astype(qkv.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(out_smem.at[slot], out_ref.at[row, positions, pl.ds(head * width, width)])

    for (first, heads), out_ref in zip(_parts(h, kv_heads), out_refs, strict=True):
      plgpu.emit_pipeline(
        functools.partial(step, first=first, out_ref=out_ref),
        grid=(heads,),
        in_specs=[_heads_from(first, width)],
        max_concurrent_steps=_STAGES,
      )(qkv_ref.at[row, positions])
    plgpu.wait_smem_to_gmem(0)

  outputs = plgpu.kernel(
    kernel,
    out_type=[jax.ShapeDtypeStruct((b, t, heads * width), qkv.dtype) for _, heads in _parts(h, kv_heads)],
    scratch_types=(*_buffers(width, qkv.dtype), plgpu.Barrier()),
    **_grid(b, t),
  )(qkv, gain, cos.T, sin.T, _swap(width, cos.shape[1], qkv.dtype))
  return tuple(x.reshape(b, t, -1, width) for x in outputs)


@functools.partial(jax.jit, static_argnums=8)
def _join(qkv, gain, cos, sin, dq, dk, dv, dv_too, kv_heads):
  """Returns the cotangent of qkv, and that of the gain at each position, [B, H, T] in float32.

  With x the numbers of a head, r = 1/√(mean x² + ε) and u the cotangent turned back, dx = gain·r·(u − x·r²·mean ux),
  and a position's share of the gain's cotangent is r·Σ ux.
  """
  (b, t, _), h, width = qkv.shape, gain.shape[0], head_width(qkv, gain, kv_heads)

  def kernel(qkv_ref, gain_ref, cos_ref, sin_ref, swap_ref, *refs):
    dq_ref, dk_ref, dv_ref, dv_too_ref, dx_ref, d_gain_ref, dx_smem, swap_smem, d_gain_smem, arrived = refs
    row, positions = lax.axis_index("row"), pl.ds(lax.axis_index("tile") * _ROWS, _ROWS)
    plgpu.copy_gmem_to_smem(swap_ref, swap_smem, arrived)
    cos_C, sin_C = _rotation(cos_ref, sin_ref, positions, width)
    plgpu.barrier_wait(arrived)

    def step(index, d_smem, beside_smem, *, first):
      head, slot = index[0], lax.rem(first + index[0], 2)
      dx, x = (smem[...].astype(jnp.float32) for smem in (d_smem, beside_smem))
      d_gain = None
      if first == h + kv_heads:  # values: x does not matter, and what stands beside is the other reader's
        dx += x
      else:
        norm = _inverse_norm(x)
        u = dx * cos_C - _others(d_smem, swap_smem) * sin_C
        along = (u * x).sum(axis=1) * norm
        factor = norm * (gain_ref[head] if first == 0 else 1.0)
        dx = (u - x * _by_row(along * norm * (1 / width), width)) * _by_row(factor, width)
        d_gain = along if first == 0 else None
      plgpu.wait_smem_to_gmem(1, wait_read_only=True)
      dx_smem[slot] = dx.astype(qkv.dtype)
      if d_gain is not None:
        d_gain_smem[slot] = d_gain
      plgpu.commit_smem()
      target = dx_ref.at[row, positions, pl.ds((first + head) * width, width)]
      plgpu.copy_smem_to_gmem(dx_smem.at[slot], target, commit_group=False)
      if d_gain is not None:
        plgpu.copy_smem_to_gmem(d_gain_smem.at[slot], d_gain_ref.at[row, head, positions], commit_group=False)
      plgpu.commit_smem_to_gmem_group()

    inputs = (dq_ref, qkv_ref), (dk_ref, qkv_ref), (dv_ref, dv_too_ref)
    for (first, heads), refs in zip(_parts(h, kv_heads), inputs, strict=True):
      plgpu.emit_pipeline(
        functools.partial(step, first=first),
        grid=(heads,),
        in_specs=[_heads_from(first if ref is qkv_ref else 0, width) for ref in refs],
        max_concurrent_steps=_STAGES,
      )(*(ref.at[row, positions] for ref in refs))
    plgpu.wait_smem_to_gmem(0)

  shapes = jax.ShapeDtypeStruct(qkv.shape, qkv.dtype), jax.ShapeDtypeStruct((b, h, t), jnp.float32)
  cotangents = [d.reshape(b, t, -1) for d in (dq, dk, dv, dv_too)]
  return plgpu.kernel(
    kernel,
    out_type=shapes,
    scratch_types=(*_buffers(width, qkv.dtype), plgpu.SMEM((2, _ROWS), jnp.float32), plgpu.Barrier()),
    **_grid(b, t),
  )(qkv, gain, cos.T, sin.T, _swap(width, cos.shape[1], qkv.dtype), *cotangents)


def _heads_from(first: int, width: int) -> plgpu.BlockSpec:
  return plgpu.BlockSpec((_ROWS, width), lambda i: (0, first + i), transforms=hopper.TILED)


def _buffers(width: int, dtype) -> tuple[plgpu.SMEM, plgpu.SMEM]:
  """Two heads on their way out, and the matrix that brings pairs together."""
  return tuple(plgpu.SMEM(shape, dtype, transforms=hopper.TILED) for shape in ((2, _ROWS, width), (width, width)))


def _grid(rows: int, positions: int) -> dict:
  return {"grid": (rows, positions // _ROWS), "grid_names": ("row", "tile"), "compiler_params": _COMPILER}
