"""Attention's heads, left to XLA, which rounds after each step."""

import jax
import jax.numpy as jnp

from pgolf_jax.kernels.numerics import rms_norm, scaled
from pgolf_jax.kernels.rotary_heads import head_width


def rotary_heads(
  qkv_BxTxF: jax.Array, gain_H: jax.Array, cos_TxR: jax.Array, sin_TxR: jax.Array, *, kv_heads: int
) -> tuple[jax.Array, ...]:
  """Returns queries, keys, and values twice."""
  (B, T, _), H = qkv_BxTxF.shape, gain_H.shape[0]
  C = head_width(qkv_BxTxF, gain_H, kv_heads)
  parts = jnp.split(qkv_BxTxF, (H * C, (H + kv_heads) * C), axis=-1)
  q, k, v = (x.reshape(B, T, -1, C) for x in parts)
  angles = jax.lax.stop_gradient((cos_TxR, sin_TxR))
  return scaled(_rotate(rms_norm(q), angles), gain_H[:, None]), _rotate(rms_norm(k), angles), v, v


def _rotate(x_BxTxHxC: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates split-half pairs of the leading dimensions: (a, b) → (a·cos + b·sin, −a·sin + b·cos)."""
  cos, sin = (a[:, None].astype(x_BxTxHxC.dtype) for a in angles)
  half = cos.shape[-1]
  a, b, rest = jnp.split(x_BxTxHxC, (half, 2 * half), axis=-1)
  return jnp.concatenate([a * cos + b * sin, b * cos - a * sin, rest], axis=-1)
