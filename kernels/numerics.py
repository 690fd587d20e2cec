"""Arithmetic that operations share with each other and with the model: products, norms, roundings, the softcap."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

EPS = 1.1920929e-07
"""Epsilon of every norm: float32's, also when the input is bfloat16."""


def wide_product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns `jnp.einsum` of two arrays, summed in float32 and left so."""
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns `jnp.einsum` of two arrays of one type: summed in float32, then rounded to that type."""
  return wide_product(spec, a, b).astype(a.dtype)


def rounded(x: jax.Array, dtype) -> jax.Array:
  """Returns float32 values rounded to a floating type, of that type.

  A cast alone would let XLA keep more digits where it fuses; `lax.reduce_precision` does not.
  """
  if dtype != jnp.float32:
    kind = jnp.finfo(dtype)
    x = jax.lax.reduce_precision(x, kind.nexp, kind.nmant)
  return x.astype(dtype)


class BySign(NamedTuple):
  """Two scalars: one for logits above zero, one for all others."""

  positive: jax.Array | float
  other: jax.Array | float


def softcap(z: jax.Array, cap_pos: jax.Array | float, cap_neg: jax.Array | float) -> jax.Array:
  """Returns c·tanh(z/c) with c = cap_pos where z > 0 and c = cap_neg elsewhere. It rises with z, whatever the caps.

  Args:
    z: logits of any shape, in float32.
    cap_pos, cap_neg: positive scalars.
  """
  return softcap_and_tanh(z, BySign(cap_pos, cap_neg))[0]


def softcap_and_tanh(
  z: jax.Array, caps: BySign, inverse: BySign | None = None, tanh: Callable[[jax.Array], jax.Array] = jnp.tanh
) -> tuple[jax.Array, jax.Array]:
  """Returns the softcapped logits and the tanh in them, whose square the gradient, 1 − tanh², needs.

  Args:
    z: logits in float32.
    caps: what tanh is multiplied by.
    inverse: what z is multiplied by, for a kernel that saves the division by the cap; units may be folded into it
      and into caps.
    tanh: of z times inverse, in those units.
  """
  positive = z > 0
  cap = jnp.where(positive, *caps)
  t = tanh(z / cap if inverse is None else z * jnp.where(positive, *inverse))
  return cap * t, t


def rms_norm(x: jax.Array) -> jax.Array:
  """Returns x / √(mean(x²) + eps) over the last axis, computed in float32, in the type of x."""
  wide = x.astype(jnp.float32)
  return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + EPS)).astype(x.dtype)


def scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
  """Returns factor · x in the type of x, for a factor that many rows share.

  The factor is repeated over x in float32 and cast afterwards, so that its gradient, a sum over rows and positions, is
  added up in float32. Cast first, it would be added up in the type of x; in bfloat16 such a sum stops growing.
  """
  return jnp.broadcast_to(factor.astype(jnp.float32), x.shape).astype(x.dtype) * x


def gated(x: jax.Array, gate: jax.Array, scale: float) -> jax.Array:
  """Returns σ(scale · gate) · x, one gate for each vector along the last axis of x."""
  return x * jax.nn.sigmoid(scale * gate)[..., None]
