"""The residual sum and its norm, left to XLA, which rounds after each step."""

import jax

from pgolf_jax.kernels.numerics import rms_norm, scaled


def residual_norm(
  x_BxTxD: jax.Array, added_BxTxD: jax.Array, add_D: jax.Array, keep_D: jax.Array | None, *, scale: float
) -> tuple[jax.Array, jax.Array]:
  """Returns the sum and its norm."""
  y = (x_BxTxD if keep_D is None else scaled(x_BxTxD, keep_D)) + scaled(added_BxTxD, add_D)
  return y, rms_norm(y) * scale
