"""Segment-confined attention straight from its formula, with a dense T×T mask, for comparison."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pgolf_jax.kernels.segment_attention import without_lone_queries


def segment_attention(
  q_BxTxHxC: Float[Array, "B T H C"],
  k_BxTxKxC: Float[Array, "B T K C"],
  v_BxTxKxC: Float[Array, "B T K C"],
  start_BxT: Int[Array, "B T"],
  *,
  max_segment: int,
) -> Float[Array, "B T H C"]:
  """Returns softmax(q·kᵀ/√C)·v over keys start[t] ≤ j ≤ t, in float32. Memory grows with T²."""
  del max_segment  # the mask needs no bound
  B, T, H, C = q_BxTxHxC.shape
  K = k_BxTxKxC.shape[2]
  q = without_lone_queries(q_BxTxHxC, start_BxT).astype(jnp.float32).reshape(B, T, K, H // K, C)
  k, v = k_BxTxKxC.astype(jnp.float32), v_BxTxKxC.astype(jnp.float32)
  position_T = jnp.arange(T)
  visible_BxTxT = (position_T[None, None] >= start_BxT[:, :, None]) & (position_T <= position_T[:, None])[None]
  scores = jnp.einsum("btkgc,bskc->bkgts", q, k, precision="highest") * C**-0.5
  p = jax.nn.softmax(jnp.where(visible_BxTxT[:, None, None], scores, -jnp.inf), axis=-1)
  y = jnp.einsum("bkgts,bskc->btkgc", p, v, precision="highest")
  return y.reshape(B, T, H, C).astype(q_BxTxHxC.dtype)
