"""Muon for the banks and AdamW for the rest, as optax transformations. Recipe section 3.

With several devices each orthogonalises its share of a bank's stack: the gradients of a bank arrive as the device's
slice of the padded stack (`scatter_stacks`), and its updates are gathered before weight decay and learning rate.
"""

from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pgolf_jax.kernels import polar_express as polar
from pgolf_jax.model.params import BANKS, SOFTCAPS
from pgolf_jax.settings import OptimizerConfig

_FLOOR = 1e-7  # of a row's norm


class MuonState(NamedTuple):
  """What Muon remembers."""

  momentum: optax.Updates  # M by bank, [stack, m, n], in Muon's type


class LookaheadState(NamedTuple):
  """What `with_lookahead` remembers."""

  inner: optax.OptState
  drift: optax.Updates  # moving average of the parameters' changes, float32


Number = np.float32 | jax.Array


class Hyper(NamedTuple):
  """The numbers of an update that its program takes as arguments, so that one program serves all their values."""

  matrix_lr: Number
  muon_wd: Number
  embed_lr: Number
  embed_wd: Number
  scalar_lr: Number
  adam_wd: Number
  beta1: Number
  beta1_rest: Number  # 1 − β₁, rounded once; the difference of rounded numbers would lose three digits
  beta2: Number
  beta2_rest: Number  # 1 − β₂
  adam_eps: Number
  grad_clip_norm: Number  # infinite for no limit
  lookahead_decay: Number
  lookahead_rest: Number  # 1 − lookahead_decay

  @classmethod
  def of(cls, config: OptimizerConfig) -> "Hyper":
    """Returns the numbers of a config, in float32."""
    values = {name: getattr(config, name) for name in cls._fields if not name.endswith("_rest")}
    values |= {"beta1_rest": 1 - config.beta1, "beta2_rest": 1 - config.beta2}
    values["lookahead_rest"] = 1 - config.lookahead_decay
    values["grad_clip_norm"] = config.grad_clip_norm if config.grad_clip_norm > 0 else np.inf
    return cls(**{name: np.float32(value) for name, value in values.items()})


def scale_by_adam() -> optax.GradientTransformationExtraArgs:
  """Returns `optax.scale_by_adam`, whose β₁, β₂ and ε are in the extra argument `hyper` of `update`."""

  def update(grads, state, params=None, *, hyper, **extra):
    del params, extra
    count = optax.safe_increment(state.count)
    mu = jax.tree.map(lambda g, m: hyper.beta1_rest * g + hyper.beta1 * m, grads, state.mu)
    nu = jax.tree.map(lambda g, v: hyper.beta2_rest * g**2 + hyper.beta2 * v, grads, state.nu)
    mu_hat = optax.tree.bias_correction(mu, hyper.beta1, count)
    nu_hat = optax.tree.bias_correction(nu, hyper.beta2, count)
    directions = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + hyper.adam_eps), mu_hat, nu_hat)
    return directions, optax.ScaleByAdamState(count, mu, nu)

  return optax.GradientTransformationExtraArgs(optax.scale_by_adam().init, update)


