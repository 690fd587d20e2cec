"""Checkpoints by Orbax: asynchronous and atomic, independent of the number of devices.

Kept: parameters, moving average, optimizer state, and as JSON the step, the clock, the loader's cursor and the
schedule's memory. Randomness needs no state of its own: after initialisation a run draws none.
"""

import functools
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pgolf_jax.errors import UserError
from pgolf_jax.model.params import Params
from pgolf_jax.settings.config import Settings
from pgolf_jax.training import optimizer
from pgolf_jax.training.muon import MuonState
from pgolf_jax.training.step import TrainState, shardings, state_shapes, state_specs


class Checkpoints:
  """The checkpoints of one run.

  Args:
    folder: where they are kept.
    settings, mesh, params: the layout of the state; `params` may be shapes.
    keep: how many of the newest are kept.
  """

  def __init__(self, folder: Path, settings: Settings, mesh: Mesh, params: Params, *, keep: int = 2):
    # A checkpoint appears under its name by one rename; what a kill left half-written is removed on opening.
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)
    self._lengths = {name: value.shape[0] for name, value in params.items() if optimizer.group(name) == "bank"}
    self._mesh = mesh
    replicated = NamedSharding(mesh, P())
    specs = state_specs(settings, mesh, params)
    abstract = jax.eval_shape(
      lambda p: TrainState(p, optimizer.make(settings.optimizer).init(p), p),
      jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params),
    )
    self._abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), abstract)
    # Both make new arrays: what is being written must not be donated to the next step, nor what Orbax restored.
    self._unpad_jitted = jax.jit(lambda s: self._with_stacks(s, lambda x, n: x[:n]), out_shardings=replicated)
    self._padded = state_shapes(settings, mesh, params)
    self._pad = jax.jit(
      lambda s: jax.tree.map(jax.numpy.copy, self._with_stacks(s, lambda x, n: optimizer.pad_stack(x, mesh.size))),
      out_shardings=shardings(mesh, specs),
    )

  def _with_stacks(self, state: TrainState, change) -> TrainState:
    """The state with `change(momentum, length of the unpadded stack)` made to every Muon momentum."""

    def apply(x):
      if not isinstance(x, MuonState):
        return x
      changed = {k: change(m, self._lengths[k]) if k in self._lengths else m for k, m in x.momentum.items()}
      return MuonState(changed)

    opt_state = jax.tree.map(apply, state.opt_state, is_leaf=lambda x: isinstance(x, MuonState))
    return state._replace(opt_state=opt_state)

  def _host_copy(self, state: TrainState) -> TrainState:
    # Orbax would copy arrays of several devices slice by slice, with a program to compile for each shape.
    return jax.tree.map(np.asarray, self._unpad(state))

  @functools.cached_property
  def _unpad(self):
    return self._unpad_jitted.lower(self._padded).compile()

  def warm_up(self) -> None:
    """Compiles what `save` runs, so that it may be called while the clock runs."""
    _ = self._unpad

  def latest(self) -> int | None:
    """Steps done at the newest whole checkpoint."""
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState, progress: dict) -> None:
    """Begins to write; returns once the state has been copied to the host."""
    whole = self._host_copy(state)
    items = ocp.args.Composite(
      params=ocp.args.StandardSave(whole.params),
      average=ocp.args.StandardSave(whole.average),
      optimizer=ocp.args.StandardSave(whole.opt_state),
      progress=ocp.args.JsonSave(progress),
    )
    self._manager.save(step, args=items, force=True)

  def restore(self, step: int) -> tuple[TrainState, dict]:
    """The state and progress after `step` steps. Raises UserError if the checkpoint does not fit the settings."""
    items = ocp.args.Composite(
      params=ocp.args.StandardRestore(self._abstract.params),
      average=ocp.args.StandardRestore(self._abstract.average),
      optimizer=ocp.args.StandardRestore(self._abstract.opt_state),
      progress=ocp.args.JsonRestore(),
    )
    try:
      found = self._manager.restore(step, args=items)
    except (ValueError, KeyError, FileNotFoundError) as e:
      raise UserError(f"The checkpoint of step {step} does not fit this run: {str(e).splitlines()[0]}") from e
    return self._pad(TrainState(found.params, found.optimizer, found.average)), found.progress

  def restore_average(self, step: int) -> Params:
    """The averaged weights alone."""
    items = ocp.args.Composite(average=ocp.args.StandardRestore(self._abstract.average))
    return self._manager.restore(step, args=items).average

  def close(self) -> None:
    """Waits until what was begun is written."""
    self._manager.wait_until_finished()
    self._manager.close()
