"""The compiled heart of test-time training: a scan over chunks, on every device over its own documents.

Adapters and moments are the carry, donated; nothing goes to the host inside a scan, and nothing between devices.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pgolf_jax.model.adapters import Adapter, Adapters, widths
from pgolf_jax.model.params import Params
from pgolf_jax.runtime import distributed
from pgolf_jax.runtime.mesh import AXIS, place
from pgolf_jax.scoring import adapt, cached, window
from pgolf_jax.scoring.adapt import Carry, Rule, row_axis
from pgolf_jax.scoring.cached import Memory
from pgolf_jax.scoring.chunks import STEPS_PER_CALL, Shape
from pgolf_jax.scoring.window import Rows, Scored
from pgolf_jax.settings.config import ModelConfig, TTTConfig


class Spec(NamedTuple):
  """What is fixed when a scan is compiled, besides its shape."""

  model: ModelConfig
  ttt: TTTConfig
  rule: Rule
  boost: float  # β of the tilt, nats
  dtype: np.dtype
  distributions: bool


def scan_chunks(
  params: Params,
  stream_N: jax.Array,
  carry: Carry,
  memory: Memory | None,
  rows: Rows,
  size: jax.Array,
  k_S: jax.Array,
  kind_S: jax.Array,
  hint_SxBxX: jax.Array,
  *,
  spec: Spec,
  shape: Shape,
) -> tuple[Carry, Memory | None, Scored]:
  """Chunks k_S of one device's documents.

  Args:
    memory: keys and values of earlier chunks in cached evaluation; None where windows are computed afresh.
    rows: documents from longer to shorter; those after the first `shape.slots` are finished.
    size: targets of a chunk, at most `shape.width`.
    kind_S: SKIP, SCORE or LEARN.
    hint_SxBxX: token that each target's distribution is tilted towards; −1 where the gate is shut.
  """
  rows = jax.tree.map(lambda x: x[: shape.slots], rows)

  def head(axis, x):
    return lax.slice_in_dim(x, 0, shape.slots, axis=axis)

  def losses(adapters: Adapters, memory, k, hint):
    chunk = window.locate(stream_N, rows, k, size, seq_len=spec.ttt.seq_len, width=shape.width)
    common = (adapters, spec.rule.scale)
    if memory is None:
      tokens = window.window_tokens(stream_N, rows, chunk, shape.window)
      hidden, kept = window.forward(spec.model, params, tokens, *common, spec.dtype), None
    else:
      lengths = {"width": shape.width, "window": shape.window}
      hidden, kept = cached.forward(spec.model, params, memory, stream_N, rows, k, size, *common, spec.dtype, **lengths)
      chunk = chunk._replace(position=jnp.broadcast_to(jnp.arange(shape.width), chunk.position.shape))
    scored = window.score(
      spec.model, params, hidden, *common, chunk, hint, spec.boost, distributions=spec.distributions
    )
    return window.learning_loss(scored, rows, k, size), (scored, kept)

  def keep(memory, kept, k):
    return None if memory is None else cached.write(memory, kept, k, size)

  def skip(carry, memory, k, hint):
    empty = jax.eval_shape(losses, carry.adapters, memory, k, hint)[1][0]
    return carry, memory, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty)

  def score(carry, memory, k, hint):
    scored, kept = losses(carry.adapters, memory, k, hint)[1]
    return carry, keep(memory, kept, k), scored

  def learn(carry, memory, k, hint):
    # The scores come out of the pass whose gradient makes the first update: no target is scored after it.
    grads, (scored, kept) = jax.grad(losses, has_aux=True)(carry.adapters, memory, k, hint)
    carry = adapt.update(spec.rule, carry, grads)
    if spec.ttt.lora.grad_steps > 1:

      def again(_, carry):
        return adapt.update(spec.rule, carry, jax.grad(losses, has_aux=True)(carry.adapters, memory, k, hint)[0])

      carry = lax.fori_loop(1, spec.ttt.lora.grad_steps, again, carry)
    return carry, keep(memory, kept, k), scored

  def step(state, x):
    k, kind, hint = x
    *state, scored = lax.switch(kind, (skip, score, learn), *state, k, hint)
    return tuple(state), scored

  def put_back(axis, whole, part):
    return lax.dynamic_update_slice_in_dim(whole, part, 0, axis)

  active = Carry(*(adapt.map_rows(head, x) for x in carry[:3]), carry.step)
  recent = jax.tree.map(lambda x: head(1, x), memory)
  (active, recent), scored = lax.scan(step, (active, recent), (k_S, kind_S, hint_SxBxX))
  both = zip(carry[:3], active[:3], strict=True)
  carry = Carry(*(adapt.map_rows(put_back, whole, part) for whole, part in both), active.step)
  return carry, jax.tree.map(lambda whole, part: put_back(1, whole, part), memory, recent), scored


def sharded_scan(mesh: Mesh, spec: Spec, shape: Shape):
  """`scan_chunks` over a mesh: rows of all devices one device after another, parameters and stream everywhere."""
  carry = carry_specs(spec)
  memory = Memory(P(None, AXIS), P(None, AXIS)) if spec.ttt.method == "cached" else None
  scored = Scored(P(None, AXIS), P(None, AXIS), P(None, AXIS) if spec.distributions else None)
  on_devices = jax.shard_map(
    functools.partial(scan_chunks, spec=spec, shape=shape),
    mesh=mesh,
    in_specs=(P(), P(), carry, memory, P(AXIS), P(), P(), P(), P(None, AXIS)),
    out_specs=(carry, memory, scored),
    check_vma=False,  # a switch whose branches differ in what varies over devices cannot be checked
  )
  return jax.jit(on_devices, donate_argnums=(2, 3), out_shardings=(None, None, distributed.for_all_hosts(mesh)))


def adapter_specs(spec: Spec) -> dict[str, Adapter]:
  """Adapters are shared out by row."""

  def of(kind):
    return P(AXIS) if row_axis(kind) == 0 else P(None, AXIS)

  return {kind: Adapter(of(kind), of(kind)) for kind in widths(spec.model, spec.ttt)}


def carry_specs(spec: Spec) -> Carry:
  """How a carry is shared out."""
  each = adapter_specs(spec)
  return Carry(each, each if spec.rule.beta1 else None, each if spec.rule.kind == "adam" else None, P())


def call_arguments(mesh: Mesh, size: int, ks: list[int], kinds: list[int], hint_SxBxX: np.ndarray) -> tuple:
  """The last arguments of a scan, padded to `STEPS_PER_CALL` skipped steps."""
  pad = STEPS_PER_CALL - len(ks)
  return (
    place(mesh, np.int32(size)[...], P()),
    place(mesh, np.array(ks + [0] * pad, np.int32), P()),
    place(mesh, np.array(kinds + [0] * pad, np.int32), P()),
    place(mesh, np.pad(hint_SxBxX.astype(np.int32), ((0, pad), (0, 0), (0, 0)), constant_values=-1), P(None, AXIS)),
  )
