"""The polar-express orthogonalisation as batched products, left to XLA."""

import jax
import jax.numpy as jnp

from pgolf_jax.kernels.numerics import rounded, wide_product
from pgolf_jax.kernels.polar_express.reference import COEFFICIENTS


def polar_express(u_BxMxN: jax.Array, *, steps: int) -> jax.Array:
  """Computes the operation in the type of u, each product and each sum rounded to it on its own.

  Sums inside a product, coefficients and norms are float32.
  """
  dtype = u_BxMxN.dtype

  def product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return rounded(wide_product(spec, x, y), dtype)

  def scaled(factor: float, x: jax.Array) -> jax.Array:
    return rounded(factor * x.astype(jnp.float32), dtype)

  def added(x: jax.Array, y: jax.Array) -> jax.Array:
    return rounded(x.astype(jnp.float32) + y.astype(jnp.float32), dtype)

  wide = u_BxMxN.shape[1] <= u_BxMxN.shape[2]
  x = u_BxMxN if wide else u_BxMxN.mT
  norm = rounded(jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(1, 2), keepdims=True)), dtype)
  norm = rounded(norm.astype(jnp.float32) + 1e-7, dtype)
  x = rounded(x.astype(jnp.float32) / norm.astype(jnp.float32), dtype)
  for a, b, c in COEFFICIENTS[:steps]:
    gram = product("bmk,bnk->bmn", x, x)
    polynomial = added(scaled(b, gram), scaled(c, product("bmk,bkn->bmn", gram, gram)))
    x = added(scaled(a, x), product("bmk,bkn->bmn", polynomial, x))
  return x if wide else x.mT
