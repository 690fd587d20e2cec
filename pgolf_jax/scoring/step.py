"""The compiled heart of test-time training: one chunk of many documents, on every device of its own ones.

The chunk is scored by a forward pass, and learnt from by the gradient of the same pass where the program is one that
learns. Adapters, moments and the context's memory are the state, donated and changed in place; nothing goes from device
to device. Letters: as in context.py.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pgolf_jax.kernels import softcapped_xent as xent
from pgolf_jax.kernels.numerics import softcap
from pgolf_jax.model import params as parameters
from pgolf_jax.model.adapters import Adaptation, Adapters
from pgolf_jax.model.gpt import bind
from pgolf_jax.model.params import SOFTCAPS, Params
from pgolf_jax.runtime import distributed
from pgolf_jax.runtime.distributed import AXIS, place, shardings
from pgolf_jax.scoring import adapters as adapting
from pgolf_jax.scoring.adapters import Learner, Rule, map_rows, row_specs
from pgolf_jax.scoring.buckets import SCORE, Shape
from pgolf_jax.scoring.context import Chunk, ChunkContext, Rows, choose_context
from pgolf_jax.scoring.hints import tilt
from pgolf_jax.settings import ModelConfig, Settings, TTTConfig


class Spec(NamedTuple):
  """What is fixed when a step is compiled, besides its shape."""

  model: ModelConfig
  ttt: TTTConfig
  rule: Rule
  context: ChunkContext
  boost: float  # β of the tilt, nats
  dtype: np.dtype
  distributions: bool  # whether the whole distribution of one target a chunk is returned

  @classmethod
  def choose(cls, settings: Settings, *, short: bool, distributions: bool = False) -> "Spec":
    """Returns the spec for batches of ordinary, or of short, documents."""
    dtype = jnp.dtype(settings.train.compute_dtype)
    rule, context = Rule.choose(settings.ttt, short=short), choose_context(settings, dtype)
    return cls(settings.model, settings.ttt, rule, context, settings.hints.boost, dtype, distributions)


class State(NamedTuple):
  """What goes from chunk to chunk; rows of all devices, one device after another."""

  learner: Learner
  memory: Any  # of the context


class Inputs(NamedTuple):
  """What a step reads. Parameters and stream are placed once, rows and size for each batch, the rest for each step."""

  params: Params  # in the type of the computation, on every device
  stream_N: jax.Array  # int32, on every device
  rows: Rows | None = None  # documents from longer to shorter; those after the shape's slots are finished
  size: jax.Array | None = None  # targets of a chunk, at most the shape's width
  k: jax.Array | None = None  # the chunk's number
  hint_BxX: jax.Array | None = None  # token that a distribution is tilted towards; −1 where the gate is shut
  sample_B: jax.Array | None = None  # place in the chunk whose whole distribution is returned, where asked for


class Scored(NamedTuple):
  """What the forward pass of a step says of its targets."""

  model_nll: jax.Array  # [B, X] of the target, before the tilt; 0 beyond the chunk's end
  hint_nll: jax.Array  # [B, X] of the hint, before the tilt; means nothing where the gate is shut
  nll: jax.Array  # [B, X] of the target, after the tilt
  logp: jax.Array | None  # [B, V] of every token at the sampled place, after the tilt, where asked for


def run_chunk(state: State, inputs: Inputs, *, spec: Spec, shape: Shape) -> tuple[State, Scored]:
  """Scores chunk k of one device's documents and, in a shape that learns, learns from it."""
  rows = Rows(*(x[: shape.slots] for x in inputs.rows))
  chunk = Chunk(inputs.stream_N, rows, inputs.k, inputs.size)

  def losses(adapters: Adapters):
    adaptation = Adaptation(adapters, spec.rule.scale)
    hidden_BxXxD, fresh = spec.context.hidden(inputs.params, adaptation, state.memory, chunk, shape)
    logits_BxXxV = bind(spec.model, inputs.params).logits(hidden_BxXxD, adaptation)
    scored = score(spec, inputs.params, logits_BxXxV, chunk, inputs.hint_BxX, inputs.sample_B)
    mean_nll_B = scored.model_nll.sum(axis=1) / inputs.size
    return jnp.sum(jnp.where(chunk.teaches_B, mean_nll_B, 0)), (scored, fresh)

  before = active = map_rows(lambda axis, x: lax.slice_in_dim(x, 0, shape.slots, axis=axis), state.learner)
  if shape.kind == SCORE:
    _, (scored, fresh) = losses(active.adapters)
    return State(state.learner, spec.context.remember(state.memory, fresh, chunk)), scored

  # The scores come out of the pass whose gradient makes the first update: no target is scored after it.
  gradient = jax.grad(losses, has_aux=True)
  grads, (scored, fresh) = gradient(active.adapters)
  active = adapting.update(spec.rule, active, grads)
  if spec.ttt.lora.grad_steps > 1:

    def again(_, learner):
      return adapting.update(spec.rule, learner, gradient(learner.adapters)[0])

    active = lax.fori_loop(1, spec.ttt.lora.grad_steps, again, active)
  active = active._replace(adapters=adapting.select(chunk.moves_B, active.adapters, before.adapters))
  learner = map_rows(lambda axis, x, part: lax.dynamic_update_slice_in_dim(x, part, 0, axis), state.learner, active)
  return State(learner, spec.context.remember(state.memory, fresh, chunk)), scored


