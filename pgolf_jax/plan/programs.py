"""The programs of a run, traced from shapes alone: the train step, the test-time training scan, the global phase."""

import dataclasses
import functools
from collections.abc import Callable

import jax

from pgolf_jax.model import flops
from pgolf_jax.scoring.buckets import STEPS_PER_CALL, Costs, Shape
from pgolf_jax.scoring.global_phase import GlobalPhase
from pgolf_jax.scoring.scan import Spec, abstract, sharded_scan
from pgolf_jax.settings import Settings
from pgolf_jax.training.schedule import Schedule
from pgolf_jax.training.step import TrainStep

VALIDATION_TOKENS = 47_853_344
"""Tokens of the official validation split, which lies on every device during an evaluation."""


@dataclasses.dataclass(frozen=True)
class Program:
  """One program of a run.

  Attributes:
    trace: traces it, from shapes alone.
    flops: of its matrix products on one device, by formula.
  """

  title: str
  trace: Callable[[], jax.stages.Traced]
  flops: float


def programs(settings: Settings, mesh, *, every_shape: bool) -> list[Program]:
  """Returns the programs that a run of these settings compiles for a mesh.

  Args:
    mesh: real, described or abstract, with the axis `data`.
    every_shape: include the train step of every sequence length and looping mode, not only the last, the largest.
  """
  shapes = Schedule(settings).shapes()
  chosen = [_train_step(settings, mesh, *shape) for shape in (shapes if every_shape else shapes[-1:])]
  if settings.ttt.enabled:
    chosen.append(_ttt_scan(settings, mesh))
    if settings.ttt.phase.prefix_docs > 0:
      chosen.append(_global_phase(settings, mesh))
  return chosen


def _train_step(settings: Settings, mesh, seq_len: int, looping: bool) -> Program:
  trace = functools.partial(TrainStep(settings, mesh).trace, seq_len, looping)
  title = f"train step, segments up to {seq_len}, looping {'on' if looping else 'off'}"
  return Program(title, trace, flops.train_step(settings, mesh.size, seq_len, looping=looping))


def _ttt_scan(settings: Settings, mesh) -> Program:
  """The scan whose window is full and in which no document has ended: the largest of an evaluation."""
  ttt = settings.ttt
  shape = Shape(-(-ttt.batch_size // mesh.size), ttt.seq_len, ttt.chunk_size)
  spec = Spec.choose(settings, short=False)

  def trace():
    arguments = abstract(mesh, spec, shape, shape.slots, VALIDATION_TOKENS + ttt.seq_len + ttt.chunk_size)
    return sharded_scan(mesh, spec, shape).trace(*arguments)

  title = (
    f"TTT, {STEPS_PER_CALL} chunks of {shape.width} with windows of {shape.window}, {shape.slots} documents a device"
  )
  return Program(title, trace, STEPS_PER_CALL * Costs.estimate(settings.model, ttt).step(shape, learn=True))


def _global_phase(settings: Settings, mesh) -> Program:
  phase = GlobalPhase(settings, mesh)
  rows = phase.world // mesh.size if phase.world % mesh.size == 0 else phase.world
  work = 3 * flops.forward(settings.model, rows * phase.row_tokens, phase.seq_len, looping=True)
  return Program(f"TTT, global phase, {phase.world} rows of {phase.row_tokens} tokens", phase.trace, work)
