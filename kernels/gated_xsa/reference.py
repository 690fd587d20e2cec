"""XSA and the gate straight from their formula, for comparison."""

import jax
import jax.numpy as jnp


def gated_xsa(y_BxTxHxC: jax.Array, v_BxTxKxC: jax.Array, gate_BxTxH: jax.Array | None, *, scale: float) -> jax.Array:
  """Returns what is left of y, computed in float32."""
  y = y_BxTxHxC.astype(jnp.float32)
  v = jnp.repeat(v_BxTxKxC.astype(jnp.float32), y.shape[2] // v_BxTxKxC.shape[2], axis=2)
  norm = (v * v).sum(axis=-1, keepdims=True)
  y = y - (y * v).sum(axis=-1, keepdims=True) / jnp.where(norm > 1e-24, norm, 1.0) * v
  if gate_BxTxH is not None:
    y = y / (1 + jnp.exp(-scale * gate_BxTxH.astype(jnp.float32)))[..., None]
  return y.astype(y_BxTxHxC.dtype)
