"""Muon for the banks and AdamW for the rest, as optax transformations. Recipe section 3.

With several devices each orthogonalises its share of a bank's stack: the gradients of a bank arrive as the device's
slice of the padded stack (`scatter_stacks`), and its updates are gathered before weight decay and learning rate.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pgolf_jax.kernels import polar_express as polar
from pgolf_jax.model.params import BANKS, SOFTCAPS
from pgolf_jax.settings import ModelConfig, OptimizerConfig

_FLOOR = 1e-7  # of a row's norm


class MuonState(NamedTuple):
  """What Muon remembers."""

  momentum: optax.Updates  # M by bank, [stack, m, n], in Muon's type


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

  @classmethod
  def of(cls, config: OptimizerConfig) -> "Hyper":
    """Returns the numbers of a config, in float32."""
    values = {name: getattr(config, name) for name in cls._fields if not name.endswith("_rest")}
    values |= {"beta1_rest": 1 - config.beta1, "beta2_rest": 1 - config.beta2}
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


class HeadGroups(NamedTuple):
  """Which matrices of a bank are orthogonalised by groups of heads rather than whole."""

  rows: int  # of a group
  chosen: np.ndarray  # [stack], true for these matrices


def head_groups(config: OptimizerConfig, model: ModelConfig) -> dict[str, HeadGroups]:
  """Returns the groups of every bank that has some."""
  if config.muon_heads == 0:
    return {}
  kinds = {"qo_bank": "qo", "kv_bank": "kv"}
  chosen = {name: np.repeat([kind in config.muon_heads_of for kind in pair], model.num_layers)
            for name, pair in kinds.items()}  # fmt: skip
  return {name: HeadGroups(config.muon_heads * model.head_dim, c) for name, c in chosen.items() if c.any()}


def scale_by_muon(
  *,
  dtype: jnp.dtype = jnp.bfloat16,
  steps: int = 5,
  row_normalize: bool = True,
  column_normalize: bool = False,
  groups: Mapping[str, HeadGroups] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Returns orthogonalised Nesterov momentum, applied to each [m, n] of a stack on its own.

  M ← μM + g; u = g + μM; each row of u divided by its 2-norm; u ← `polar_express`(u); u ← √max(1, m/n)·u.
  The step's μ is the extra argument `momentum` of `update`; where `update` is given the slices that device p of several
  has, p is its extra argument `part`. It differs from `optax.contrib.muon`: rows are normalised
  first, μ follows a schedule, M is not bias-corrected, and everything runs in one chosen type.

  Args:
    dtype: of M and of everything up to the orthogonalised u. In bfloat16 every product and sum is rounded on its own.
    steps: of `polar_express`.
    row_normalize: whether rows are normalised.
    column_normalize: whether columns are, after the rows.
    groups: the last two lines hold for each group of heads on its own in the matrices of a bank that it chooses.

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

  def normalized(u: jax.Array, axis: int) -> jax.Array:
    norm = jnp.maximum(jnp.linalg.norm(wide(u), axis=axis, keepdims=True), _FLOOR)
    return rounded(wide(u) / wide(rounded(norm)))

  def orthogonal(u: jax.Array) -> jax.Array:
    shape_scale = max(1.0, u.shape[-2] / u.shape[-1]) ** 0.5
    return shape_scale * wide(polar.polar_express(u, steps=steps))

  def direction(name: str, u: jax.Array, part: jax.Array | int) -> jax.Array:
    if row_normalize:
      u = normalized(u, axis=-1)
    if column_normalize:
      u = normalized(u, axis=-2)
    if not groups or name not in groups:
      return orthogonal(u)
    rows, chosen = groups[name]
    by_group = orthogonal(u.reshape(-1, rows, u.shape[-1])).reshape(u.shape)
    if chosen.all():
      return by_group
    # A device's slice has matrices of both kinds, which ones depends on the device. Slices past the stack's end are
    # padding, for which either way gives zeros.
    chosen = jnp.asarray(np.pad(chosen, (0, -len(chosen) % len(u))))
    here = jax.lax.dynamic_slice(chosen, (part * len(u),), (len(u),))
    return jnp.where(here[:, None, None], by_group, orthogonal(u))

  def init(params):
    return MuonState(jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params))

  def update(grads, state, params=None, *, momentum, part=0, **extra):
    del params, extra
    grads = jax.tree.map(lambda g: rounded(wide(g)), grads)
    moments = jax.tree.map(lambda m, g: rounded(wide(rounded(momentum * wide(m))) + wide(g)), state.momentum, grads)
    # PyTorch's `g.add(M, alpha=μ)` rounds μ to the arrays' type and then the sum, but not the product.
    short = wide(rounded(jnp.float32(momentum)))
    nesterov = jax.tree.map(lambda m, g: rounded(wide(g) + short * wide(m)), moments, grads)
    return jax.tree_util.tree_map_with_path(lambda path, u: direction(path[-1].key, u, part), nesterov), MuonState(
      moments
    )

  return optax.GradientTransformationExtraArgs(init, update)


def make(
  config: OptimizerConfig,
  *,
  model: ModelConfig | None = None,
  unused: Collection[str] = (),
  axis: str | None = None,
  axis_size: int = 1,
) -> optax.GradientTransformationExtraArgs:
  """Returns the whole optimizer over flat parameters.

  `update` takes the extra arguments `lr_scale` (the schedule's factor on every learning rate), `momentum` (μ)
  and `hyper` (a `Hyper`; the config's where it is not given).

  Args:
    model: whose heads Muon tells apart, where the config asks for that.
    unused: parameters without a path to the loss, which stay as they are: not even decay moves them.
    axis: mesh axis inside `jax.shard_map`; the gradients of banks are then slices made by `scatter_stacks`.
    axis_size: devices along it.
  """
  if config.muon_heads and model is None:
    raise ValueError("optimizer.muon_heads needs the model")
  muon = scale_by_muon(
    dtype=jnp.dtype(config.muon_dtype),
    steps=config.muon_steps,
    row_normalize=config.muon_row_normalize,
    column_normalize=config.muon_column_normalize,
    groups=head_groups(config, model) if model else None,
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

  def update(grads, state, params, *, hyper: Hyper | None = None, **extra):
    return whole.update(grads, state, params, hyper=hyper or Hyper.of(config), **extra)

  return optax.GradientTransformationExtraArgs(whole.init, update)


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
    updates, state = inner.update(slices, state, None, part=jax.lax.axis_index(axis), **extra)
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
