"""The LeakyReLU² MLP: one function over all implementations, with its gradient.

Every implementation supplies the two products that carry the activation in their epilogue, `up` and
`up_gradient` (see xla.py). The other products are plain matrix products, which XLA's libraries do best.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pgolf_jax.kernels import target
from pgolf_jax.kernels.leaky_relu2_mlp import reference
from pgolf_jax.kernels.products import product

_NAME = "leaky_relu2_mlp"


def choose(x_NxD, up_FxD, down_DxF, *, implementation: str | None = None) -> target.Choice:
  """The implementation that `leaky_relu2_mlp` takes for arguments of these shapes and types, and why.

  Args:
    x_NxD, up_FxD, down_DxF: arrays or `jax.ShapeDtypeStruct`s.
    implementation: a name to insist on (`mosaic_gpu`, `mosaic_tpu`, `xla`, `reference`), or None to pick.

  Raises:
    ValueError: shapes or types do not fit together, or the implementation is unknown or not possible.
  """
  _check(x_NxD, up_FxD, down_DxF)
  obstacles = {
    "mosaic_gpu": lambda: target.mosaic_gpu_obstacle(_NAME, x_NxD, up_FxD),
    "mosaic_tpu": lambda: target.mosaic_tpu_obstacle(_NAME, x_NxD, up_FxD),
    "xla": lambda: None,
    "reference": lambda: None,
  }
  return target.choose(_NAME, implementation, obstacles)


def leaky_relu2_mlp(
  x_NxD: Float[Array, "N D"],
  up_FxD: Float[Array, "F D"],
  down_DxF: Float[Array, "D F"],
  *,
  slope: float,
  implementation: str | None = None,
) -> Float[Array, "N D"]:
  """y = down · φ(up · x) with φ(u) = u² for u > 0 and (slope·u)² otherwise.

  Products accumulate in float32; u, φ(u) and y are rounded to the type of x. u and φ(u) are
  kept for the gradient, which repeats no product.

  Args:
    x_NxD: N tokens; all three arrays have one floating type.
    slope: φ's slope below zero before the square, static, in (0, 1].
    implementation: see `choose`.

  Raises:
    ValueError: shapes or types do not fit together, slope is out of range, or the implementation is not
      possible.
  """
  if not 0 < slope <= 1:
    raise ValueError(f"{slope=} must lie in (0, 1]")
  name, _ = choose(x_NxD, up_FxD, down_DxF, implementation=implementation)
  if name == "reference":
    return reference.leaky_relu2_mlp(x_NxD, up_FxD, down_DxF, slope=slope)
  return _mlp(x_NxD, up_FxD, down_DxF, float(slope), name)


def _check(x, up, down) -> None:
  if x.ndim != 2 or up.ndim != 2 or up.shape[1] != x.shape[1] or down.shape != up.shape[::-1]:
    raise ValueError(f"x [N, D], up [F, D] and down [D, F] do not fit: {x.shape=}, {up.shape=}, {down.shape=}")
  if not (jnp.issubdtype(x.dtype, jnp.floating) and x.dtype == up.dtype == down.dtype):
    raise ValueError(f"x, up and down must have one floating type, not {x.dtype}, {up.dtype} and {down.dtype}")


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _mlp(x_NxD, up_FxD, down_DxF, slope, name):
  return _forward(x_NxD, up_FxD, down_DxF, slope, name)[0]


def _forward(x_NxD, up_FxD, down_DxF, slope, name):
  u_NxF, a_NxF = target.backend(_NAME, name).up(x_NxD, up_FxD, slope=slope)
  return product("nf,df->nd", a_NxF, down_DxF), (x_NxD, up_FxD, down_DxF, u_NxF, a_NxF)


def _backward(slope, name, kept, dy_NxD):
  x_NxD, up_FxD, down_DxF, u_NxF, a_NxF = kept
  du_NxF = target.backend(_NAME, name).up_gradient(dy_NxD, down_DxF, u_NxF, slope=slope)
  dx_NxD = product("nf,fd->nd", du_NxF, up_FxD)
  return dx_NxD, product("nf,nd->fd", du_NxF, x_NxD), product("nd,nf->df", dy_NxD, a_NxF)


_mlp.defvjp(_forward, _backward)
