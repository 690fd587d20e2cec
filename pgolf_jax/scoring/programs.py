"""Everything that an evaluation runs on the devices, compiled before its clock starts."""

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pgolf_jax.model.adapters import Adapters
from pgolf_jax.model.params import SOFTCAPS, Params
from pgolf_jax.runtime import distributed
from pgolf_jax.runtime.mesh import AXIS, place
from pgolf_jax.scoring import adapt, global_phase
from pgolf_jax.scoring.adapt import Carry
from pgolf_jax.scoring.cached import Memory, memory_shape
from pgolf_jax.scoring.chunks import LEARN, SCORE, STEPS_PER_CALL, Shape
from pgolf_jax.scoring.scan import Spec, adapter_specs, call_arguments, carry_specs, sharded_scan
from pgolf_jax.scoring.window import Rows
from pgolf_jax.settings.config import Settings

Draw = Callable[[int, int, np.ndarray], Adapters]
"""(number of the set, rank, id of each row) → adapters with these A, B zero; rows with id −1 have no document."""


class AdapterPrograms:
  """What happens to adapters of one rule between scans.

  Attributes:
    draw: (key, id of each row) → new adapters.
    without_B: adapters → the same with B zero; theirs are given up.
    begin: adapters → the carry of a batch that starts with them; they are given up.
    settle: (carry, steps that each row took, steps of the batch) → adapters after the batch.
  """

  def __init__(self, spec: Spec, mesh: Mesh):
    self.spec, self._mesh = spec, mesh
    self._specs = adapter_specs(spec)
    adapters, carry = self._shardings(self._specs), self._shardings(carry_specs(spec))
    rule = spec.rule
    self.draw = jax.jit(functools.partial(adapt.fresh, spec.model, spec.ttt, rule.rank), out_shardings=adapters)
    self.without_B = jax.jit(adapt.without_B, out_shardings=adapters, donate_argnums=0)
    self.begin = jax.jit(functools.partial(adapt.begin, rule), out_shardings=carry, donate_argnums=0)
    self.settle = jax.jit(functools.partial(adapt.settle, rule), out_shardings=adapters)
    everywhere = distributed.for_all_hosts(mesh)
    self._gather = jax.jit(lambda adapters: adapters, out_shardings=everywhere) if everywhere else lambda x: x

  def _shardings(self, tree):
    return jax.tree.map(lambda s: NamedSharding(self._mesh, s), tree, is_leaf=lambda x: isinstance(x, P))

  def place(self, adapters: Adapters) -> Adapters:
    """Host arrays on the mesh."""
    return jax.tree.map(lambda x, s: place(self._mesh, np.asarray(x), s), adapters, self._specs)

  def fetch(self, adapters: Adapters) -> Adapters:
    """All of them on every process's host."""
    return jax.tree.map(np.asarray, self._gather(adapters))