def scale_by_muon(
  *, dtype: jnp.dtype = jnp.bfloat16, steps: int = 5, row_normalize: bool = True
) -> optax.GradientTransformationExtraArgs:
  """Returns orthogonalised Nesterov momentum, applied to each [m, n] of a stack on its own.

  M ← μM + g; u = g + μM; each row of u divided by its 2-norm; u ← `polar_express`(u); u ← √max(1, m/n)·u.
  The step's μ is the extra argument `momentum` of `update`. It differs from `optax.contrib.muon`: rows are normalised
  first, μ follows a schedule, M is not bias-corrected, and everything runs in one chosen type.

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
    moments = jax.tree.map(lambda m, g: rounded(wide(rounded(momentum * wide(m))) + wide(g)), state.momentum, grads)
    # PyTorch's `g.add(M, alpha=μ)` rounds μ to the arrays' type and then the sum, but not the product.
    short = wide(rounded(jnp.float32(momentum)))
    nesterov = jax.tree.map(lambda m, g: rounded(wide(g) + short * wide(m)), moments, grads)
    return jax.tree.map(direction, nesterov), MuonState(moments)

  return optax.GradientTransformationExtraArgs(init, update)


def make(
  config: OptimizerConfig, *, unused: Collection[str] = (), axis: str | None = None, axis_size: int = 1
) -> optax.GradientTransformationExtraArgs:
  """Returns the whole optimizer over flat parameters.

  `update` takes the extra arguments `lr_scale` (the schedule's factor on every learning rate), `momentum` (μ),
  `hyper` (a `Hyper`; the config's where it is not given) and, where the config looks ahead, `lookahead`.

  Args:
    unused: parameters without a path to the loss, which stay as they are: not even decay moves them.
    axis: mesh axis inside `jax.shard_map`; the gradients of banks are then slices made by `scatter_stacks`.
    axis_size: devices along it.
  """
  muon = scale_by_muon(
    dtype=jnp.dtype(config.muon_dtype), steps=config.muon_steps, row_normalize=config.muon_row_normalize
  )
  if axis is not None:
    muon = _over_slices(muon, axis, axis_size)
  groups = {
    "bank": optax.chain(muon, _decayed_step("matrix_lr", "muon_wd")),
    "embedding": optax.chain(scale_by_adam(), _decayed_step("embed_lr", "embed_wd")),
    "scalar": optax.chain(scale_by_adam(), _decayed_step("scalar_lr", "adam_wd")),
    "fixed": optax.set_to_zero(),
  }
  whole = optax.partition(groups, lambda params: {n: "fixed" if n in unused else group(n) for n in params})
  if config.lookahead > 0:
    whole = with_lookahead(whole)

  def update(grads, state, params, *, hyper: Hyper | None = None, **extra):
    return whole.update(grads, state, params, hyper=hyper or Hyper.of(config), **extra)

  return optax.GradientTransformationExtraArgs(whole.init, update)


def with_lookahead(inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
  """Returns `inner` with Nesterov's momentum on the average of the parameters' changes (EMA-Nesterov).

  θ' ← θ + βm; gradient and inner step at θ'; m ← γm + (1 − γ)(change of θ, the way to θ' included). A change that all
  steps share grows by 1 / (1 − β). The gradients must be those at `ahead(…)`. β is the extra argument `lookahead` of
  `update`, 0 where it is not given, as before the average has filled; γ is `hyper.lookahead_decay`.

  Reference: https://arxiv.org/abs/2605.25395.
  """

  def init(params):
    return LookaheadState(inner.init(params), jax.tree.map(jnp.zeros_like, params))

  def update(grads, state, params, *, hyper, lookahead=0.0, **extra):
    there = ahead(params, state, lookahead)
    updates, inner_state = inner.update(grads, state.inner, there, hyper=hyper, **extra)
    updates = jax.tree.map(lambda u, to, w: (to - w) + u, updates, there, params)
    follow = lambda m, u: hyper.lookahead_decay * m + hyper.lookahead_rest * u  # noqa: E731
    return updates, LookaheadState(inner_state, jax.tree.map(follow, state.drift, updates))

  return optax.GradientTransformationExtraArgs(init, update)


def ahead(params: optax.Params, state: optax.OptState, lookahead: Number) -> optax.Params:
  """Returns the parameters at which this optimizer wants the gradient: `params`, but for `with_lookahead`."""
  if not isinstance(state, LookaheadState):
    return params
  return jax.tree.map(lambda w, m: w + lookahead * m, params, state.drift)


def group(name: str) -> str:
  """Returns the name of the group that updates a parameter: bank, embedding, scalar or fixed."""
  if name in BANKS:
    return "bank"
  if name in SOFTCAPS:
    return "fixed"
  return "embedding" if name == "tok_emb.weight" else "scalar"


def _decayed_step(lr: str, decay: str) -> optax.GradientTransformationExtraArgs:
  """Returns W ← W·(1 − lr·lr_scale·decay) − lr·lr_scale·direction; lr and decay are names of numbers of `hyper`."""

  def update(directions, state, params, *, lr_scale, hyper, **extra):
    del extra
    rate = getattr(hyper, lr) * lr_scale
    keep = 1.0 - rate * getattr(hyper, decay)
    # The decayed W and the step are each rounded, as in PyTorch. The difference of close numbers is exact, so that
    # `optax.apply_updates` arrives at the same bits.
    step = lambda d, w: (_rounded(w * keep) - _rounded(rate * d)) - w  # noqa: E731
    return jax.tree.map(step, directions, params), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _rounded(product: jax.Array) -> jax.Array:
  """Returns the product unchanged; clipped to the finite range, it is not fused into a multiply-add."""
  largest = jnp.finfo(product.dtype).max
  return jnp.clip(product, -largest, largest)


def padded(stack: int, axis_size: int) -> int:
  """Returns the length of a stack padded to a multiple of the devices."""
  return -(-stack // axis_size) * axis_size


def pad_stack(x: jax.Array, axis_size: int) -> jax.Array:
  """Returns the stack with zero matrices at its end, so that devices share it evenly."""
  return jnp.pad(x, ((0, padded(x.shape[0], axis_size) - x.shape[0]), (0, 0), (0, 0)))


def scatter_stacks(grads: dict[str, jax.Array], axis: str, axis_size: int) -> dict[str, jax.Array]:
  """Returns means over the devices: of a bank this device's slice of the padded stack, of all else the whole."""

  def mean(name: str, g: jax.Array) -> jax.Array:
    if name in BANKS:
      return jax.lax.psum_scatter(pad_stack(g, axis_size), axis, scatter_dimension=0, tiled=True) / axis_size
    return jax.lax.pmean(g, axis)

  return {name: mean(name, g) for name, g in grads.items()}


def scattered_norm(grads: dict[str, jax.Array], axis: str) -> jax.Array:
  """Returns the 2-norm over all devices of gradients as `scatter_stacks` returns them."""
  squares = {name: jnp.sum(jnp.square(g.astype(jnp.float32))) for name, g in grads.items()}
  banks = sum(squares[name] for name in BANKS)
  return jnp.sqrt(jax.lax.psum(banks, axis) + sum(s for name, s in squares.items() if name not in BANKS))


def _over_slices(inner: optax.GradientTransformationExtraArgs, axis: str, axis_size: int):
  """Returns `inner` applied to this device's slice of every stack, its updates gathered into whole stacks."""

  def init(params):
    return inner.init(
      jax.tree.map(lambda p: pad_stack(p, axis_size)[: padded(p.shape[0], axis_size) // axis_size], params)
    )

  def update(slices, state, params, **extra):
    updates, state = inner.update(slices, state, None, **extra)
    gather = lambda u, p: jax.lax.all_gather(u, axis, tiled=True)[: p.shape[0]]  # noqa: E731
    return jax.tree.map(gather, updates, params), state

  return optax.GradientTransformationExtraArgs(init, update)


def clip(grads: optax.Updates, norm: jax.Array, limit: float | jax.Array) -> optax.Updates:
  """Returns the gradients times min(1, limit / (norm + 1e-6)), as they are where limit is infinite or 0.

  `optax.clip_by_global_norm` takes the norm of the arrays it is given; here it may be one over several devices.

  Args:
    limit: a 0 must be known when the function is traced.
  """
  if not isinstance(limit, jax.Array) and limit <= 0:
    return grads
  factor = jnp.minimum(1.0, limit / (norm + 1e-6))
  return jax.tree.map(lambda g: g * factor, grads)
