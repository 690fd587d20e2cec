"""The residual sum and its norm straight from their formulas, for comparison."""

import jax
import jax.numpy as jnp

from pgolf_jax.kernels.numerics import EPS


def residual_norm(
  x_BxTxD: jax.Array, added_BxTxD: jax.Array, add_D: jax.Array, keep_D: jax.Array | None, *, scale: float
) -> tuple[jax.Array, jax.Array]:
  """Returns the sum and its norm, computed in float32."""
  x, added = x_BxTxD.astype(jnp.float32), added_BxTxD.astype(jnp.float32)
  y = (x if keep_D is None else keep_D * x) + add_D * added
  n = scale * y / jnp.sqrt(jnp.mean(y * y, axis=-1, keepdims=True) + EPS)
  return y.astype(x_BxTxD.dtype), n.astype(x_BxTxD.dtype)
