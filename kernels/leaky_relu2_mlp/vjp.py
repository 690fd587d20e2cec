"""The LeakyReLU² MLP and its gradient, from a backend's two fused products."""

from collections.abc import Callable
from functools import partial

import jax

from pgolf_jax.kernels.numerics import product


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
