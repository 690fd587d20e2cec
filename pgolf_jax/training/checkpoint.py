"""Checkpoints by Orbax: asynchronous and atomic, independent of the number of devices.

A checkpoint holds parameters, moving average, optimizer state, and as JSON the step, the clock, the loader's cursor and
the schedule's memory. Randomness needs no state of its own: after initialisation a run draws none.
"""

import functools
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import PartitionSpec as P

from pgolf_jax.errors import UserError
from pgolf_jax.model import params as parameters
from pgolf_jax.model.params import BANKS, Params
from pgolf_jax.runtime import distributed
from pgolf_jax.runtime.distributed import place, replicated
from pgolf_jax.runtime.files import Damaged, is_sealed, remove, seal
from pgolf_jax.runtime.log import log
from pgolf_jax.training.optimizer import MuonState, pad_stack
from pgolf_jax.training.step import TrainState, TrainStep, trained


class Checkpoints:
  """The checkpoints of one run.

  On disk Muon's momentum has the length of its bank; on a mesh it is padded to a multiple of the devices.

  Args:
    folder: where they lie.
    step: declares the state.
    newest: number of the newest checkpoints that stay on disk.
    writes: whether more are to come; otherwise the folder stays as it is.
  """

  def __init__(self, folder: Path, step: TrainStep, *, newest: int = 2, writes: bool = True):
    # A checkpoint appears under its name by one rename; what a kill left half-written is removed on opening.
    options = ocp.CheckpointManagerOptions(max_to_keep=newest, cleanup_tmp_directories=writes, create=writes)
    self._folder = Path(folder).absolute()
    if writes:
      with distributed.leader_first("checkpoints"):
        if distributed.is_leader():
          self._set_strangers_aside()
    self._manager = ocp.CheckpointManager(self._folder, options=options)
    self._step = step
    self._stacks = _stacks(step.shared)
    everywhere = replicated(step.mesh)
    self._abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
      jax.eval_shape(self._stacks.unpad, step.abstract),
    )

  def warm_up(self) -> None:
    """Compiles what `save` runs, so that it may be called while the clock runs."""
    _ = self._stacks.unpad_compiled

  def latest(self) -> int | None:
    """Returns the steps done at the newest whole checkpoint."""
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """Returns the steps done at each checkpoint that is kept, in order."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: TrainState, progress: dict) -> None:
    """Begins to write; returns once the state has been copied to the host."""
    # Orbax would copy arrays of several devices slice by slice, with a program to compile for each shape.
    whole = jax.tree.map(np.asarray, self._stacks.unpad_compiled(state))
    arrays = {"params": whole.params, "average": whole.average, "optimizer": whole.opt_state}
    items = ocp.args.Composite(
      **{name: ocp.args.StandardSave(_without_empty(tree)) for name, tree in arrays.items()},
      progress=ocp.args.JsonSave(seal(progress | {_ARRAYS: _hashes(whole)})),
    )
    self._manager.save(step, args=items, force=True)

  def restore_newest(self) -> tuple[int, TrainState, dict] | None:
    """Returns (steps done, state, progress) of the newest checkpoint that is as it was written; None if none is.

    Damaged ones are set aside, so that training can write them again.

    Raises:
      UserError: the checkpoint does not fit the settings.
    """
    for step in reversed(self.steps()):
      try:
        return step, *self.restore(step)
      except Damaged as damage:
        earlier = [other for other in self.steps() if other < step]
        goes_on = f"after step {earlier[-1]}" if earlier else "from the start"
        log.warning("%s Training goes on %s.", damage, goes_on)
      with distributed.leader_first("checkpoint set aside"):
        if distributed.is_leader():
          self._set_aside(self._folder / str(step))
      self._manager.reload()
    return None

  def _set_strangers_aside(self) -> None:
    """Takes out of the way what is no folder where there should be one; Orbax would stop there."""
    if self._folder.exists() and not self._folder.is_dir():
      self._set_aside(self._folder)
    if self._folder.is_dir():
      for path in self._folder.iterdir():
        if not path.is_dir():
          self._set_aside(path)

  def _set_aside(self, path: Path) -> None:
    aside = self._folder.parent / "damaged" / path.name
    remove(aside)
    aside.parent.mkdir(exist_ok=True)
    path.rename(aside)

  def restore(self, step: int) -> tuple[TrainState, dict]:
    """Returns the state and the progress after `step` steps.

    Raises:
      Damaged: it is not what was written.
      UserError: it does not fit the settings.
    """
    progress, a = self._progress(step), self._abstract
    read = self._read_arrays(step, {"params": a.params, "average": a.average, "optimizer": a.opt_state})
    state = TrainState(read["params"], read["optimizer"], read["average"])
    self._verify(step, state, progress)
    return self._stacks.pad(state), progress

  def _progress(self, step: int) -> dict:
    """Returns what was saved beside the state, if it says so itself."""
    progress = self._read(step, ocp.args.Composite(progress=ocp.args.JsonRestore())).progress
    if not isinstance(progress, dict) or not is_sealed(progress):
      raise Damaged(f"The checkpoint of step {step} is damaged: its progress is not what was written.")
    shapes = {name: list(x.shape) for name, x in _named(self._abstract)}
    if (saved := {name: shape for name, (shape, _) in progress[_ARRAYS].items()}) != shapes:
      name = next(name for name in {**saved, **shapes} if saved.get(name) != shapes.get(name))
      raise UserError(
        f"The checkpoint of step {step} does not fit this run: {name} has the shape {saved.get(name)} there, "
        f"{shapes.get(name)} here."
      )
    return progress

  def _read(self, step: int, items: ocp.args.Composite):
    try:
      return self._manager.restore(step, args=items)
    except Exception as error:  # what a damaged file makes Orbax raise is any of a dozen types
      message = (str(error) or type(error).__name__).splitlines()[0]
      raise Damaged(f"The checkpoint of step {step} is damaged: {message[:200]}.") from error

  def _read_arrays(self, step: int, abstract: dict) -> dict:
    """Returns the trees of arrays of these names, each as it is declared."""
    items = {name: ocp.args.StandardRestore(_without_empty(tree)) for name, tree in abstract.items()}
    read = self._read(step, ocp.args.Composite(**items))

    def whole(declared: jax.ShapeDtypeStruct, x):
      return x if declared.size else place(self._step.mesh, np.zeros(declared.shape, declared.dtype), P())

    return {name: jax.tree.map(whole, tree, read[name]) for name, tree in abstract.items()}

  def _verify(self, step: int, tree, progress: dict) -> None:
    """Compares arrays with their hashes of when they were saved."""
    for name, (_, sha256) in _hashes(tree).items():
      if progress[_ARRAYS][name][1] != sha256:
        raise Damaged(f"The checkpoint of step {step} is damaged: {name} is not what was written.")

  def restore_average(self, step: int) -> Params:
    """Returns the averaged weights, as `trained` makes them out of what was saved.

    Raises:
      Damaged: they are not what was written.
    """
    progress, share = self._progress(step), self._step.settings.train.average_share
    parts = {"average": self._abstract.average} | ({"params": self._abstract.params} if share < 1 else {})
    read = self._read_arrays(step, parts)
    saved = TrainState(read.get("params"), None, read["average"])
    self._verify(step, saved, progress)
    return trained(saved.params, saved.average, share)

  def close(self) -> None:
    """Waits until everything is written."""
    try:
      self._manager.wait_until_finished()
    finally:
      self._manager.close()


class _Stacks:
  """Gives every Muon momentum the length of its bank, or the padded one; runs that share a step share the programs."""

  def __init__(self, step: TrainStep):
    shapes, devices = parameters.shapes(step.settings.model), step.mesh.size
    self._lengths = {name: shapes[name][0] for name in BANKS}
    self._abstract = step.abstract
    # Both make new arrays: what is being written must not be donated to the next step, nor what Orbax restored.
    self.unpad = jax.jit(lambda s: self._with_stacks(s, lambda m, n: m[:n]), out_shardings=replicated(step.mesh))
    self.pad = jax.jit(
      lambda s: jax.tree.map(jnp.copy, self._with_stacks(s, lambda m, n: pad_stack(m, devices))),
      out_shardings=step.shardings,
    )

  @functools.cached_property
  def unpad_compiled(self) -> jax.stages.Compiled:
    return self.unpad.lower(self._abstract).compile()

  def _with_stacks(self, state: TrainState, change: Callable[[jax.Array, int], jax.Array]) -> TrainState:
    """Returns the state with `change(momentum, length of the bank)` in place of every Muon momentum."""

    def apply(x):
      if not isinstance(x, MuonState):
        return x
      changed = {k: change(m, self._lengths[k]) if k in self._lengths else m for k, m in x.momentum.items()}
      return MuonState(changed)

    opt_state = jax.tree.map(apply, state.opt_state, is_leaf=lambda x: isinstance(x, MuonState))
    return state._replace(opt_state=opt_state)


@functools.lru_cache(maxsize=4)
def _stacks(step: TrainStep) -> _Stacks:
  return _Stacks(step)


_ARRAYS = "arrays"


def _without_empty(tree):
  """Leaves out arrays without values, which Orbax refuses: one layer has no skips."""
  return jax.tree.map(lambda x: x if x.size else None, tree)


def _named(tree) -> list[tuple[str, np.ndarray]]:
  """Returns (path, array) of every array of a tree."""
  return [(jax.tree_util.keystr(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]


def _hashes(tree) -> dict[str, list]:
  """Returns path → [shape, SHA-256 of the values] of every array of a tree; several are hashed at once."""
  named = _named(tree)
  with ThreadPoolExecutor() as pool:
    sums = pool.map(lambda item: hashlib.sha256(np.ascontiguousarray(item[1]).view(np.uint8).data).hexdigest(), named)
    return {name: [list(x.shape), sha256] for (name, x), sha256 in zip(named, sums, strict=True)}
