"""Attention of a chunk straight from its formula, for comparison."""

import jax
import jax.numpy as jnp
import numpy as np


def chunk_attention(q_BxXxHxC, k_BxXxKxC, v_BxXxKxC, ring, place, *, window: int) -> jax.Array:
  """Returns the outputs, computed in float32."""
  B, X, H, C = q_BxXxHxC.shape
  S = ring.k.shape[3]
  earlier = [jnp.moveaxis(jax.lax.stop_gradient(x)[place.position, :, :B], 0, 2) for x in ring]
  k, v = (
    jnp.repeat(jnp.concatenate(pair, axis=1).astype(jnp.float32), H // k_BxXxKxC.shape[2], axis=2)
    for pair in zip(earlier, (k_BxXxKxC, v_BxXxKxC), strict=True)
  )
  # The token at place s of the ring is the last one before the chunk whose number is s modulo S.
  token_S = place.first - 1 - (place.first - 1 - np.arange(S)) % S
  is_seen_S = (token_S >= 0) & (token_S >= place.first + place.size - S) & (np.arange(S) < window)
  is_seen = jnp.concatenate([jnp.broadcast_to(is_seen_S, (X, S)), np.tri(X, dtype=bool)], axis=1)
  scores = jnp.einsum("bxhc,bshc->bhxs", q_BxXxHxC.astype(jnp.float32), k) * C**-0.5
  p = jax.nn.softmax(jnp.where(is_seen, scores, -jnp.inf), axis=-1)
  return jnp.einsum("bhxs,bshc->bxhc", p, v).astype(q_BxXxHxC.dtype)
