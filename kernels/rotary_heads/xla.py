"""Attention's heads, left to XLA."""

import jax
import jax.numpy as jnp

from pgolf_jax.kernels.numerics import EPS


def rotary_heads(
  qkv_BxTxF: jax.Array, gain_H: jax.Array, cos_TxR: jax.Array, sin_TxR: jax.Array, *, kv_heads: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns queries, keys and values."""
  B, T, F = qkv_BxTxF.shape
  H, R = gain_H.shape[0], cos_TxR.shape[1]
  C = F // (H + 2 * kv_heads)
  cos_TxC, sin_TxC = _spread(cos_TxR, C, 1.0, 1.0), _spread(sin_TxR, C, 0.0, -1.0)

  def turned(first: int, heads: int, gain: jax.Array | float) -> jax.Array:
    x = qkv_BxTxF[..., first * C : (first + heads) * C].reshape(B, T, heads, C).astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPS)
    pairs = jax.lax.rev(x[..., : 2 * R].reshape(B, T, heads, 2, R), (3,)).reshape(B, T, heads, 2 * R)
    # Two products and a sum over whole heads, where a concatenation of turned parts would end XLA's fusion.
    other = jnp.pad(pairs, ((0, 0), (0, 0), (0, 0), (0, C - 2 * R)))
    return ((x * cos_TxC + other * sin_TxC) * gain).astype(qkv_BxTxF.dtype)

  v = qkv_BxTxF[..., (H + kv_heads) * C :].reshape(B, T, kv_heads, C)
  return turned(0, H, gain_H[:, None]), turned(H, kv_heads, 1.0), v


def _spread(x_TxR: jax.Array, width: int, beyond: float, sign: float) -> jax.Array:
  """Returns [T, 1, C]: x, then sign · x, then a constant."""
  x_TxR = jax.lax.stop_gradient(x_TxR)
  both = jnp.concatenate([x_TxR, sign * x_TxR], axis=1)
  return jnp.pad(both, ((0, 0), (0, width - both.shape[1])), constant_values=beyond)[:, None]
