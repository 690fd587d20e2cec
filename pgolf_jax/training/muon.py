"""The recipe's Muon as an optax transformation over stacks of matrices. Recipe section 3.

It differs from `optax.contrib.muon`: rows are normalised before the orthogonalisation, the momentum follows a
schedule and is not bias-corrected, and all of it runs in one chosen type.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from pgolf_jax.kernels.polar_express import api as polar

_FLOOR = 1e-7  # of a row's norm


class MuonState(NamedTuple):
  momentum: optax.Updates  # M, one array [B, m, n] a bank, in Muon's type


def scale_by_muon(
  *, dtype: jnp.dtype = jnp.bfloat16, steps: int = 5, row_normalize: bool = True
) -> optax.GradientTransformationExtraArgs:
  """Orthogonalised Nesterov momentum, each [m, n] of a stack on its own.

  M ← μM + g; u = g + μM; each row of u divided by its 2-norm; u ← `polar_express`(u); u ← √max(1, m/n)·u.
  The step's μ is the extra argument `momentum` of `update`.

  Args:
    dtype: of M and of everything up to the orthogonalised u. In bfloat16 every product and sum is rounded on its own.
    steps: of `polar_express`.
    row_normalize: whether rows are normalised.

  Reference: Jordan et al. 2024, "Muon"; Amsel et al. 2025, https://arxiv.org/abs/2505.16932.
  """
  kind = jnp.finfo(dtype)

  def rounded(x: jax.Array) -> jax.Array:
    # XLA may keep more digits than a cast to bfloat16 asks for when it fuses.
    if dtype == jnp.float32:
      return x
    return jax.lax.reduce_precision(x, kind.nexp, kind.nmant).astype(dtype)

  def wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)

  def direction(u: jax.Array) -> jax.Array:
    if row_normalize:
      norm = jnp.maximum(jnp.linalg.norm(wide(u), axis=-1, keepdims=True), _FLOOR)
      u = rounded(wide(u) / wide(rounded(norm)))
    shape_scale = max(1.0, u.shape[-2] / u.shape[-1]) ** 0.5
    return shape_scale * wide(polar.polar_express(u, steps=steps))

  def init(params):
    return MuonState(jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params))

  def update(grads, state, params=None, *, momentum, **extra):
    del params, extra
    grads = jax.tree.map(lambda g: rounded(wide(g)), grads)
    kept = jax.tree.map(lambda m, g: rounded(wide(rounded(momentum * wide(m))) + wide(g)), state.momentum, grads)
    # PyTorch's `g.add(M, alpha=μ)` rounds μ to the arrays' type and then the sum, but not the product.
    short = wide(rounded(jnp.float32(momentum)))
    nesterov = jax.tree.map(lambda m, g: rounded(wide(g) + short * wide(m)), kept, grads)
    return jax.tree.map(direction, nesterov), MuonState(kept)

  return optax.GradientTransformationExtraArgs(init, update)
