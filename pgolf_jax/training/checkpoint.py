"""Checkpoints by Orbax: asynchronous and atomic, independent of the number of devices.

A checkpoint holds parameters, moving average, optimizer state, and as JSON the step, the clock, the loader's cursor and
the schedule's memory. Randomness needs no state of its own: after initialisation a run draws none.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from pgolf_jax.errors import UserError
from pgolf_jax.model import params as parameters
from pgolf_jax.model.params import BANKS, Params
from pgolf_jax.runtime.distributed import replicated
from pgolf_jax.training.optimizer import MuonState, pad_stack
from pgolf_jax.training.step import TrainState, TrainStep


class Checkpoints:
  """The checkpoints of one run.

  On disk Muon's momentum has the length of its bank; on a mesh it is padded to a multiple of the devices.

  Args:
    folder: where they lie.
    step: declares the state.
    newest: number of the newest checkpoints that stay on disk.
  """

  def __init__(self, folder: Path, step: TrainStep, *, newest: int = 2):
    # A checkpoint appears under its name by one rename; what a kill left half-written is removed on opening.
    options = ocp.CheckpointManagerOptions(max_to_keep=newest, cleanup_tmp_directories=True)
    self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)
    self._step = step
    shapes, devices = parameters.shapes(step.settings.model), step.mesh.size
    self._lengths = {name: shapes[name][0] for name in BANKS}
    # Both make new arrays: what is being written must not be donated to the next step, nor what Orbax restored.
    self._unpad = jax.jit(lambda s: self._with_stacks(s, lambda m, n: m[:n]), out_shardings=replicated(step.mesh))
    self._pad = jax.jit(
      lambda s: jax.tree.map(jnp.copy, self._with_stacks(s, lambda m, n: pad_stack(m, devices))),
      out_shardings=step.shardings,
    )
    everywhere = replicated(step.mesh)
    self._abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), jax.eval_shape(self._unpad, step.abstract)
    )

  def _with_stacks(self, state: TrainState, change: Callable[[jax.Array, int], jax.Array]) -> TrainState:
    """Returns the state with `change(momentum, length of the bank)` in place of every Muon momentum."""

    def apply(x):
      if not isinstance(x, MuonState):
        return x
      changed = {k: change(m, self._lengths[k]) if k in self._lengths else m for k, m in x.momentum.items()}
      return MuonState(changed)

    opt_state = jax.tree.map(apply, state.opt_state, is_leaf=lambda x: isinstance(x, MuonState))
    return state._replace(opt_state=opt_state)

  @functools.cached_property
  def _unpad_compiled(self) -> jax.stages.Compiled:
    return self._unpad.lower(self._step.abstract).compile()

  def warm_up(self) -> None:
    """Compiles what `save` runs, so that it may be called while the clock runs."""
    _ = self._unpad_compiled

  def latest(self) -> int | None:
    """Returns the steps done at the newest whole checkpoint."""
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """Returns the steps done at each checkpoint that is kept, in order."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: TrainState, progress: dict) -> None:
    """Begins to write; returns once the state has been copied to the host."""
    # Orbax would copy arrays of several devices slice by slice, with a program to compile for each shape.
    whole = jax.tree.map(np.asarray, self._unpad_compiled(state))
    items = ocp.args.Composite(
      params=ocp.args.StandardSave(whole.params),
      average=ocp.args.StandardSave(whole.average),
      optimizer=ocp.args.StandardSave(whole.opt_state),
      progress=ocp.args.JsonSave(progress),
    )
    self._manager.save(step, args=items, force=True)

  def restore(self, step: int) -> tuple[TrainState, dict]:
    """Returns the state and the progress after `step` steps.

    Raises:
      UserError: the checkpoint does not fit the settings.
    """
    items = ocp.args.Composite(
      params=ocp.args.StandardRestore(self._abstract.params),
      average=ocp.args.StandardRestore(self._abstract.average),
      optimizer=ocp.args.StandardRestore(self._abstract.opt_state),
      progress=ocp.args.JsonRestore(),
    )
    try:
      restored = self._manager.restore(step, args=items)
    except (ValueError, KeyError, FileNotFoundError) as e:
      raise UserError(f"The checkpoint of step {step} does not fit this run: {str(e).splitlines()[0]}") from e
    return self._pad(TrainState(restored.params, restored.optimizer, restored.average)), restored.progress

  def restore_average(self, step: int) -> Params:
    """Returns the averaged weights alone."""
    items = ocp.args.Composite(average=ocp.args.StandardRestore(self._abstract.average))
    return self._manager.restore(step, args=items).average

  def close(self) -> None:
    """Waits until everything is written."""
    self._manager.wait_until_finished()
    self._manager.close()
