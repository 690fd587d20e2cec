"""Attention of a chunk left to XLA, with a gradient of its own; a key head's queries make one product."""

import jax
import jax.numpy as jnp

from pgolf_jax.kernels.chunk_attention import visible
from pgolf_jax.kernels.numerics import wide_product


def chunk_attention(q_BxXxHxC, k_BxXxKxC, v_BxXxKxC, ring, place, *, window: int) -> jax.Array:
  """Returns the outputs."""
  earlier = [x[place.position, :, : q_BxXxHxC.shape[0], :window] for x in ring]
  return _attention(q_BxXxHxC, k_BxXxKxC, v_BxXxKxC, *earlier, visible(jnp.arange(window), place, ring.k.shape[3]))


@jax.custom_vjp
def _attention(q_BxXxHxC, k_BxXxKxC, v_BxXxKxC, ring_k_KxBxSxC, ring_v_KxBxSxC, visible_S):
  return _forward(q_BxXxHxC, k_BxXxKxC, v_BxXxKxC, ring_k_KxBxSxC, ring_v_KxBxSxC, visible_S)[0]


def _by_head(x_BxXxHxC: jax.Array, K: int) -> jax.Array:
  """Returns [K, B, X·G, C]: the G query heads of a key head stand beside one another, so that products are plain."""
  B, X, H, C = x_BxXxHxC.shape
  return x_BxXxHxC.reshape(B, X, K, H // K, C).transpose(2, 0, 1, 3, 4).reshape(K, B, X * H // K, C)


def _by_token(x_KxBxQxC: jax.Array, X: int) -> jax.Array:
  """Inverse of `_by_head`."""
  K, B, Q, C = x_KxBxQxC.shape
  return x_KxBxQxC.reshape(K, B, X, Q // X, C).transpose(1, 2, 0, 3, 4).reshape(B, X, K * Q // X, C)


def _forward(q_BxXxHxC, k_BxXxKxC, v_BxXxKxC, ring_k, ring_v, visible_S):
  X, K, C = q_BxXxHxC.shape[1], k_BxXxKxC.shape[2], q_BxXxHxC.shape[3]
  q, k, v = (_by_head(x, K) for x in (q_BxXxHxC, k_BxXxKxC, v_BxXxKxC))
  causal_QxX = jnp.arange(q.shape[2])[:, None] // (q.shape[2] // X) >= jnp.arange(X)
  scores = [
    jnp.where(is_seen, wide_product("kbqc,kbsc->kbqs", q, keys) * C**-0.5, -jnp.inf)
    for is_seen, keys in ((visible_S, ring_k), (causal_QxX, k))
  ]
  largest = jnp.maximum(*(s.max(axis=-1, keepdims=True) for s in scores))
  # A place never written holds whatever the last batch left; its weight is exactly zero.
  p = [jnp.exp(s - largest) for s in scores]
  total = sum(x.sum(axis=-1, keepdims=True) for x in p)
  p = [x.astype(q.dtype) for x in p]
  y = sum(wide_product("kbqs,kbsc->kbqc", x, values) for x, values in zip(p, (ring_v, v), strict=True)) / total
  return _by_token(y, X).astype(q.dtype), (q, k, v, ring_k, ring_v, p, total, y)


def _backward(residuals, dy_BxXxHxC):
  q, k, v, ring_k, ring_v, p, total, y = residuals
  K, X, C = *k.shape[::2], q.shape[3]
  dy = _by_head(dy_BxXxHxC, K) / total
  delta, dy = jnp.sum(dy * y, axis=-1, keepdims=True), dy.astype(q.dtype)
  ds = [
    (x * (wide_product("kbqc,kbsc->kbqs", dy, values) - delta) * C**-0.5).astype(q.dtype)
    for x, values in zip(p, (ring_v, v), strict=True)
  ]
  dq = sum(wide_product("kbqs,kbsc->kbqc", x, keys) for x, keys in zip(ds, (ring_k, k), strict=True))
  dk, dv = (wide_product("kbqs,kbqc->kbsc", *pair) for pair in ((ds[1], q), (p[1], dy)))
  dq, dk, dv = (_by_token(x, X).astype(q.dtype) for x in (dq, dk, dv))
  return dq, dk, dv, None, None, None


_attention.defvjp(_forward, _backward)
