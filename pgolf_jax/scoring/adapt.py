"""The optimizer of test-time training: Adam or SGD on adapters that all documents of a batch carry side by side."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pgolf_jax.model import adapters as model_adapters
from pgolf_jax.model.adapters import Adapter, Adapters
from pgolf_jax.settings.config import ModelConfig, TTTConfig

_EPS = 1e-10


class Rule(NamedTuple):
  """How adapters of one rank move."""

  kind: Literal["adam", "sgd"]
  rank: int
  scale: float  # of what the adapters add
  lr: float
  weight_decay: float  # decoupled in Adam, added to the gradient in SGD
  beta1: float  # SGD: the momentum
  beta2: float


class Carry(NamedTuple):
  """What goes from chunk to chunk."""

  adapters: Adapters
  first: Adapters | None  # first moments; None where beta1 is 0
  second: Adapters | None  # second moments; None for SGD
  step: jax.Array  # updates so far, int32


def rule(ttt: TTTConfig, *, short: bool = False) -> Rule:
  """The rule for batches of ordinary, or of short, documents."""

  def pick(own, general):
    return own if short and own is not None else general

  rank = pick(ttt.short.rank, ttt.lora.rank)
  return Rule(
    kind=ttt.lora.optimizer,
    rank=rank,
    scale=ttt.lora.alpha / rank,
    lr=pick(ttt.short.lr, ttt.lora.lr) * ttt.lora.lr_mult,
    weight_decay=pick(ttt.short.weight_decay, ttt.lora.weight_decay),
    beta1=ttt.lora.beta1,
    beta2=pick(ttt.short.beta2, ttt.lora.beta2),
  )


def fresh(model: ModelConfig, ttt: TTTConfig, rank: int, key: jax.Array, id_B: Int[Array, "B"]) -> Adapters:
  """New adapters, A drawn for each row from its own id, so that a row's draw does not depend on the batch it is in."""

  def row(i):
    one = model_adapters.init(model, ttt, batch=1, rank=rank, key=jax.random.fold_in(key, i))
    return map_rows(lambda axis, x: jnp.squeeze(x, axis), one)

  kinds = model_adapters.widths(model, ttt)
  return jax.vmap(row, out_axes={kind: row_axis(kind) for kind in kinds})(id_B)


def row_axis(kind: str) -> int:
  """Which axis of a kind's matrices counts rows: stacked kinds have the layer position before it."""
  return 0 if kind == "head" else 1


def map_rows(f: Callable[..., jax.Array], *adapters: Adapters | None) -> Adapters | None:
  """f(row axis, array, …) over all matrices of adapters of one structure; None of None."""
  if adapters[0] is None:
    return None
  return {kind: jax.tree.map(partial(f, row_axis(kind)), *(a[kind] for a in adapters)) for kind in adapters[0]}


def begin(rule: Rule, adapters: Adapters) -> Carry:
  """A batch's first state: these adapters with no moments."""
  zeros = jax.tree.map(jnp.zeros_like, adapters)
  first = zeros if rule.beta1 else None
  second = jax.tree.map(jnp.zeros_like, adapters) if rule.kind == "adam" else None
  return Carry(adapters, first, second, jnp.zeros((), jnp.int32))


def without_B(adapters: Adapters) -> Adapters:
  """The same A, with B zero: what a document starts from."""
  return {kind: Adapter(a.A, jnp.zeros_like(a.B)) for kind, a in adapters.items()}


def update(rule: Rule, carry: Carry, grads: Adapters) -> Carry:
  """One step.

  Adam: p ← p(1 − lr·wd) − lr·m̂/(√v̂ + 1e-10), with m̂ and v̂ bias-corrected. SGD: g ← g + wd·p; m ← β₁m + g;
  p ← p − lr·m.
  """
  step = carry.step + 1
  p, m, v = carry.adapters, carry.first, carry.second
  if rule.kind == "sgd":
    m = jax.tree.map(lambda g, p: g + rule.weight_decay * p, grads, p)
    if carry.first is not None:
      m = jax.tree.map(lambda old, g: rule.beta1 * old + g, carry.first, m)
    p = jax.tree.map(lambda p, m: p - rule.lr * m, p, m)
    return Carry(p, m if carry.first is not None else None, None, step)
  t = step.astype(jnp.float32)
  correct1, correct2 = 1 - rule.beta1**t, 1 - rule.beta2**t
  if m is not None:
    m = jax.tree.map(lambda m, g: rule.beta1 * m + (1 - rule.beta1) * g, m, grads)
  v = jax.tree.map(lambda v, g: rule.beta2 * v + (1 - rule.beta2) * g * g, v, grads)

  def moved(p, m, v):
    return p * (1 - rule.lr * rule.weight_decay) - rule.lr / correct1 * m / (jnp.sqrt(v / correct2) + _EPS)

  return Carry(jax.tree.map(moved, p, grads if m is None else m, v), m, v, step)


def settle(rule: Rule, carry: Carry, done_B: Int[Array, "B"], total: Int[Array, ""]) -> Adapters:
  """Adapters after the steps that rows sat out.

  All rows of a batch take every step; those whose document is finished have gradient zero. They are left out of the
  computation while others go on, and make up for it here.

  Args:
    done_B: steps that each row took.
    total: steps of the batch.
  """
  if not rule.beta1:
    factor_B = (1 - rule.lr * rule.weight_decay) ** (total - done_B).astype(jnp.float32)
    return map_rows(lambda axis, x: x * _along(factor_B, axis, x.ndim), carry.adapters)

  zeros = jax.tree.map(jnp.zeros_like, carry.adapters)

  def idle(i, now: Carry) -> Carry:
    moved = update(rule, now._replace(step=i), zeros)
    sits_out_B = done_B <= i

    def pick(axis, old, new):
      return jnp.where(_along(sits_out_B, axis, old.ndim), new, old)

    both = zip(now[:3], moved[:3], strict=True)
    return Carry(*(map_rows(pick, old, new) for old, new in both), moved.step)

  return jax.lax.fori_loop(jnp.min(done_B), total, idle, carry._replace(step=jnp.min(done_B))).adapters


def _along(x_B: jax.Array, axis: int, ndim: int) -> jax.Array:
  return x_B.reshape([-1 if i == axis else 1 for i in range(ndim)])
