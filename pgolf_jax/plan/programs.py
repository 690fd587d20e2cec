"""The programs of a run, traced from shapes alone: the train step, the scan of test-time training, its global phase."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pgolf_jax.model import params as parameters
from pgolf_jax.model.params import SOFTCAPS, Params
from pgolf_jax.plan import work
from pgolf_jax.runtime.mesh import AXIS, world_size
from pgolf_jax.scoring import adapt, global_phase
from pgolf_jax.scoring.cached import Memory, memory_shape
from pgolf_jax.scoring.chunks import STEPS_PER_CALL, Shape
from pgolf_jax.scoring.flops import Costs
from pgolf_jax.scoring.scan import Spec, carry_specs, sharded_scan
from pgolf_jax.scoring.window import Rows
from pgolf_jax.settings.config import Settings
from pgolf_jax.training.schedule import Schedule
from pgolf_jax.training.step import argument_shapes, make_step

VALIDATION_TOKENS = 47_853_344
"""Tokens of the official validation split, which lies on every device during an evaluation."""

_EVERYWHERE = P()


@dataclasses.dataclass(frozen=True)
class Program:
  """One program of a run.

  Attributes:
    title: what it is.
    trace: traces it, from shapes alone.
    flops: of its matrix products on one device, by formula (work.py).
  """

  title: str
  trace: Callable[[], jax.stages.Traced]
  flops: float


def programs(settings: Settings, mesh, *, every_shape: bool) -> list[Program]:
  """What a run of these settings would compile for this mesh.

  Args:
    mesh: real, described or abstract, with the axis `data`.
    every_shape: the train step of every sequence length and looping mode, not only the last, which is the largest.
  """
  shapes = Schedule(
    settings.train, settings.optimizer, settings.model.num_loops, settings.quantize.reserve_seconds
  ).shapes()
  found = [_train_step(settings, mesh, *shape) for shape in (shapes if every_shape else shapes[-1:])]
  if settings.ttt.enabled:
    found.append(_ttt_scan(settings, mesh))
    if settings.ttt.phase.prefix_docs > 0:
      found.append(_global_phase(settings, mesh))
  return found


def _params(settings: Settings, sharding=None, dtype=jnp.float32) -> Params:
  """Shapes of the parameters; the softcaps are float32 in any case."""
  return {
    name: jax.ShapeDtypeStruct(shape, jnp.float32 if name in SOFTCAPS else dtype, sharding=sharding)
    for name, shape in parameters.shapes(settings.model).items()
  }


def _train_step(settings: Settings, mesh, seq_len: int, looping: bool) -> Program:
  def trace():
    params = _params(settings)
    step = make_step(settings, mesh, params, seq_len=seq_len, looping=looping)
    return step.trace(*argument_shapes(settings, mesh, params))

  title = f"train step, segments up to {seq_len}, looping {'on' if looping else 'off'}"
  return Program(title, trace, work.train_step(settings, mesh.size, seq_len, looping))


def _ttt_scan(settings: Settings, mesh) -> Program:
  """The scan whose window is full and in which no document has ended: the largest of an evaluation."""
  ttt = settings.ttt
  shape = Shape(-(-ttt.batch_size // mesh.size), ttt.seq_len, ttt.chunk_size)
  dtype = jnp.dtype(settings.train.compute_dtype)
  spec = Spec(
    model=settings.model,
    ttt=ttt,
    rule=adapt.rule(ttt),
    boost=settings.hints.boost,
    dtype=np.dtype(dtype),
    distributions=False,
  )
  rows = shape.slots * mesh.size

  def of(shape, dtype, spec=_EVERYWHERE):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

  def first_carry(key, ids):
    return adapt.begin(spec.rule, adapt.fresh(spec.model, ttt, spec.rule.rank, key, ids))

  def trace():
    carry = jax.eval_shape(first_carry, jax.random.key(0), jax.ShapeDtypeStruct((rows,), jnp.int32))
    carry = jax.tree.map(lambda x, s: of(x.shape, x.dtype, s), carry, carry_specs(spec))
    memory = None
    if ttt.method == "cached":
      one = of(memory_shape(settings.model, rows, ttt.seq_len), dtype, P(None, AXIS))
      memory = Memory(one, one)
    by_row = functools.partial(of, spec=P(AXIS))
    return sharded_scan(mesh, spec, shape).trace(
      _params(settings, NamedSharding(mesh, P()), dtype),
      of((VALIDATION_TOKENS + ttt.seq_len + ttt.chunk_size,), jnp.int32),
      carry,
      memory,
      Rows(by_row((rows,), jnp.int32), by_row((rows,), jnp.int32), by_row((rows,), jnp.bool_)),
      of((), jnp.int32),
      of((STEPS_PER_CALL,), jnp.int32),
      of((STEPS_PER_CALL,), jnp.int32),
      of((STEPS_PER_CALL, rows, shape.width), jnp.int32, P(None, AXIS)),
    )

  title = (
    f"TTT, {STEPS_PER_CALL} chunks of {shape.width} with windows of {shape.window}, {shape.slots} documents a device"
  )
  flops = STEPS_PER_CALL * Costs.of(settings.model, ttt).step(*shape, learn=True)
  return Program(title, trace, flops)


def _global_phase(settings: Settings, mesh) -> Program:
  world = world_size(settings, mesh)
  seq_len = settings.eval.seq_len
  length = global_phase.row_tokens(settings.ttt, seq_len, world)

  def trace():
    dtype = jnp.dtype(settings.train.compute_dtype)
    update, by_row = global_phase.make_update(
      mesh, settings.model, settings.ttt, seq_len=seq_len, world=world, dtype=dtype
    )
    everywhere = NamedSharding(mesh, P())
    params = _params(settings, everywhere)
    tokens = jax.ShapeDtypeStruct((world, length + 1), jnp.int32, sharding=NamedSharding(mesh, by_row))
    targets = jax.ShapeDtypeStruct((world,), jnp.int32, sharding=NamedSharding(mesh, by_row))
    return update.trace(params, params, tokens, targets, jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere))

  rows = world // mesh.size if world % mesh.size == 0 else world
  flops = 3 * work.forward(settings.model, rows * length, seq_len, looping=True)
  return Program(f"TTT, global phase, {world} rows of {length} tokens", trace, flops)