def score(
  spec: Spec,
  params: Params,
  logits_BxXxV: jax.Array,
  chunk: Chunk,
  hint_BxX: jax.Array,
  sample_B: jax.Array | None,
) -> Scored:
  """Returns the losses of a chunk's targets under the evaluation softcaps."""
  B, X, V = logits_BxXxV.shape
  target_BxX = chunk.targets(X)
  caps = dict(zip(("cap_pos", "cap_neg"), bind(spec.model, params).caps(evaluation=True), strict=True))
  gate, hint = hint_BxX >= 0, jnp.maximum(hint_BxX, 0)
  flat = (logits_BxXxV.reshape(-1, V), target_BxX.reshape(-1), hint.reshape(-1))
  nll, hint_logp = (x.reshape(B, X) for x in xent.softcapped_xent_with_hint(*flat, **caps))
  beta = jnp.full_like(nll, spec.boost)
  tilted = tilt(nll, hint_logp, target_BxX, hint, gate, beta)
  logp = None
  if spec.distributions:
    rows = jnp.arange(B)
    untilted_BxV = jax.nn.log_softmax(softcap(logits_BxXxV[rows, sample_B].astype(jnp.float32), **caps), axis=-1)
    at_sample = [x[rows, sample_B][:, None] for x in (hint_logp, hint, gate, beta)]
    every_token = jnp.broadcast_to(jnp.arange(V), untilted_BxV.shape)
    logp = -tilt(-untilted_BxV, at_sample[0], every_token, *at_sample[1:])
  return Scored(jnp.where(chunk.valid(X), nll, 0), -hint_logp, tilted, logp)


def sharded_step(mesh: Mesh, spec: Spec, shape: Shape):
  """Returns `run_chunk` over a mesh, jitted: (state, inputs) → (state, scores). The state is donated."""
  state, by_row = row_specs(state_shapes(spec, rows=mesh.size)), P(AXIS)
  inputs = Inputs(P(), P(), by_row, P(), P(), by_row, by_row if spec.distributions else None)
  on_devices = jax.shard_map(
    functools.partial(run_chunk, spec=spec, shape=shape),
    mesh=mesh,
    in_specs=(state, inputs),
    out_specs=(state, Scored(by_row, by_row, by_row, by_row if spec.distributions else None)),
    check_vma=False,
  )
  return jax.jit(on_devices, donate_argnums=0, out_shardings=(None, distributed.for_all_hosts(mesh)))


def state_shapes(spec: Spec, rows: int) -> State:
  """Returns the shapes of a state with this many rows on all devices."""

  def first(key, ids):
    drawn = adapting.draw(spec.model, spec.ttt, spec.rule.rank, key, ids, ids)
    return adapting.begin(spec.rule, adapting.with_zero_B(spec.model, spec.ttt, drawn))

  learner = jax.eval_shape(first, jax.random.key(0), jax.ShapeDtypeStruct((rows,), jnp.int32))
  return State(learner, spec.context.memory_shapes(rows))


def abstract(mesh: Mesh, spec: Spec, shape: Shape, slots: int, stream_length: int) -> tuple[State, Inputs]:
  """Returns a step's arguments as shapes with their shardings: enough to lower it, on a mesh that need not exist.

  Args:
    slots: rows on each device in the state; the shape's slots are at most these.
    stream_length: tokens of the padded stream.
  """

  def struct(dims, dtype, spec):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

  state = state_shapes(spec, slots * mesh.size)
  state = jax.tree.map(lambda x, s: struct(x.shape, x.dtype, s), state, row_specs(state))
  integer, by_row = functools.partial(struct, dtype=jnp.int32, spec=P()), functools.partial(struct, spec=P(AXIS))
  rows = (slots * mesh.size,)
  inputs = Inputs(
    params={
      name: struct(dims, jnp.float32 if name in SOFTCAPS else spec.dtype, P())
      for name, dims in parameters.shapes(spec.model).items()
    },
    stream_N=integer((stream_length,)),
    rows=Rows(*(by_row(rows, dtype) for dtype in (jnp.int32, jnp.int32, jnp.bool_, jnp.int32))),
    size=integer(()),
    k=integer(()),
    hint_BxX=by_row((shape.slots * mesh.size, shape.width), jnp.int32),
    sample_B=by_row((shape.slots * mesh.size,), jnp.int32) if spec.distributions else None,
  )
  return state, inputs


def row_shardings(mesh: Mesh, tree):
  """Returns shardings of a tree of arrays with rows, or of their shapes."""
  return shardings(mesh, row_specs(tree))


def place_step(mesh: Mesh, inputs: Inputs, k: int, hint_BxX: np.ndarray, sample_B: np.ndarray | None = None) -> Inputs:
  """Returns a batch's inputs with those of its chunk k on the mesh.

  Args:
    inputs: what it holds of another step is replaced.
    sample_B: places to sample where the step returns distributions.
  """
  return inputs._replace(
    k=place(mesh, np.int32(k)[...], P()),
    hint_BxX=place(mesh, hint_BxX.astype(np.int32), P(AXIS)),
    sample_B=None if sample_B is None else place(mesh, sample_B.astype(np.int32), P(AXIS)),
  )
