"""The softcapped cross-entropy and its gradient, from a backend's two passes over the logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pgolf_jax.kernels.numerics import softcap


def with_gradient(log_sum_exp: Callable, gradient: Callable) -> Callable[..., tuple[jax.Array, jax.Array | None]]:
  """Returns the operation, made of two passes over the logits; single columns are gathered in plain JAX.

  Args:
    log_sum_exp: (z_NxV, cap_pos, cap_neg) → log Σ exp of each row's softcapped logits, float32.
    gradient: (z_NxV, lse_N, target_N, d_target_N, hint_N, d_hint_N, d_lse_N, cap_pos, cap_neg) → the cotangent of z,
      in the type of z. lse_N is what `log_sum_exp` returned. d_target_N, d_hint_N and d_lse_N are the cotangents of
      the target's capped logit, of the hint's, and of lse_N. hint_N and d_hint_N are None where there are no hints.
  """

  @jax.custom_vjp
  def xent(z_NxV, target_N, hint_N, cap_pos, cap_neg):
    return forward(z_NxV, target_N, hint_N, cap_pos, cap_neg)[0]

  def forward(z_NxV, target_N, hint_N, cap_pos, cap_neg):
    lse_N = log_sum_exp(z_NxV, cap_pos, cap_neg)
    nll_N = lse_N - _column(z_NxV, target_N, cap_pos, cap_neg)
    hint_logp_N = None if hint_N is None else _column(z_NxV, hint_N, cap_pos, cap_neg) - lse_N
    return (nll_N, hint_logp_N), (z_NxV, lse_N, target_N, hint_N, cap_pos, cap_neg)

  def backward(residuals, cotangents):
    z_NxV, lse_N, target_N, hint_N, cap_pos, cap_neg = residuals
    d_nll_N, d_hint_N = cotangents
    d_lse_N = d_nll_N if hint_N is None else d_nll_N - d_hint_N
    dz_NxV = gradient(z_NxV, lse_N, target_N, -d_nll_N, hint_N, d_hint_N, d_lse_N, cap_pos, cap_neg)
    no_gradients = zero_gradient(target_N), zero_gradient(hint_N), jnp.zeros_like(cap_pos), jnp.zeros_like(cap_neg)
    return dz_NxV, *no_gradients

  xent.defvjp(forward, backward)

  def softcapped_xent(
    z_NxV: jax.Array, target_N: jax.Array, hint_N: jax.Array | None, *, cap_pos: jax.Array, cap_neg: jax.Array
  ) -> tuple[jax.Array, jax.Array | None]:
    return xent(z_NxV, target_N, hint_N, cap_pos, cap_neg)

  return softcapped_xent


def zero_gradient(index_N: jax.Array | None) -> np.ndarray | None:
  """Returns the cotangent that JAX asks for in place of an array of integers."""
  return None if index_N is None else np.zeros(index_N.shape, jax.dtypes.float0)


def _column(z_NxV, index_N, cap_pos, cap_neg):
  z_N = jnp.take_along_axis(z_NxV, index_N[:, None], axis=-1)[:, 0]
  return softcap(z_N.astype(jnp.float32), cap_pos, cap_neg)
