"""What a layer reads from its residual lane: the lane with something added to it, and the RMS norm of the sum."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pgolf_jax.kernels.operation import Operation


def _check(x_BxTxD, added_BxTxD, add_D, keep_D, *, scale: float) -> None:
  x, added = x_BxTxD, added_BxTxD
  if x.ndim < 2 or x.shape != added.shape or x.dtype != added.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"x and added must be alike, not {x.dtype} {x.shape} and {added.dtype} {added.shape}")
  for factor in (add_D,) if keep_D is None else (add_D, keep_D):
    if factor.shape != x.shape[-1:] or factor.dtype != jnp.float32:
      raise ValueError(f"factors must be float32 [{x.shape[-1]}], not {factor.dtype} {factor.shape}")


OPERATION = Operation("residual_norm", _check, ("mosaic_gpu", "xla", "reference"))


def residual_norm(
  x_BxTxD: Float[Array, "*B D"],
  added_BxTxD: Float[Array, "*B D"],
  add_D: Float[Array, " D"],
  keep_D: Float[Array, " D"] | None = None,
  *,
  scale: float,
  implementation: str | None = None,
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
  """Returns y = keep · x + add · added, and scale · y/√(mean y² + ε).

  The norm's sums are float32; results have the type of x.

  Args:
    add_D, keep_D: factors of the columns, whose gradients are summed in float32; no keep_D stands for ones.
    scale: of the norm.
    implementation: a backend to insist on, or None to take the first that is possible.

  Raises:
    ValueError: shapes or types do not fit together, or the implementation is unknown or not possible.
  """
  factors = (None if factor is None else factor.astype(jnp.float32) for factor in (add_D, keep_D))
  return OPERATION(x_BxTxD, added_BxTxD, *factors, scale=scale, implementation=implementation)
