"""The LeakyReLU² MLP's two fused products, left to XLA."""

import jax
import jax.numpy as jnp


def _rows_by_rows(a_MxK: jax.Array, b_NxK: jax.Array) -> jax.Array:
  return jnp.einsum("mk,nk->mn", a_MxK, b_NxK, preferred_element_type=jnp.float32)


def up(x_NxD: jax.Array, up_FxD: jax.Array, *, slope: float) -> tuple[jax.Array, jax.Array]:
  """The pre-activation u = up · x, kept for the gradient, and the activation φ(u), both in the type of x."""
  u_NxF = _rows_by_rows(x_NxD, up_FxD).astype(x_NxD.dtype)
  u = u_NxF.astype(jnp.float32)
  return u_NxF, jnp.square(jnp.where(u > 0, u, slope * u)).astype(x_NxD.dtype)


def up_gradient(dy_NxD: jax.Array, down_DxF: jax.Array, u_NxF: jax.Array, *, slope: float) -> jax.Array:
  """The cotangent of the pre-activation, (downᵀ · dy) ⊙ φ′(u), in the type of dy."""
  da_NxF = jnp.einsum("nd,df->nf", dy_NxD, down_DxF, preferred_element_type=jnp.float32)
  u = u_NxF.astype(jnp.float32)
  return (da_NxF * 2 * jnp.where(u > 0, u, slope * slope * u)).astype(dy_NxD.dtype)
