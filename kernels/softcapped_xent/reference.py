"""The softcapped cross-entropy straight from its formula, for comparison."""

import jax
import jax.numpy as jnp

from pgolf_jax.kernels.numerics import softcap


def softcapped_xent(
  z_NxV: jax.Array, target_N: jax.Array, hint_N: jax.Array | None, *, cap_pos: jax.Array, cap_neg: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
  """Returns the negative log-probability of each row's target and the log-probability of its hint, in float32."""
  cap_pos, cap_neg = jax.lax.stop_gradient((cap_pos, cap_neg))
  logp_NxV = jax.nn.log_softmax(softcap(z_NxV.astype(jnp.float32), cap_pos, cap_neg), axis=-1)

  def pick(index_N):
    return jnp.take_along_axis(logp_NxV, index_N[:, None], axis=-1)[:, 0]

  return -pick(target_N), None if hint_N is None else pick(hint_N)
