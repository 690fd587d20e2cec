"""The polar-express orthogonalisation straight from its formula, for comparison."""

import jax
import jax.numpy as jnp

COEFFICIENTS = (
  (8.156554524902461, -22.48329292557795, 15.878769915207462),
  (4.042929935166739, -2.808917465908714, 0.5000178451051316),
  (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
  (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
  (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""The odd polynomials a·x + b·x³ + c·x⁵ of the five steps (Amsel et al. 2025, "The Polar Express")."""


def polar_express(u_BxMxN: jax.Array, *, steps: int) -> jax.Array:
  """Divides each matrix by its Frobenius norm and takes steps X ← aX + (bA + cA²)X with A = XXᵀ."""
  with jax.default_matmul_precision("highest"):
    wide = u_BxMxN.shape[1] <= u_BxMxN.shape[2]
    x = u_BxMxN if wide else u_BxMxN.mT
    x = x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2), keepdims=True)) + 1e-7)
    for a, b, c in COEFFICIENTS[:steps]:
      gram = x @ x.mT
      x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x if wide else x.mT
