"""Adapters that all documents of a batch carry side by side: how they are drawn, and how they learn.

Letters: see model/__init__.py. Of every array with rows, the last two axes are a document's matrix and the one before
them counts rows; arrays without rows (an optimizer's count of steps) are scalars.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int

from pgolf_jax.model import adapters as model_adapters
from pgolf_jax.model.adapters import Adapter, Adapters
from pgolf_jax.runtime.distributed import AXIS
from pgolf_jax.settings import ModelConfig, TTTConfig

_ADAM_EPS = 1e-10


class Rule(NamedTuple):
  """How adapters of one rank move."""

  rank: int
  scale: float  # factor on what the adapters add
  optimizer: str  # adam or sgd
  lr: float
  weight_decay: float  # decoupled in Adam, added to the gradient in SGD
  beta1: float  # SGD: the momentum
  beta2: float

  @classmethod
  def choose(cls, ttt: TTTConfig, *, short: bool) -> "Rule":
    """Returns the rule for batches of ordinary, or of short, documents."""

    def pick(for_short, general):
      return for_short if short and for_short is not None else general

    lora = ttt.lora
    rank = pick(ttt.short.rank, lora.rank)
    return cls(
      rank=rank,
      scale=lora.alpha / rank,
      optimizer=lora.optimizer,
      lr=pick(ttt.short.lr, lora.lr) * lora.lr_mult,
      weight_decay=pick(ttt.short.weight_decay, lora.weight_decay),
      beta1=lora.beta1,
      beta2=pick(ttt.short.beta2, lora.beta2),
    )

  def transformation(self) -> optax.GradientTransformation:
    """Returns the optimizer.

    Adam: p ← p − lr·(m̂/(√v̂ + 1e-10) + wd·p), with m̂ and v̂ bias-corrected. SGD: g ← g + wd·p; m ← β₁m + g;
    p ← p − lr·m. Without β₁ no first moments are held: adapters of many documents are the largest part of memory.
    """
    decay, descend = optax.add_decayed_weights(self.weight_decay), optax.scale(-self.lr)
    if self.optimizer == "sgd":
      return optax.chain(decay, optax.trace(self.beta1) if self.beta1 else optax.identity(), descend)
    if self.beta1:
      adam = optax.scale_by_adam(self.beta1, self.beta2, _ADAM_EPS)
    else:
      adam = optax.scale_by_rms(self.beta2, _ADAM_EPS, eps_in_sqrt=False, bias_correction=True)
    return optax.chain(adam, decay, descend)


Matrices = dict[str, jax.Array]
"""Kind → A of its adapters, [(P,) B, R, in]: all that is carried from batch to batch."""


class Learner(NamedTuple):
  """Adapters and the state of their optimizer: what goes from chunk to chunk."""

  adapters: Adapters
  moments: optax.OptState


def draw(
  model: ModelConfig, ttt: TTTConfig, rank: int, key: jax.Array, set_B: Int[Array, "B"], id_B: Int[Array, "B"]
) -> Matrices:
  """Returns a new A of every kind, drawn for each row from its own set and id: the row or its batch do not matter."""

  def row(number, i):
    own_key = jax.random.fold_in(jax.random.fold_in(key, number), i)
    one = model_adapters.init(model, ttt, batch=1, rank=rank, key=own_key)
    return {kind: jnp.squeeze(adapter.A, row_axis(adapter.A)) for kind, adapter in one.items()}

  shapes = jax.eval_shape(row, set_B[0], id_B[0])
  return jax.vmap(row, out_axes=jax.tree.map(lambda x: x.ndim - 2, shapes))(set_B, id_B)


def row_axis(x: jax.Array | jax.ShapeDtypeStruct) -> int:
  """Returns the axis of an array that counts rows."""
  return x.ndim - 3


def map_rows(f: Callable[..., jax.Array], *trees):
  """Returns f(row axis, array, …) over all arrays with rows; the last tree's scalars."""
  return jax.tree.map(lambda *xs: f(row_axis(xs[-1]), *xs) if xs[-1].ndim else xs[-1], *trees)


def select(is_first_B: Bool[Array, "B"], first, second):
  """Returns a tree of arrays with rows, each row from the first or from the second; the second's scalars."""
  return map_rows(lambda axis, x, y: jnp.where(_along(is_first_B, axis, y.ndim), x, y), first, second)


def row_specs(tree):
  """Returns PartitionSpecs: arrays with rows are shared out by row, scalars lie on every device."""
  return jax.tree.map(lambda x: P(*[None] * row_axis(x), AXIS) if x.ndim else P(), tree)


def with_zero_B(model: ModelConfig, ttt: TTTConfig, matrices: Matrices) -> Adapters:
  """Returns adapters with these A, and B zero: what documents start from."""
  width = model_adapters.widths(model, ttt)
  return {kind: Adapter(A, jnp.zeros((*A.shape[:-1], width[kind]))) for kind, A in matrices.items()}


def begin(rule: Rule, adapters: Adapters) -> Learner:
  """Returns a batch's first state: these adapters without moments."""
  return Learner(adapters, rule.transformation().init(adapters))


def update(rule: Rule, learner: Learner, grads: Adapters) -> Learner:
  """Takes one step."""
  updates, moments = rule.transformation().update(grads, learner.moments, learner.adapters)
  return Learner(optax.apply_updates(learner.adapters, updates), moments)


def settle(rule: Rule, learner: Learner, done_B: Int[Array, "B"], total_B: Int[Array, "B"]) -> Adapters:
  """Returns adapters after the steps that rows sat out.

  All rows of a batch take every step; those whose document is finished have gradient zero. They are left out of the
  computation while others go on, and make up for it here.

  Args:
    done_B: steps that each row took.
    total_B: steps of each row's batch.
  """
  if not rule.beta1:  # only the decay moves p
    factor_B = (1 - rule.lr * rule.weight_decay) ** (total_B - done_B).astype(jnp.float32)
    return map_rows(lambda axis, x: x * _along(factor_B, axis, x.ndim), learner.adapters)

  zeros = jax.tree.map(jnp.zeros_like, learner.adapters)
  first = jnp.min(done_B)

  def idle(i, now: Learner) -> Learner:
    return select((i < done_B) | (total_B <= i), now, update(rule, now, zeros))

  # The optimizer's count of steps begins again where the first row stopped.
  learner = jax.tree.map(lambda x: x if x.ndim else first.astype(x.dtype), learner)
  return jax.lax.fori_loop(first, jnp.max(total_B), idle, learner).adapters


def _along(x_B: jax.Array, axis: int, ndim: int) -> jax.Array:
  return x_B.reshape([-1 if i == axis else 1 for i in range(ndim)])
