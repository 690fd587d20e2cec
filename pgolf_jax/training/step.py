"""One training step over a mesh: gradients, clipping, averaging, update, moving average. Recipe section 3.

The step runs under `jax.shard_map` over the mesh axis `data`. Parameters and averages are replicated; Muon's momentum
is sharded along each bank's (padded) stack, rows of the batch over the devices. Letters beside those of the model:
G ranks of a device, M micro-batches of a rank.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Integer

from pgolf_jax.kernels import leaky_relu2_mlp as mlp
from pgolf_jax.kernels import polar_express as polar
from pgolf_jax.kernels import segment_attention as attention
from pgolf_jax.kernels import softcapped_xent as xent
from pgolf_jax.model import params as parameters
from pgolf_jax.model.gpt import bind, packed_nll
from pgolf_jax.model.params import Params
from pgolf_jax.runtime.distributed import AXIS, place, replicated, shardings, world_size
from pgolf_jax.runtime.jax_setup import options_of_a_step
from pgolf_jax.settings import ModelConfig, Settings
from pgolf_jax.training import optimizer as optimizers
from pgolf_jax.training.optimizer import Hyper, MuonState, Number


class TrainState(NamedTuple):
  """Everything on the devices that training changes."""

  params: Params
  opt_state: optax.OptState
  average: Params  # exponential moving average of params, float32


class StepInputs(NamedTuple):
  """What one step is given beside the state."""

  tokens_BxT1: jax.Array  # integers, all rows of the step; those of a rank stand side by side
  lr_scale: Number  # the schedule's factor on every learning rate
  momentum: Number  # Muon's μ
  hyper: Hyper
  ema_decay: Number  # share of the moving average that stays
  ema_rest: Number  # 1 − ema_decay


class StepMetrics(NamedTuple):
  """What one step reports."""

  loss: jax.Array  # [ranks], nats per token: each rank's mean over its micro-batches
  grad_norm: jax.Array  # [ranks], before clipping; with clip_scope "global" one number


Loss = Callable[[Params, jax.Array], jax.Array]
"""(parameters, tokens of one row) → mean loss."""


class TrainStep:
  """The step of one run on one mesh: its state, and its programs, one for each sequence length and looping mode.

  Nothing is computed before `init`: with a mesh that is only described, `abstract` and `trace` work all the same.

  Args:
    settings: of the run.
    mesh: real, described or abstract, with the axis `data`.

  Attributes:
    specs: a PartitionSpec for every array of the state.
    shardings: the same on the mesh.
  """

  def __init__(self, settings: Settings, mesh: Mesh):
    self.settings, self.mesh = settings, mesh
    unused = parameters.without_path(settings.model)
    self.optimizer = optimizers.make(
      settings.optimizer, model=settings.model, unused=unused, axis=AXIS, axis_size=mesh.size
    )
    self._params = {
      name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in parameters.shapes(settings.model).items()
    }

    def specs(part):
      """Muon's momentum is sharded along its stacks; all else lies everywhere."""
      return jax.tree.map(lambda _: P(AXIS) if isinstance(part, MuonState) else P(), part)

    opt_state = jax.eval_shape(self.optimizer.init, self._params)
    by_stack = jax.tree.map(specs, opt_state, is_leaf=lambda x: isinstance(x, MuonState))
    self.specs = TrainState(specs(self._params), by_stack, specs(self._params))
    self.shardings = shardings(mesh, self.specs)

  @functools.cached_property
  def abstract(self) -> TrainState:
    """The state's shapes, types and shardings."""
    shapes = jax.eval_shape(self._init, self._params)
    with_sharding = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(with_sharding, shapes, self.shardings)

  @functools.cached_property
  def abstract_inputs(self) -> StepInputs:
    """The shapes, types and shardings of a step's other arguments."""
    t = self.settings.train
    by_row, everywhere = shardings(self.mesh, P(AXIS)), replicated(self.mesh)
    tokens = jax.ShapeDtypeStruct((t.micro_batches, t.batch_tokens // t.micro_batches + 1), np.uint16, sharding=by_row)
    number = jax.ShapeDtypeStruct((), np.float32, sharding=everywhere)
    hyper = Hyper(*[number] * len(Hyper._fields))
    return StepInputs(tokens, number, number, hyper, number, number)

  def init(self, params: Params) -> TrainState:
    """Returns the state before the first step; the moving average starts at the parameters."""
    return self.shared._init(jax.device_put(params, replicated(self.mesh)))

  def inputs(self, tokens_BxT1: np.ndarray, lr_scale: float, momentum: float) -> StepInputs:
    """Places a step's rows on their devices; every process holds all rows and places those of its devices."""
    rows = place(self.mesh, tokens_BxT1, P(AXIS))
    return StepInputs(rows, np.float32(lr_scale), np.float32(momentum), *self._numbers)

  @functools.cached_property
  def _numbers(self) -> tuple[Hyper, jax.Array, jax.Array]:
    """The arguments that are the same at every step, on the devices."""
    decay = self.settings.train.ema_decay
    numbers = Hyper.of(self.settings.optimizer), np.float32(decay), np.float32(1 - decay)
    return jax.tree.map(lambda x: place(self.mesh, np.asarray(x), P()), numbers)

  def trace(self, seq_len: int, looping: bool) -> jax.stages.Traced:
    """Traces step(state, inputs) → (state, metrics) from shapes alone; the state is donated."""
    mean_loss = functools.partial(self._mean_loss, seq_len=seq_len, looping=looping)
    metrics = P(AXIS) if self._clips_by_rank else P()
    sharded = jax.shard_map(
      functools.partial(self._step, mean_loss),
      mesh=self.mesh,
      in_specs=(self.specs, jax.tree.map(lambda x: P(AXIS) if x.ndim else P(), self.abstract_inputs)),
      out_specs=(self.specs, StepMetrics(metrics, metrics)),
      check_vma=False,
    )
    # Every process reports the whole step, so the few metrics go to all.
    everywhere = replicated(self.mesh)
    layout = self.shardings, StepMetrics(everywhere, everywhere)
    step = jax.jit(sharded, donate_argnums=0, out_shardings=layout)
    return step.trace(self.abstract, self.abstract_inputs)

  def lower(self, seq_len: int, looping: bool) -> jax.stages.Lowered:
    """Lowers what `trace` traces; `.compile(options_of_a_step(platform))` gives the program."""
    return self.trace(seq_len, looping).lower()

  def compiled(self, seq_len: int, looping: bool) -> jax.stages.Compiled:
    """Returns the program, which is compiled once for all runs that share it."""
    programs, shape = self.shared._programs, (seq_len, looping)
    if shape not in programs:
      options = options_of_a_step(self.mesh.devices.flat[0].platform)
      programs[shape] = self.shared.lower(*shape).compile(options)
    return programs[shape]

  @property
  def shared(self) -> "TrainStep":
    """The step of all runs of this process whose settings have one `structure`; it keeps what is compiled."""
    with _sharing:  # programs are compiled by several threads at once
      return _shared(structure(self.settings), self.mesh)

  @functools.cached_property
  def _programs(self) -> dict[tuple[int, bool], jax.stages.Compiled]:
    return {}

  @property
  def _world(self) -> int:
    return world_size(self.settings, self.mesh)

  @property
  def _clips_by_rank(self) -> bool:
    return self.settings.optimizer.clip_scope == "rank" and (self._world > 1 or self.mesh.size == 1)

  @functools.cached_property
  def _init(self):
    def init(params):
      return TrainState(params, self.optimizer.init(params), jax.tree.map(jnp.copy, params))

    return jax.jit(jax.shard_map(init, mesh=self.mesh, in_specs=(P(),), out_specs=self.specs, check_vma=False))

  def _mean_loss(
    self, params: Params, tokens_T1: Integer[Array, "T1"], *, seq_len: int, looping: bool
  ) -> Float[Array, ""]:
    model, dtype = bind(self.settings.model, params), jnp.dtype(self.settings.train.compute_dtype)
    row = tokens_T1[None].astype(jnp.int32)
    return packed_nll(model, row, seq_len=seq_len, looping=looping, dtype=dtype).mean()

  def _step(self, mean_loss: Loss, state: TrainState, inputs: StepInputs) -> tuple[TrainState, StepMetrics]:
    """Runs on each device with its rows."""
    limit = inputs.hyper.grad_clip_norm
    if self._clips_by_rank:
      tokens = inputs.tokens_BxT1
      tokens_GxMxT1 = tokens.reshape(max(1, self._world // self.mesh.size), -1, tokens.shape[-1])
      grads, metrics = _mean_of_clipped_ranks(mean_loss, state.params, tokens_GxMxT1, limit)
      travels = jnp.dtype(self.settings.optimizer.muon_dtype)
      grads = {name: g.astype(travels) if optimizers.group(name) == "bank" else g for name, g in grads.items()}
      grads = optimizers.scatter_stacks(grads, AXIS, self.mesh.size)
    else:
      loss, grads = _mean_of_rows(mean_loss, state.params, inputs.tokens_BxT1)
      grads = optimizers.scatter_stacks(grads, AXIS, self.mesh.size)
      norm = optimizers.scattered_norm(grads, AXIS)
      grads = optimizers.clip(grads, norm, limit)
      metrics = StepMetrics(jax.lax.pmean(loss, AXIS)[None], norm[None])
    return self.update(state, grads, inputs), metrics

  def update(self, state: TrainState, grads: Params, inputs: StepInputs) -> TrainState:
    """Returns the state after the optimizer; runs on each device with its slices of the banks' mean gradients."""
    numbers = {name: getattr(inputs, name) for name in ("lr_scale", "momentum", "hyper")}
    updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params, **numbers)
    params = optax.apply_updates(state.params, updates)
    follow = lambda p, a: inputs.ema_rest * p + inputs.ema_decay * a  # noqa: E731
    average = jax.tree.map(follow, params, state.average)
    return TrainState(params, opt_state, average)


def trained(params: Params, average: Params, share: float) -> Params:
  """Returns what training gives: the average, or a mixture with the last parameters in which it has this share."""
  if share == 1:
    return average
  return _mixed(params, average, np.float32(share), np.float32(1 - share))


@jax.jit
def _mixed(params: Params, average: Params, share: jax.Array, rest: jax.Array) -> Params:
  return jax.tree.map(lambda p, a: share * a + rest * p, params, average)


def structure(settings: Settings) -> Settings:
  """Returns the settings that a step's program is made from, all others at their defaults.

  The others are numbers that the program takes as arguments, or nothing that it reads: learning rates, weight decays,
  schedules, first values, the seed, all that comes after training.
  """

  def kept(section, names):
    return dataclasses.replace(type(section)(), **{name: getattr(section, name) for name in names})

  forms = ["steps", "row_normalize", "column_normalize", "heads", "heads_of", "dtype"]
  first_values = {"qk_gain_init", "tied_embed_init_std", "sparse_attn_gate_init_std"}
  return Settings(
    model=kept(settings.model, [f.name for f in dataclasses.fields(ModelConfig) if f.name not in first_values]),
    optimizer=kept(settings.optimizer, [*(f"muon_{form}" for form in forms), "clip_scope"]),
    train=kept(settings.train, ["batch_tokens", "micro_batches", "world_size", "compute_dtype"]),
  )


_sharing = threading.Lock()


@functools.lru_cache(maxsize=4)
def _shared(settings: Settings, mesh: Mesh) -> TrainStep:
  return TrainStep(settings, mesh)


def forget_programs() -> None:
  """Drops what runs of this process share, after something outside the settings that compiling depends on changed."""
  _shared.cache_clear()


def _mean_of_rows(mean_loss: Loss, params: Params, tokens_MxT1: Integer[Array, "M T1"]) -> tuple[jax.Array, Params]:
  """Returns the mean loss and gradient of rows that are computed one after another."""
  rows = tokens_MxT1.shape[0]
  loss_and_grad = jax.value_and_grad(mean_loss)
  if rows == 1:
    return loss_and_grad(params, tokens_MxT1[0])

  def add(total, row):
    return jax.tree.map(lambda t, x: t + x / rows, total, loss_and_grad(params, row)), None

  zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
  return jax.lax.scan(add, zeros, tokens_MxT1)[0]


def _mean_of_clipped_ranks(
  mean_loss: Loss, params: Params, tokens_GxMxT1: Integer[Array, "G M T1"], limit: jax.Array
) -> tuple[Params, StepMetrics]:
  """Returns the mean of the ranks' clipped gradients, and each rank's loss and norm."""
  ranks = tokens_GxMxT1.shape[0]

  def clipped(tokens_MxT1):
    loss, grads = _mean_of_rows(mean_loss, params, tokens_MxT1)
    norm = optax.tree.norm(grads)
    return optimizers.clip(grads, norm, limit), StepMetrics(loss, norm)

  if ranks == 1:
    grads, metrics = clipped(tokens_GxMxT1[0])
    return grads, StepMetrics(*(x[None] for x in metrics))

  def add(total, tokens_MxT1):
    grads, metrics = clipped(tokens_MxT1)
    return jax.tree.map(lambda t, g: t + g / ranks, total, grads), metrics

  return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), tokens_GxMxT1)


def chosen(settings: Settings) -> dict[str, str]:
  """Returns, by operation, "backend (reason)" for a micro-batch of the settings' size and type.

  Shapes are those of one micro-batch in one row. The cross-entropy's are those of a block of its linear form.
  """
  m, t = settings.model, settings.train
  N = t.batch_tokens // t.micro_batches

  def array(*shape: int, dtype: str = t.compute_dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

  q, k, start = (
    array(1, N, m.num_heads, m.head_dim),
    array(1, N, m.num_kv_heads, m.head_dim),
    array(1, N, dtype="int32"),
  )
  x, up, down = array(N, m.model_dim), array(m.mlp_dim, m.model_dim), array(m.model_dim, m.mlp_dim)
  block = xent.block_size(N, m.vocab_size)
  z, target = array(block, m.vocab_size), array(block, dtype="int32")
  caps = {"cap_pos": m.logit_softcap, "cap_neg": m.logit_softcap}
  bank = array(2 * m.num_layers, m.model_dim, m.model_dim, dtype=settings.optimizer.muon_dtype)
  choices = {
    "segment attention": attention.OPERATION.choose(q, k, k, start, max_segment=t.seq_len),
    "LeakyReLU² MLP": mlp.OPERATION.choose(x, up, down, slope=m.leaky_relu_sq_slope),
    "softcapped cross-entropy": xent.OPERATION.choose(z, target, None, **caps),
    "polar express": polar.OPERATION.choose(bank, steps=settings.optimizer.muon_steps),
  }
  return {operation: f"{choice.name} ({choice.reason})" for operation, choice in choices.items()}
