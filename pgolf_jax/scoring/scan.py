"""The compiled heart of test-time training: a scan over chunks, on every device over its own documents.

Each chunk is scored by a forward pass, and learnt from by the gradient of the same pass where the scan is one that
learns. Adapters, moments and the context's memory are the state, donated; nothing goes to the host inside a scan, and
nothing between devices.

Letters: S positions of a scan; the rest as in context.py.
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
from pgolf_jax.scoring.buckets import SCORE, Call, Shape, steps_per_call
from pgolf_jax.scoring.context import Chunk, ChunkContext, Rows, choose_context
from pgolf_jax.scoring.hints import tilt
from pgolf_jax.settings import ModelConfig, Settings, TTTConfig


class Spec(NamedTuple):
  """What is fixed when a scan is compiled, besides its shape."""

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
    # Strengths that are learnt are known to the host alone, which tilts.
    boost = settings.hints.boost if settings.hints.strength == "fixed" else 0.0
    return cls(settings.model, settings.ttt, rule, context, boost, dtype, distributions)


class ScanState(NamedTuple):
  """What goes from chunk to chunk; rows of all devices, one device after another."""

  learner: Learner
  memory: Any  # of the context


class ScanInputs(NamedTuple):
  """What a scan reads. Parameters and stream are placed once, rows and size for each round, the rest for each call."""

  params: Params  # in the type of the computation, on every device
  stream_N: jax.Array  # int32, on every device
  rows: Rows | None = None  # documents from longer to shorter; those after the shape's slots are finished
  size: jax.Array | None = None  # targets of a chunk, at most the shape's width
  k_S: jax.Array | None = None  # the chunks' numbers; −1 where a step is skipped
  hint_SxBxX: jax.Array | None = None  # token that a distribution is tilted towards; −1 where the gate is shut
  sample_SxB: jax.Array | None = None  # place in the chunk whose whole distribution is returned, where asked for


class Scored(NamedTuple):
  """What the forward passes of a scan say of their targets."""

  model_nll: jax.Array  # [S, B, X] of the target, before the tilt; 0 beyond the chunk's end
  hint_nll: jax.Array  # [S, B, X] of the hint, before the tilt; means nothing where the gate is shut
  nll: jax.Array  # [S, B, X] of the target, after the tilt
  logp: jax.Array | None  # [S, B, V] of every token at the sampled place, after the tilt, where asked for


def scan_chunks(state: ScanState, inputs: ScanInputs, *, spec: Spec, shape: Shape) -> tuple[ScanState, Scored]:
  """Scores chunks k_S of one device's documents and, in a shape that learns, learns from them."""
  rows = jax.tree.map(lambda x: x[: shape.slots], inputs.rows)

  def chunk_at(k) -> Chunk:
    return Chunk(inputs.stream_N, rows, k, inputs.size)

  def losses(adapters: Adapters, memory, k, hint_BxX, sample_B):
    chunk, adaptation = chunk_at(k), Adaptation(adapters, spec.rule.scale)
    hidden_BxXxD, fresh = spec.context.hidden(inputs.params, adaptation, memory, chunk, shape)
    logits_BxXxV = bind(spec.model, inputs.params).logits(hidden_BxXxD, adaptation)
    scored = score(spec, inputs.params, logits_BxXxV, chunk, hint_BxX, sample_B)
    mean_nll_B = scored.model_nll.sum(axis=1) / inputs.size
    return jnp.sum(jnp.where(chunk.teaches_B, mean_nll_B, 0)), (scored, fresh)

  def score_only(state: ScanState, k, *places):
    _, (scored, fresh) = losses(state.learner.adapters, state.memory, k, *places)
    return state._replace(memory=spec.context.remember(state.memory, fresh, chunk_at(k))), scored

  def learn(state: ScanState, k, *places):
    # The scores come out of the pass whose gradient makes the first update: no target is scored after it.
    gradient = jax.grad(losses, has_aux=True)
    grads, (scored, fresh) = gradient(state.learner.adapters, state.memory, k, *places)
    learner = adapting.update(spec.rule, state.learner, grads)
    if spec.ttt.lora.grad_steps > 1:

      def again(_, learner):
        return adapting.update(spec.rule, learner, gradient(learner.adapters, state.memory, k, *places)[0])

      learner = lax.fori_loop(1, spec.ttt.lora.grad_steps, again, learner)
    # A batch beside which longer ones learn on has learnt its last.
    adapters = adapting.select(chunk_at(k).moves_B, learner.adapters, state.learner.adapters)
    memory = spec.context.remember(state.memory, fresh, chunk_at(k))
    return ScanState(learner._replace(adapters=adapters), memory), scored

  def skip(state: ScanState, k, *places):
    empty = jax.eval_shape(losses, state.learner.adapters, state.memory, k, *places)[1][0]
    return state, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty)

  run = score_only if shape.kind == SCORE else learn

  def step(state: ScanState, x):
    if len(inputs.k_S) == 1:
      return run(state, *x)
    return lax.cond(x[0] >= 0, run, skip, state, *x)

  active = map_rows(lambda axis, x: lax.slice_in_dim(x, 0, shape.slots, axis=axis), state.learner)
  places = (inputs.k_S, inputs.hint_SxBxX, inputs.sample_SxB)
  (active, memory), scored = lax.scan(step, ScanState(active, state.memory), places)
  learner = map_rows(lambda axis, x, part: lax.dynamic_update_slice_in_dim(x, part, 0, axis), state.learner, active)
  return ScanState(learner, memory), scored


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


