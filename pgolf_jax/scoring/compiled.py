"""Everything that an evaluation runs on the devices, compiled before its clock starts."""

import copy
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pgolf_jax.model.params import SOFTCAPS, Params
from pgolf_jax.runtime import distributed
from pgolf_jax.runtime.distributed import AXIS, place, replicated
from pgolf_jax.runtime.log import progress
from pgolf_jax.scoring import adapters as adapting
from pgolf_jax.scoring.adapters import Learner
from pgolf_jax.scoring.buckets import Call, Shape, Step
from pgolf_jax.scoring.context import Rows
from pgolf_jax.scoring.documents import Chains
from pgolf_jax.scoring.global_phase import GlobalPhase
from pgolf_jax.scoring.scan import (
  ScanInputs,
  ScanState,
  Scored,
  Spec,
  abstract,
  place_call,
  row_shardings,
  sharded_scan,
  state_shapes,
)
from pgolf_jax.settings import Settings


class Workload(NamedTuple):
  """What an evaluation will run."""

  scans: frozenset[tuple[bool, Shape]]  # (whether for short documents, shape)
  slots: int  # rows on each device
  stream_length: int  # tokens of the padded stream
  has_phases: bool  # whether there are global phases with something to train on


class AdapterPrograms:
  """What happens to the adapters of one rule between batches.

  Attributes:
    draw: (key, set and id of each row) → A by kind.
    select: (mask of rows, A by kind, A by kind) → each row's from the first where the mask is set.
    begin_from_A: A by kind → the learner of a batch that starts with them and B zero; they are donated.
    begin: adapters → the learner of a batch that starts with them; they are donated.
    settle: (learner, steps that each row took, steps of its batch) → adapters after the batch.
  """

  def __init__(self, spec: Spec, mesh: Mesh, width: int):
    self.spec, self._width, self._mesh = spec, width, mesh
    model, ttt, rule = spec.model, spec.ttt, spec.rule
    learner = state_shapes(spec, rows=mesh.size).learner
    adapters = row_shardings(mesh, learner.adapters)
    matrices = {kind: adapter.A for kind, adapter in adapters.items()}
    learner = row_shardings(mesh, learner)

    def begin_from_A(matrices):
      return adapting.begin(rule, adapting.with_zero_B(model, ttt, matrices))

    self.draw = jax.jit(functools.partial(adapting.draw, model, ttt, rule.rank), out_shardings=matrices)
    self.begin_from_A = jax.jit(begin_from_A, out_shardings=learner, donate_argnums=0)
    self.begin = jax.jit(functools.partial(adapting.begin, rule), out_shardings=learner, donate_argnums=0)
    self.select = jax.jit(adapting.select, out_shardings=matrices)
    self.settle = jax.jit(functools.partial(adapting.settle, rule), out_shardings=adapters)
    everywhere = distributed.for_all_hosts(mesh)
    self._gather = jax.jit(lambda tree: tree, out_shardings=everywhere) if everywhere else lambda tree: tree

  def place_rows(self, x_B: np.ndarray) -> jax.Array:
    """Returns an integer for each row on the mesh."""
    return place(self._mesh, np.asarray(x_B, np.int32), P(AXIS))

  def place_mask(self, x_B: np.ndarray) -> jax.Array:
    """Returns a truth value for each row on the mesh."""
    return place(self._mesh, np.asarray(x_B, bool), P(AXIS))

  def place(self, tree):
    """Returns host arrays with rows on the mesh."""
    return jax.tree.map(lambda x, s: place(self._mesh, np.asarray(x), s.spec), tree, row_shardings(self._mesh, tree))

  def fetch(self, tree):
    """Returns the arrays of all devices on every process's host."""
    return jax.tree.map(np.asarray, self._gather(tree))

  def finish(self, learner: Learner, done_B: np.ndarray, total_B: np.ndarray):
    """Returns adapters after a batch of `total_B` steps, of which each row took `done_B`."""
    return self.settle(learner, self.place_rows(done_B), self.place_rows(total_B))

  def warm_up(self, rows: int) -> Learner:
    """Runs, and so compiles, everything that may happen between batches; returns a batch's first state."""
    ids = np.zeros(rows)
    first = self.draw(jax.random.key(0), self.place_rows(ids), self.place_rows(ids))
    if self._width > 1:
      first = self.select(self.place_mask(ids), first, first)
    learner = self.begin_from_A(first)
    adapters = self.finish(learner, ids, ids)
    if jax.process_count() > 1:
      self.fetch({kind: adapter.A for kind, adapter in adapters.items()})
      self.fetch(adapters)
    return self.begin(adapters)


