"""The LeakyReLU² MLP straight from its formula, for comparison."""

import jax
import jax.numpy as jnp


def leaky_relu2_mlp(x_NxD: jax.Array, up_FxD: jax.Array, down_DxF: jax.Array, *, slope: float) -> jax.Array:
  """Returns y = down · φ(up · x) with φ(u) = u² for u > 0 and (slope·u)² otherwise, in the type of the arguments."""
  with jax.default_matmul_precision("highest"):
    u_NxF = x_NxD @ up_FxD.T
    return jnp.square(jnp.where(u_NxF > 0, u_NxF, slope * u_NxF)) @ down_DxF.T
