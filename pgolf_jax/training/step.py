"""One training step over a mesh: gradients, clipping, averaging, update, moving average. Recipe section 3.

The step runs under `jax.shard_map` over the mesh axis `data`. Parameters and averages are replicated; Muon's momentum
is sharded along each bank's (padded) stack, rows of the batch over the devices.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pgolf_jax.model.gpt import bind
from pgolf_jax.model.loss import packed_nll
from pgolf_jax.model.params import Params
from pgolf_jax.runtime.mesh import AXIS, place, shardings, world_size
from pgolf_jax.settings.config import Settings
from pgolf_jax.training import optimizer as optimizers
from pgolf_jax.training.muon import MuonState


class TrainState(NamedTuple):
  """Everything on the devices that training changes."""

  params: Params
  opt_state: optax.OptState
  average: Params  # exponential moving average of params, float32


class StepMetrics(NamedTuple):
  loss: jax.Array  # [world], nats per token: each rank's mean over its micro-batches
  grad_norm: jax.Array  # [world], before clipping; with clip_scope "global" the same for all


def _optimizer(settings: Settings, mesh: Mesh):
  return optimizers.make(settings.optimizer, axis=AXIS, axis_size=mesh.size)


def state_specs(settings: Settings, mesh: Mesh, params: Params) -> TrainState:
  """PartitionSpecs of a TrainState for these parameters (arrays or shapes)."""
  opt_state = jax.eval_shape(partial(_optimizer(settings, mesh).init), params)
  is_muon = lambda x: isinstance(x, MuonState)  # noqa: E731
  specs = jax.tree.map(lambda x: jax.tree.map(lambda _: P(AXIS), x) if is_muon(x) else P(), opt_state, is_leaf=is_muon)
  return TrainState(jax.tree.map(lambda _: P(), params), specs, jax.tree.map(lambda _: P(), params))


def _first_state(settings: Settings, mesh: Mesh, specs: TrainState):
  """The function from parameters to the state before the first step."""

  @partial(jax.shard_map, mesh=mesh, in_specs=(P(),), out_specs=specs, check_vma=False)
  def init(params):
    return TrainState(params, _optimizer(settings, mesh).init(params), jax.tree.map(jnp.copy, params))

  return jax.jit(init)


def init_state(settings: Settings, mesh: Mesh, params: Params) -> TrainState:
  """The state before the first step; the moving average starts at the parameters."""
  specs = state_specs(settings, mesh, params)
  return _first_state(settings, mesh, specs)(jax.device_put(params, NamedSharding(mesh, P())))


def state_shapes(settings: Settings, mesh: Mesh, params: Params) -> TrainState:
  """A TrainState's shapes, types and shardings, from parameters or their shapes."""
  specs = state_specs(settings, mesh, params)
  shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
  found = jax.eval_shape(_first_state(settings, mesh, specs), shapes)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), found, shardings(mesh, specs))


def argument_shapes(settings: Settings, mesh: Mesh, params: Params) -> tuple:
  """What `make_step`'s function is called with, as shapes: enough to lower it, on a mesh that need not be there."""
  rows = settings.train.micro_batches
  span = settings.train.batch_tokens // rows + 1
  tokens = jax.ShapeDtypeStruct((rows, span), np.uint16, sharding=batch_sharding(mesh))
  scalar = jax.ShapeDtypeStruct((), np.float32, sharding=NamedSharding(mesh, P()))
  return state_shapes(settings, mesh, params), tokens, scalar, scalar


