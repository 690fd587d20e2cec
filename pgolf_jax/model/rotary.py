"""Rotary position embedding on the first dimensions of each head."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Angles = tuple[jax.Array, jax.Array]


def angles(position_T: Int[Array, " T"], rope_dims: int, base: float) -> Angles:
  """(cos, sin), each [T, rope_dims/2] in float32, of position · base^(−2i/rope_dims)."""
  frequency = base ** (-jnp.arange(0, rope_dims, 2, dtype=jnp.float32) / rope_dims)
  angle = position_T[:, None].astype(jnp.float32) * frequency
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BxTxHxC: Float[Array, "B T H C"], angles: Angles) -> Float[Array, "B T H C"]:
  """Split-half pairs of the leading dimensions: (a, b) → (a·cos + b·sin, −a·sin + b·cos); the rest passes."""
  cos, sin = (a[:, None].astype(x_BxTxHxC.dtype) for a in angles)
  half = cos.shape[-1]
  a, b, rest = jnp.split(x_BxTxHxC, (half, 2 * half), axis=-1)
  return jnp.concatenate([a * cos + b * sin, b * cos - a * sin, rest], axis=-1)
