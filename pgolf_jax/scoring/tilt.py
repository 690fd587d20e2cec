"""The tilt of a distribution towards one hinted token, applied to losses.

With q the model's probability of the hint h, the tilted distribution multiplies p(h) by e^β and divides everything by
1 + q(e^β − 1), so that it is a full distribution again whatever the target is. Recipe section 6.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def tilt(
  nll: Float[Array, "*N"],
  hint_logp: Float[Array, "*N"],
  target: Int[Array, "*N"],
  hint: Int[Array, "*N"],
  gate: Bool[Array, "*N"],
  boost: Float[Array, "*N"],
) -> Float[Array, "*N"]:
  """NLL − β·[target = hint] + log(1 + q(e^β − 1)) where the gate is open, else NLL. All in fp32, nats.

  Args:
    nll: −log p(target) under the model.
    hint_logp: log q, the model's log-probability of `hint`.
    target, hint: token ids.
    gate: whether the position is tilted.
    boost: β; of any size and sign.
  """
  nll, boost = nll.astype(jnp.float32), boost.astype(jnp.float32)
  hint_logp = jnp.minimum(hint_logp.astype(jnp.float32), 0.0)  # rounding can leave log q a little above 0
  # log((1 − q) + q·e^β): no term overflows for large β, and 1 − q keeps its digits where q is nearly 1.
  log_normalizer = jnp.logaddexp(jnp.log(-jnp.expm1(hint_logp)), hint_logp + boost)
  tilted = nll - jnp.where(target == hint, boost, 0.0) + log_normalizer
  return jnp.where(gate, tilted, nll)