def sharded_scan(mesh: Mesh, spec: Spec, shape: Shape):
  """Returns `scan_chunks` over a mesh, jitted: (state, inputs) → (state, scores). The state is donated."""
  state = row_specs(state_shapes(spec, rows=mesh.size))
  by_row = P(None, AXIS)
  scored = Scored(by_row, by_row, by_row, by_row if spec.distributions else None)
  inputs = _INPUT_SPECS._replace(sample_SxB=by_row if spec.distributions else None)
  on_devices = jax.shard_map(
    functools.partial(scan_chunks, spec=spec, shape=shape),
    mesh=mesh,
    in_specs=(state, inputs),
    out_specs=(state, scored),
    check_vma=False,  # branches that differ in what varies over devices cannot be checked
  )
  return jax.jit(on_devices, donate_argnums=0, out_shardings=(None, distributed.for_all_hosts(mesh)))


_INPUT_SPECS = ScanInputs(params=P(), stream_N=P(), rows=P(AXIS), size=P(), k_S=P(), hint_SxBxX=P(None, AXIS))


def state_shapes(spec: Spec, rows: int) -> ScanState:
  """Returns the shapes of a state with this many rows on all devices."""

  def first(key, ids):
    drawn = adapting.draw(spec.model, spec.ttt, spec.rule.rank, key, ids, ids)
    return adapting.begin(spec.rule, adapting.with_zero_B(spec.model, spec.ttt, drawn))

  learner = jax.eval_shape(first, jax.random.key(0), jax.ShapeDtypeStruct((rows,), jnp.int32))
  return ScanState(learner, spec.context.memory_shapes(rows))


def abstract(mesh: Mesh, spec: Spec, shape: Shape, slots: int, stream_length: int) -> tuple[ScanState, ScanInputs]:
  """Returns a scan's arguments as shapes with their shardings: enough to lower it, on a mesh that need not exist.

  Args:
    slots: rows on each device in the state; the shape's slots are at most these.
    stream_length: tokens of the padded stream.
  """

  def struct(dims, dtype, spec):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

  state = state_shapes(spec, slots * mesh.size)
  state = jax.tree.map(lambda x, s: struct(x.shape, x.dtype, s), state, row_specs(state))
  integer, by_row = functools.partial(struct, dtype=jnp.int32, spec=P()), functools.partial(struct, spec=P(AXIS))
  rows, steps = (slots * mesh.size,), steps_per_call(distributed.platform(mesh))
  inputs = ScanInputs(
    params={
      name: struct(dims, jnp.float32 if name in SOFTCAPS else spec.dtype, P())
      for name, dims in parameters.shapes(spec.model).items()
    },
    stream_N=integer((stream_length,)),
    rows=Rows(*(by_row(rows, dtype) for dtype in (jnp.int32, jnp.int32, jnp.bool_, jnp.int32))),
    size=integer(()),
    k_S=integer((steps,)),
    hint_SxBxX=struct((steps, shape.slots * mesh.size, shape.width), jnp.int32, P(None, AXIS)),
  )
  if spec.distributions:
    inputs = inputs._replace(sample_SxB=struct((steps, shape.slots * mesh.size), jnp.int32, P(None, AXIS)))
  return state, inputs


def row_shardings(mesh: Mesh, tree):
  """Returns shardings of a tree of arrays with rows, or of their shapes."""
  return shardings(mesh, row_specs(tree))


def place_call(
  mesh: Mesh, inputs: ScanInputs, call: Call, hint_SxBxX: np.ndarray, sample_SxB: np.ndarray | None = None
) -> ScanInputs:
  """Returns a round's inputs with those of one call on the mesh, padded with skipped steps.

  Args:
    inputs: parameters, stream, rows and size; what else it holds is replaced.
    hint_SxBxX, sample_SxB: of the call's steps; places to sample where the scan returns distributions.
  """
  padding = steps_per_call(distributed.platform(mesh)) - len(call.steps)
  k_S = np.pad(np.array([step.k for step in call.steps], np.int32), (0, padding), constant_values=-1)
  hints = np.pad(hint_SxBxX.astype(np.int32), ((0, padding), (0, 0), (0, 0)), constant_values=-1)
  if sample_SxB is not None:
    samples = np.pad(sample_SxB.astype(np.int32), ((0, padding), (0, 0)))
    inputs = inputs._replace(sample_SxB=place(mesh, samples, P(None, AXIS)))
  return inputs._replace(k_S=place(mesh, k_S, P()), hint_SxBxX=place(mesh, hints, P(None, AXIS)))
