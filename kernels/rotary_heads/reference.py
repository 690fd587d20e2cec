"""Attention's heads straight from their formula, for comparison."""

import jax
import jax.numpy as jnp

from pgolf_jax.kernels.numerics import EPS


def rotary_heads(
  qkv_BxTxF: jax.Array, gain_H: jax.Array, cos_TxR: jax.Array, sin_TxR: jax.Array, *, kv_heads: int
) -> tuple[jax.Array, ...]:
  """Returns queries, keys, and values twice, computed in float32."""
  B, T, _ = qkv_BxTxF.shape
  H, R = gain_H.shape[0], cos_TxR.shape[1]
  heads = qkv_BxTxF.astype(jnp.float32).reshape(B, T, H + 2 * kv_heads, -1)
  q, k, v = jnp.split(heads, (H, H + kv_heads), axis=2)
  cos, sin = jax.lax.stop_gradient((cos_TxR[:, None], sin_TxR[:, None]))

  def turned(x):
    x = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPS)
    a, b, rest = jnp.split(x, (R, 2 * R), axis=-1)
    return jnp.concatenate([a * cos + b * sin, b * cos - a * sin, rest], axis=-1)

  results = turned(q) * gain_H[:, None], turned(k), v, v
  return tuple(x.astype(qkv_BxTxF.dtype) for x in results)
