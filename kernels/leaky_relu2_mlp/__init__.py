"""The LeakyReLU² MLP."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pgolf_jax.kernels.numerics import product
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


def with_gradient(up: Callable, up_gradient: Callable) -> Callable[..., jax.Array]:
  """Returns the operation, made of the two products that carry the activation in their epilogue.

  The other products are plain matrix products, which XLA's libraries do best.

  Args:
    up: (x_NxD, up_FxD, slope=…) → the pre-activation u = up · x, which the gradient needs, and the activation φ(u),
      both [N, F] in the type of x.
    up_gradient: (dy_NxD, down_DxF, u_NxF, slope=…) → the cotangent of u, (downᵀ · dy) ⊙ φ′(u), in the type of dy.
  """

  @partial(jax.custom_vjp, nondiff_argnums=(3,))
  def mlp(x_NxD, up_FxD, down_DxF, slope):
    return forward(x_NxD, up_FxD, down_DxF, slope)[0]

  def forward(x_NxD, up_FxD, down_DxF, slope):
    u_NxF, a_NxF = up(x_NxD, up_FxD, slope=slope)
    return product("nf,df->nd", a_NxF, down_DxF), (x_NxD, up_FxD, down_DxF, u_NxF, a_NxF)

  def backward(slope, residuals, dy_NxD):
    x_NxD, up_FxD, down_DxF, u_NxF, a_NxF = residuals
    du_NxF = up_gradient(dy_NxD, down_DxF, u_NxF, slope=slope)
    dx_NxD = product("nf,fd->nd", du_NxF, up_FxD)
    return dx_NxD, product("nf,nd->fd", du_NxF, x_NxD), product("nd,nf->df", dy_NxD, a_NxF)

  mlp.defvjp(forward, backward)

  def leaky_relu2_mlp(x_NxD: jax.Array, up_FxD: jax.Array, down_DxF: jax.Array, *, slope: float) -> jax.Array:
    return mlp(x_NxD, up_FxD, down_DxF, slope)

  return leaky_relu2_mlp