def make_step(settings: Settings, mesh: Mesh, params: Params, *, seq_len: int, looping: bool):
  """The jitted step for one sequence length and looping mode.

  Args:
    params: arrays or shapes, for the state's layout.

  Returns:
    step(state, tokens [rows, n+1] of integers sharded over `data`, lr_scale, momentum) → (state, StepMetrics).
    The state is donated. Rows of a rank stand side by side, as `Loader.step` gives them.
  """
  world = world_size(settings, mesh)
  opt = _optimizer(settings, mesh)
  limit = settings.optimizer.grad_clip_norm
  per_rank = settings.optimizer.clip_scope == "rank" and (world > 1 or mesh.size == 1)
  dtype = jnp.dtype(settings.train.compute_dtype)
  decay = settings.train.ema_decay

  def loss_and_grad(params, tokens_T1):
    nll = lambda p: packed_nll(  # noqa: E731
      bind(settings.model, p), tokens_T1[None].astype(jnp.int32), looping=looping, seq_len=seq_len, dtype=dtype
    ).mean()
    return jax.value_and_grad(nll)(params)

  def mean_over_rows(params, tokens_RxT1):
    """Mean loss and gradient of a rank's rows on this device."""
    rows = tokens_RxT1.shape[0]
    if rows == 1:
      return loss_and_grad(params, tokens_RxT1[0])

    def add(total, row):
      loss, grads = loss_and_grad(params, row)
      return jax.tree.map(lambda t, x: t + x / rows, total, (loss, grads)), None

    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
    return jax.lax.scan(add, zeros, tokens_RxT1)[0]

  def clipped_ranks(params, tokens):
    """Of this device's ranks: losses, norms, and the mean of the clipped gradients in the type they travel in."""
    ranks = max(1, world // mesh.size)
    tokens = tokens.reshape(ranks, -1, tokens.shape[-1])

    def one(row):
      loss, grads = mean_over_rows(params, row)
      norm = optax.tree.norm(grads)
      return loss, norm, jax.tree.map(lambda g: g * optimizers.clip_factor(norm, limit), grads)

    if ranks == 1:
      loss, norm, grads = one(tokens[0])
      return loss[None], norm[None], grads

    def add(total, row):
      loss, norm, grads = one(row)
      return jax.tree.map(lambda t, g: t + g / ranks, total, grads), (loss, norm)

    grads, (losses, norms) = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), tokens)
    return losses, norms, grads

  def step(state: TrainState, tokens, lr_scale, momentum):
    if per_rank:
      losses, norms, grads = clipped_ranks(state.params, tokens)
      travelling = jnp.dtype(settings.optimizer.muon_dtype)
      grads = {name: g.astype(travelling) if optimizers.group(name) == "bank" else g for name, g in grads.items()}
      grads = optimizers.scatter_stacks(grads, AXIS, mesh.size)
    else:
      loss, grads = mean_over_rows(state.params, tokens)
      grads = optimizers.scatter_stacks(grads, AXIS, mesh.size)
      norm = optimizers.scattered_norm(grads, AXIS)
      grads = jax.tree.map(lambda g: g * optimizers.clip_factor(norm, limit), grads)
      losses, norms = jax.lax.pmean(loss, AXIS)[None], norm[None]
    updates, opt_state = opt.update(grads, state.opt_state, state.params, lr_scale=lr_scale, momentum=momentum)
    params = optax.apply_updates(state.params, updates)
    average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.average, params)
    return TrainState(params, opt_state, average), StepMetrics(losses, norms)

  specs = state_specs(settings, mesh, params)
  metric_specs = StepMetrics(P(AXIS), P(AXIS)) if per_rank else StepMetrics(P(), P())
  sharded = jax.shard_map(
    step, mesh=mesh, in_specs=(specs, P(AXIS), P(), P()), out_specs=(specs, metric_specs), check_vma=False
  )
  # Every process reports the whole step, so the few metrics go to all.
  everywhere = NamedSharding(mesh, P())
  layout = shardings(mesh, specs), StepMetrics(everywhere, everywhere)
  return jax.jit(sharded, donate_argnums=0, out_shardings=layout)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """How the rows of a step lie on the mesh."""
  return NamedSharding(mesh, P(AXIS))


def place_rows(mesh: Mesh, rows: np.ndarray) -> jax.Array:
  """The step's rows on their devices; every process holds all rows and keeps its own."""
  return place(mesh, rows, P(AXIS))