class Programs:
  """Compiled programs of evaluations under one set of settings; those of the same shapes share them.

  Args:
    settings: of the evaluations; `train.compute_dtype` is the type of the computation.
    mesh: has the axis `data`.
    distributions: whether scans return the whole distribution of one target a chunk.
  """

  def __init__(self, settings: Settings, mesh: Mesh, *, distributions: bool = False):
    self.mesh, self.distributions = mesh, distributions
    # By "short documents".
    self._specs = {short: Spec.choose(settings, short=short, distributions=distributions) for short in (False, True)}
    self.phase = GlobalPhase(settings, mesh)
    self.chains = Chains.choose(settings.ttt, self.phase.world, mesh.size)
    self.adapters = {short: AdapterPrograms(spec, mesh, self.chains.width) for short, spec in self._specs.items()}
    self._scans: dict[tuple[bool, Shape, int, int], jax.stages.Compiled] = {}
    dtype = jnp.dtype(settings.train.compute_dtype)
    self.computing = jax.jit(
      lambda params: {name: p if name in SOFTCAPS else p.astype(dtype) for name, p in params.items()},
      out_shardings=replicated(mesh),
    )

  def sampling(self) -> "Programs":
    """Returns programs whose scans return whole distributions; all but the scans are these ones."""
    other = copy.copy(self)
    other.distributions, other._scans = True, {}
    other._specs = {short: spec._replace(distributions=True) for short, spec in self._specs.items()}
    return other

  def scan(self, short: bool, shape: Shape, state: ScanState, inputs: ScanInputs) -> tuple[ScanState, Scored]:
    """Runs a call's chunks; the state is donated."""
    return self._scans[short, shape, len(inputs.rows.start), len(inputs.stream_N)](state, inputs)

  def place_rows(self, rows: Rows) -> Rows:
    """Returns a batch's rows on the mesh."""
    return Rows(*(place(self.mesh, x, P(AXIS)) for x in rows))

  def place_size(self, size: int) -> jax.Array:
    """Returns the targets of a batch's chunks on the mesh."""
    return place(self.mesh, np.int32(size)[...], P())

  def new_memory(self, slots: int):
    """Returns an empty memory for a batch."""
    shapes = state_shapes(self.adapters[False].spec, slots * self.mesh.size).memory
    zeros = jax.jit(
      lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
      out_shardings=row_shardings(self.mesh, shapes),
    )
    return zeros()

  def compile(self, params: Params, workload: Workload) -> None:
    """Compiles what an evaluation may run and is not compiled yet; off the CPU it runs once, on random tokens.

    Args:
      params: float32, on the mesh.
    """
    slots, length, rows = workload.slots, workload.stream_length, workload.slots * self.mesh.size
    new = [(short, shape) for short, shape in sorted(workload.scans) if (short, shape, rows, length) not in self._scans]
    lowered = {}
    with progress("compiling", total=len(new) + workload.has_phases, unit="programs") as bar:
      for short, shape in new:
        spec = self._specs[short]
        arguments = abstract(self.mesh, spec, shape, slots, length)
        lowered[short, shape, rows, length] = sharded_scan(self.mesh, spec, shape).lower(*arguments)
      for short in {short for short, _ in new}:
        self.adapters[short].warm_up(rows)
      if jax.process_count() > 1:
        distributed.leaders(0.0)  # what processes agree by between batches
      with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        compiled = pool.map(lambda low: low.compile(), lowered.values())
        if workload.has_phases:
          self.phase.compile(params)
          bar.advance()
        for key, program in zip(lowered, compiled, strict=True):
          self._scans[key] = program
          bar.advance()
    if distributed.platform(self.mesh) == "cpu":
      return  # nothing is loaded or tuned at the first run there
    for short, shape in new:
      jax.block_until_ready(self.scan(short, shape, *self._random_arguments(params, workload, short, shape)))

  def _random_arguments(self, params: Params, workload: Workload, short: bool, shape: Shape):
    rows, length = workload.slots * self.mesh.size, workload.stream_length
    state = ScanState(self.adapters[short].warm_up(rows), self.new_memory(workload.slots))
    tokens = np.random.default_rng(0).integers(2, 64, length, dtype=np.int32)
    ones = np.ones(rows, np.int32)
    documents = self.place_rows(Rows(0 * ones, ones * (length // 2), ones > 0, ones))
    inputs = ScanInputs(self.computing(params), place(self.mesh, tokens, P()), documents, self.place_size(shape.width))
    call = Call(shape, (Step(0, rows, shape.window, shape.kind),))
    hints = np.zeros((1, shape.slots * self.mesh.size, shape.width))
    return state, place_call(self.mesh, inputs, call, hints, hints[:, :, 0] if self.distributions else None)
