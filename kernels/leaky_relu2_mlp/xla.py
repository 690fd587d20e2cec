"""The LeakyReLU² MLP's two fused products, left to XLA."""

import jax
import jax.numpy as jnp

from pgolf_jax.kernels.leaky_relu2_mlp import with_gradient
from pgolf_jax.kernels.numerics import product, wide_product


def up(x_NxD: jax.Array, up_FxD: jax.Array, *, slope: float) -> tuple[jax.Array, jax.Array]:
  """Returns u = up · x and φ(u); see `with_gradient`."""
  u_NxF = product("nd,fd->nf", x_NxD, up_FxD)
  u = u_NxF.astype(jnp.float32)
  return u_NxF, jnp.square(jnp.where(u > 0, u, slope * u)).astype(x_NxD.dtype)


def up_gradient(dy_NxD: jax.Array, down_DxF: jax.Array, u_NxF: jax.Array, *, slope: float) -> jax.Array:
  """Returns the cotangent of u; see `with_gradient`."""
  da_NxF = wide_product("nd,df->nf", dy_NxD, down_DxF)
  u = u_NxF.astype(jnp.float32)
  return (da_NxF * 2 * jnp.where(u > 0, u, slope * slope * u)).astype(dy_NxD.dtype)


leaky_relu2_mlp = with_gradient(up, up_gradient)
