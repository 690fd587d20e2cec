"""Polar-express orthogonalisation of a stack of matrices."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pgolf_jax.kernels.operation import Operation


def _check(u_BxMxN, *, steps: int) -> None:
  if u_BxMxN.ndim != 3 or not jnp.issubdtype(u_BxMxN.dtype, jnp.floating):
    raise ValueError(f"u must be [B, M, N] of a floating type, not {u_BxMxN.shape} of {u_BxMxN.dtype}")
  if steps < 0:
    raise ValueError(f"{steps=} must not be negative")


OPERATION = Operation("polar_express", _check, ("xla", "reference"))


def polar_express(
  u_BxMxN: Float[Array, "B M N"], *, steps: int = 5, implementation: str | None = None
) -> Float[Array, "B M N"]:
  """Returns each matrix with all singular values pushed towards 1 (Amsel et al. 2025, "The Polar Express").

  Each matrix is transposed if it is tall, divided by its Frobenius norm + 1e-7, taken through X ← aX + (bA +
  cA²)X with A = XXᵀ and the coefficients of the step, and transposed back. In bfloat16 each product and each
  sum is rounded on its own; sums inside a product are float32.

  Args:
    u_BxMxN: B independent matrices.
    steps: how many of the five steps to take; 0 leaves the division alone, more count as five.
    implementation: a backend to insist on, or None to take the first that is possible.

  Raises:
    ValueError: the shape, type or number of steps is not possible, or the implementation is unknown.
  """
  return OPERATION(u_BxMxN, steps=steps, implementation=implementation)