class Programs:
  """The compiled functions of one evaluation.

  Args:
    slots: rows on each device.
    stream_length: tokens of the padded stream.
    world: ranks of the global phase.
    dtype: of the computation.
    distributions: whether scans give the whole distribution of every target.
  """

  def __init__(
    self,
    settings: Settings,
    mesh: Mesh,
    *,
    slots: int,
    stream_length: int,
    world: int,
    dtype,
    distributions: bool = False,
  ):
    self.settings, self.mesh, self.slots, self.world = settings, mesh, slots, world
    self._stream_length = stream_length
    self._dtype = jnp.dtype(dtype)
    rules = {short: adapt.rule(settings.ttt, short=short) for short in (False, True)}  # by "short documents"
    self.adapters = {
      short: AdapterPrograms(
        Spec(settings.model, settings.ttt, rule, settings.hints.boost, self._dtype, distributions), mesh
      )
      for short, rule in rules.items()
    }
    self._scans: dict[tuple[bool, Shape], Callable] = {}
    self._update, self._update_rows = global_phase.make_update(
      mesh, settings.model, settings.ttt, seq_len=settings.eval.seq_len, world=world, dtype=dtype
    )
    self.computing = jax.jit(
      lambda params: {k: v if k in SOFTCAPS else v.astype(self._dtype) for k, v in params.items()},
      out_shardings=NamedSharding(mesh, P()),
    )
    self.zeros = jax.jit(functools.partial(jax.tree.map, jnp.zeros_like))

  @property
  def rows(self) -> int:
    """Rows of a batch on all devices."""
    return self.slots * self.mesh.size

  def place_rows(self, rows: Rows) -> Rows:
    return Rows(*(place(self.mesh, x, P(AXIS)) for x in rows))

  def scan(
    self, short: bool, shape: Shape, params: Params, stream_N, carry: Carry, memory, rows: Rows, arguments: tuple
  ):
    """Runs up to `STEPS_PER_CALL` chunks; carry and memory are given up. → (carry, memory, scores)."""
    return self._scans[short, shape](params, stream_N, carry, memory, rows, *arguments)

  def new_memory(self) -> Memory | None:
    """Room for the keys and values of a batch, in cached evaluation."""
    ttt = self.settings.ttt
    if ttt.method != "cached":
      return None
    shape = memory_shape(self.settings.model, self.rows, ttt.seq_len)
    zeros = jax.jit(lambda: jnp.zeros(shape, self._dtype), out_shardings=NamedSharding(self.mesh, P(None, AXIS)))
    return Memory(zeros(), zeros())

  def update(self, params: Params, momentum: Params, step: global_phase.PhaseStep):
    """One update of a global phase; parameters and momentum are given up."""
    return self._compiled_update(params, momentum, *global_phase.arguments(self.mesh, self._update_rows, step))

  def compile(self, params: Params, scans: Iterable[tuple[bool, Shape]], *, phases: bool) -> None:
    """Compiles all that an evaluation may run, on random tokens; off the CPU it is run once as well.

    Args:
      params: float32, on the mesh; left as they are.
      scans: (short adapters, shape) of every scan.
      phases: whether there are global phases.
    """
    stream = place(self.mesh, np.random.default_rng(0).integers(2, 64, self._stream_length, dtype=np.int32), P())
    computing = self.computing(params)
    lowered: dict[object, jax.stages.Lowered] = {}
    inputs = {}
    for short, shape in dict.fromkeys(scans):
      inputs[short, shape] = self._random_call(shape)
      spec = self.adapters[short].spec
      lowered[short, shape] = sharded_scan(self.mesh, spec, shape).lower(
        computing, stream, self._first_carry(short), self.new_memory(), *inputs[short, shape]
      )
    if jax.process_count() > 1:  # what they gather and agree on between scans
      distributed.leaders(0.0)
      for short in {short for short, _ in lowered}:
        self.adapters[short].fetch(self._first_carry(short).adapters)
    if phases:
      step = self._random_phase_step()
      arguments = global_phase.arguments(self.mesh, self._update_rows, step)
      lowered["update"] = self._update.lower(params, self.zeros(params), *arguments)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
      compiled = dict(zip(lowered, pool.map(lambda low: low.compile(), lowered.values()), strict=True))
    self._compiled_update = compiled.pop("update", None)
    self._scans = compiled
    if self.mesh.devices.flat[0].platform == "cpu":
      return  # nothing is loaded or tuned at the first run there
    for (short, shape), arguments in inputs.items():
      scan = self._scans[short, shape]
      jax.block_until_ready(scan(computing, stream, self._first_carry(short), self.new_memory(), *arguments))
    if phases:
      copied = jax.tree.map(jnp.copy, params)
      jax.block_until_ready(self.update(copied, self.zeros(params), step))

  def row_integers(self, x_B: np.ndarray) -> jax.Array:
    """An integer for each row, on the mesh."""
    return place(self.mesh, np.asarray(x_B, np.int32), P(AXIS))

  def _first_carry(self, short: bool) -> Carry:
    """A batch's first state, by way of every function on that way, so that all are compiled."""
    of = self.adapters[short]
    none = self.row_integers(np.zeros(self.rows))
    carry = of.begin(of.without_B(of.draw(jax.random.key(0), none)))
    return of.begin(of.without_B(of.settle(carry, none, place(self.mesh, np.int32(0)[...], P()))))

  def _random_call(self, shape: Shape) -> tuple:
    n = self.rows
    window = self.settings.ttt.seq_len
    rows = Rows(np.zeros(n, np.int32), np.full(n, 2 * window, np.int32), np.ones(n, bool))
    hints = np.zeros((STEPS_PER_CALL, shape.slots * self.mesh.size, shape.width), np.int32)
    return self.place_rows(rows), *call_arguments(self.mesh, shape.width, [0, 0], [LEARN, SCORE], hints[:2])

  def _random_phase_step(self) -> global_phase.PhaseStep:
    longest = global_phase.row_tokens(self.settings.ttt, self.settings.eval.seq_len, self.world)
    tokens = np.random.default_rng(0).integers(0, 64, (self.world, longest + 1), dtype=np.int32)
    return global_phase.PhaseStep(tokens, np.full(self.world, longest, np.int32), 0.0)
