"""Softcapped cross-entropy: from logits, from logits with a hint, and fused with the head's product.

Every implementation supplies the two passes over the logits, `log_sum_exp` and `gradient` (see xla.py); what
is gathered from single columns is plain JAX.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pgolf_jax.kernels import target
from pgolf_jax.kernels.products import product
from pgolf_jax.kernels.softcapped_xent import linear, reference

_NAME = "softcapped_xent"

Cap = Float[Array, ""] | float


def choose(z_NxV, *, implementation: str | None = None) -> target.Choice:
  """The implementation that the cross-entropy takes for logits of this shape and type, and why.

  Args:
    z_NxV: an array or a `jax.ShapeDtypeStruct`.
    implementation: a name to insist on (`mosaic_gpu`, `mosaic_tpu`, `xla`, `reference`), or None to pick.

  Raises:
    ValueError: z is not a matrix of a floating type, or the implementation is unknown or not possible.
  """
  if z_NxV.ndim != 2 or not jnp.issubdtype(z_NxV.dtype, jnp.floating):
    raise ValueError(f"z must be [N, V] of a floating type, not {z_NxV.shape} of {z_NxV.dtype}")
  obstacles = {
    "mosaic_gpu": lambda: target.mosaic_gpu_obstacle(_NAME, z_NxV),
    "mosaic_tpu": lambda: target.mosaic_tpu_obstacle(_NAME, z_NxV),
    "xla": lambda: None,
    "reference": lambda: None,
  }
  return target.choose(_NAME, implementation, obstacles)


def softcapped_xent(
  z_NxV: Float[Array, "N V"],
  target_N: Int[Array, "N"],
  *,
  cap_pos: Cap,
  cap_neg: Cap,
  implementation: str | None = None,
) -> Float[Array, "N"]:
  """Negative log-probability, in nats, of each target under softmax(c·tanh(z/c)).

  c is cap_pos where z > 0 and cap_neg elsewhere. All arithmetic is float32. The gradient reaches z alone: a
  row's logits are read once forward and once backward.

  Args:
    z_NxV: logits before the softcap.
    target_N: column of each row's target, in 0..V-1.
    cap_pos, cap_neg: positive scalars, static or traced.
    implementation: see `choose`.

  Returns:
    nll_N, float32.

  Raises:
    ValueError: shapes or types do not fit together, or the implementation is unknown or not possible.
  """
  return _xent(z_NxV, target_N, None, cap_pos, cap_neg, implementation)[0]


def softcapped_xent_with_hint(
  z_NxV: Float[Array, "N V"],
  target_N: Int[Array, "N"],
  hint_N: Int[Array, "N"],
  *,
  cap_pos: Cap,
  cap_neg: Cap,
  implementation: str | None = None,
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
  """`softcapped_xent`, and the log-probability of a second column of each row, from the same pass.

  Args:
    hint_N: the second column, in 0..V-1.

  Returns:
    nll_N of the target and hint_logp_N, both float32 and both differentiable.
  """
  return _xent(z_NxV, target_N, hint_N, cap_pos, cap_neg, implementation)


def linear_softcapped_xent(
  x_NxD: Float[Array, "N D"],
  weight_VxD: Float[Array, "V D"],
  target_N: Int[Array, "N"],
  *,
  cap_pos: Cap,
  cap_neg: Cap,
  implementation: str | None = None,
) -> Float[Array, "N"]:
  """`softcapped_xent` of the logits x · weightᵀ, which never exist for more than a block of tokens at a time.

  The gradient computes the logits of each block again. Logits are rounded to the type of x, as if they had
  been made by a product of their own.

  Args:
    x_NxD: N tokens, of the type of weight.
    weight_VxD: the head.

  Raises:
    ValueError: as `softcapped_xent`.
  """
  if x_NxD.ndim != 2 or weight_VxD.ndim != 2 or x_NxD.shape[1] != weight_VxD.shape[1]:
    raise ValueError(f"x [N, D] and weight [V, D] do not fit: {x_NxD.shape=}, {weight_VxD.shape=}")
  if x_NxD.dtype != weight_VxD.dtype:
    raise ValueError(f"x and weight must have one type, not {x_NxD.dtype} and {weight_VxD.dtype}")
  if target_N.shape != x_NxD.shape[:1]:
    raise ValueError(f"one target a row is needed: {target_N.shape=} for {x_NxD.shape=}")

  def block_nll(x_BxD, weight_VxD, target_B, cap_pos, cap_neg):
    return _xent(_logits(x_BxD, weight_VxD), target_B, None, cap_pos, cap_neg, implementation)[0]

  caps = jnp.asarray(cap_pos, jnp.float32), jnp.asarray(cap_neg, jnp.float32)
  return linear.in_blocks(block_nll, x_NxD, weight_VxD, target_N, *caps)


@jax.custom_vjp
def _logits(x_NxD, weight_VxD):
  """The head's product. JAX's own gradient of it would multiply in float32, at half of a GPU's rate or less."""
  return product("nd,vd->nv", x_NxD, weight_VxD)


