"""Polar-express orthogonalisation of a stack of matrices: one function over all implementations."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pgolf_jax.kernels import target
from pgolf_jax.kernels.polar_express import reference, xla


def choose(u_BxMxN, *, implementation: str | None = None) -> target.Choice:
  """The implementation that `polar_express` takes for a stack of this shape and type, and why.

  Args:
    u_BxMxN: an array or a `jax.ShapeDtypeStruct`.
    implementation: a name to insist on (`xla`, `reference`), or None to pick.

  Raises:
    ValueError: u is not a stack of matrices of a floating type, or the implementation is unknown.
  """
  if u_BxMxN.ndim != 3 or not jnp.issubdtype(u_BxMxN.dtype, jnp.floating):
    raise ValueError(f"u must be [B, M, N] of a floating type, not {u_BxMxN.shape} of {u_BxMxN.dtype}")
  return target.choose("polar_express", implementation, {"xla": lambda: None, "reference": lambda: None})


def polar_express(
  u_BxMxN: Float[Array, "B M N"], *, steps: int = 5, implementation: str | None = None
) -> Float[Array, "B M N"]:
  """Pushes all singular values of each matrix towards 1 (Amsel et al. 2025, "The Polar Express").

  Each matrix is transposed if it is tall, divided by its Frobenius norm + 1e-7, taken through X ← aX + (bA +
  cA²)X with A = XXᵀ and the coefficients of the step, and transposed back. In bfloat16 each product and each
  sum is rounded on its own; sums inside a product are float32.

  Args:
    u_BxMxN: B independent matrices.
    steps: how many of the five steps to take, 1 to 5.
    implementation: see `choose`.

  Raises:
    ValueError: the shape, type or number of steps is not possible, or the implementation is unknown.
  """
  if not 1 <= steps <= len(reference.COEFFICIENTS):
    raise ValueError(f"{steps=} must lie in 1..{len(reference.COEFFICIENTS)}")
  name, _ = choose(u_BxMxN, implementation=implementation)
  return {"xla": xla, "reference": reference}[name].polar_express(u_BxMxN, steps=steps)
