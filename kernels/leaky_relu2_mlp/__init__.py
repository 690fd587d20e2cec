"""The LeakyReLU² MLP."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pgolf_jax.kernels.operation import Operation


def _check(x_NxD, up_FxD, down_DxF, *, slope: float) -> None:
  x, up, down = x_NxD, up_FxD, down_DxF
  if x.ndim != 2 or up.ndim != 2 or up.shape[1] != x.shape[1] or down.shape != up.shape[::-1]:
    raise ValueError(f"x [N, D], up [F, D] and down [D, F] do not fit: {x.shape=}, {up.shape=}, {down.shape=}")
  if not (jnp.issubdtype(x.dtype, jnp.floating) and x.dtype == up.dtype == down.dtype):
    raise ValueError(f"x, up and down must have one floating type, not {x.dtype}, {up.dtype} and {down.dtype}")
  if not 0 < slope <= 1:
    raise ValueError(f"{slope=} must lie in (0, 1]")


OPERATION = Operation("leaky_relu2_mlp", _check)


def leaky_relu2_mlp(
  x_NxD: Float[Array, "N D"],
  up_FxD: Float[Array, "F D"],
  down_DxF: Float[Array, "D F"],
  *,
  slope: float,
  implementation: str | None = None,
) -> Float[Array, "N D"]:
  """Returns y = down · φ(up · x) with φ(u) = u² for u > 0 and (slope·u)² otherwise.

  Products accumulate in float32; u, φ(u) and y are rounded to the type of x. u and φ(u) are stored for the gradient,
  which repeats no product.

  Args:
    x_NxD: N tokens; all three arrays have one floating type.
    slope: φ's slope below zero before the square, static, in (0, 1].
    implementation: a backend to insist on, or None to take the first that is possible.

  Raises:
    ValueError: shapes or types do not fit together, slope is out of range, or the implementation is unknown or not
      possible.
  """
  return OPERATION(x_NxD, up_FxD, down_DxF, slope=float(slope), implementation=implementation)