def _logits_gradient(kept, dz_NxV):
  x_NxD, weight_VxD = kept
  return product("nv,vd->nd", dz_NxV, weight_VxD), product("nv,nd->vd", dz_NxV, x_NxD)


_logits.defvjp(lambda x, weight: (_logits(x, weight), (x, weight)), _logits_gradient)


def _xent(z_NxV, target_N, hint_N, cap_pos, cap_neg, implementation):
  name, _ = choose(z_NxV, implementation=implementation)
  for index_N in (target_N,) if hint_N is None else (target_N, hint_N):
    if index_N.shape != z_NxV.shape[:1] or not jnp.issubdtype(index_N.dtype, jnp.integer):
      raise ValueError(f"one integer a row is needed: {index_N.shape} of {index_N.dtype} for {z_NxV.shape=}")
  caps = jnp.asarray(cap_pos, jnp.float32), jnp.asarray(cap_neg, jnp.float32)
  if name == "reference":
    hint = target_N if hint_N is None else hint_N
    caps = jax.lax.stop_gradient(caps)
    return reference.softcapped_xent_with_hint(z_NxV, target_N, hint, cap_pos=caps[0], cap_neg=caps[1])
  return _differentiable(z_NxV, target_N, hint_N, *caps, name)


def _column(z_NxV, index_N, cap_pos, cap_neg):
  z_N = jnp.take_along_axis(z_NxV, index_N[:, None], axis=-1)[:, 0]
  return reference.softcap(z_N.astype(jnp.float32), cap_pos, cap_neg)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _differentiable(z_NxV, target_N, hint_N, cap_pos, cap_neg, name):
  return _forward(z_NxV, target_N, hint_N, cap_pos, cap_neg, name)[0]


def _forward(z_NxV, target_N, hint_N, cap_pos, cap_neg, name):
  lse_N = target.backend(_NAME, name).log_sum_exp(z_NxV, cap_pos, cap_neg)
  nll_N = lse_N - _column(z_NxV, target_N, cap_pos, cap_neg)
  hint_logp_N = None if hint_N is None else _column(z_NxV, hint_N, cap_pos, cap_neg) - lse_N
  return (nll_N, hint_logp_N), (z_NxV, lse_N, target_N, hint_N, cap_pos, cap_neg)


def _backward(name, kept, cotangents):
  z_NxV, lse_N, target_N, hint_N, cap_pos, cap_neg = kept
  d_nll_N, d_hint_N = cotangents
  d_lse_N = d_nll_N if hint_N is None else d_nll_N - d_hint_N
  dz_NxV = target.backend(_NAME, name).gradient(
    z_NxV, lse_N, target_N, -d_nll_N, hint_N, d_hint_N, d_lse_N, cap_pos, cap_neg
  )
  return (
    dz_NxV,
    _no_gradient(target_N),
    _no_gradient(hint_N),
    jnp.zeros_like(cap_pos),
    jnp.zeros_like(cap_neg),
  )


def _no_gradient(index_N):
  return None if index_N is None else np.zeros(index_N.shape, jax.dtypes.float0)


_differentiable.defvjp(_forward, _backward)
