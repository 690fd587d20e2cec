"""Matrix products as the kernels' own gradients take them."""

import jax
import jax.numpy as jnp


def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """`jnp.einsum` of two arrays of one type: sums in float32, the result rounded to that type."""
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32).astype(a.dtype)
