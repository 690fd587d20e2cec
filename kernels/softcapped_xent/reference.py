"""The softcapped cross-entropy as its formula says, for tests to compare with."""

import jax
import jax.numpy as jnp


def softcap(z: jax.Array, cap_pos: jax.Array | float, cap_neg: jax.Array | float) -> jax.Array:
  """c·tanh(z/c) with c = cap_pos where z > 0 and cap_neg elsewhere."""
  cap = jnp.where(z > 0, cap_pos, cap_neg)
  return cap * jnp.tanh(z / cap)


def softcapped_xent_with_hint(
  z_NxV: jax.Array, target_N: jax.Array, hint_N: jax.Array, *, cap_pos: jax.Array, cap_neg: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The negative log-probability of each row's target and the log-probability of its hint, in float32."""
  logp_NxV = jax.nn.log_softmax(softcap(z_NxV.astype(jnp.float32), cap_pos, cap_neg), axis=-1)

  def pick(index_N):
    return jnp.take_along_axis(logp_NxV, index_N[:, None], axis=-1)[:, 0]

  return -pick(target_N), pick(hint_N)
