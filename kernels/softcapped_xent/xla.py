"""The softcapped cross-entropy's two passes over the logits, left to XLA."""

import jax
import jax.numpy as jnp

from pgolf_jax.kernels.numerics import BySign, softcap, softcap_and_tanh
from pgolf_jax.kernels.softcapped_xent.vjp import with_gradient


def log_sum_exp(z_NxV: jax.Array, cap_pos: jax.Array, cap_neg: jax.Array) -> jax.Array:
  """Returns log Σ exp of each row; see `with_gradient`.

  The softcap rises with z, so the greatest capped logit is the capped greatest z, whatever the caps.
  """
  top_N = softcap(jnp.max(z_NxV, axis=-1).astype(jnp.float32), cap_pos, cap_neg)
  capped_NxV = softcap(z_NxV.astype(jnp.float32), cap_pos, cap_neg)
  return top_N + jnp.log(jnp.sum(jnp.exp(capped_NxV - top_N[:, None]), axis=-1))


def gradient(
  z_NxV: jax.Array,
  lse_N: jax.Array,
  target_N: jax.Array,
  d_target_N: jax.Array,
  hint_N: jax.Array | None,
  d_hint_N: jax.Array | None,
  d_lse_N: jax.Array,
  cap_pos: jax.Array,
  cap_neg: jax.Array,
) -> jax.Array:
  """Returns the cotangent of z; see `with_gradient`."""
  capped, tanh = softcap_and_tanh(z_NxV.astype(jnp.float32), BySign(cap_pos, cap_neg))
  column = jax.lax.broadcasted_iota(jnp.int32, z_NxV.shape, 1)
  d_capped = d_lse_N[:, None] * jnp.exp(capped - lse_N[:, None])
  d_capped += jnp.where(column == target_N[:, None], d_target_N[:, None], 0)
  if hint_N is not None:
    d_capped += jnp.where(column == hint_N[:, None], d_hint_N[:, None], 0)
  return (d_capped * (1 - tanh * tanh)).astype(z_NxV.dtype)


softcapped_xent = with_gradient(log_sum_exp, gradient)
