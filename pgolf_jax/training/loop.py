"""The training loop: the only place where training state changes.

Order of resuming:
 1. every step program is compiled, ahead of time, from shapes alone;
 2. warm-up steps run on a copy of the initial state, which is then dropped;
 3. the newest whole checkpoint, if any, gives state, clock, loader cursor and schedule;
 4. metrics of later steps are dropped, for these steps will be done again;
 5. the clock continues where it stood.
"""

import contextlib
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pgolf_jax.data.loader import Loader
from pgolf_jax.errors import Stopped, UserError
from pgolf_jax.model import params as parameters
from pgolf_jax.model.params import Params
from pgolf_jax.run_folder import MetricsWriter, RunFolder, made_from
from pgolf_jax.runtime import distributed, signals
from pgolf_jax.runtime.clock import Clock
from pgolf_jax.runtime.distributed import world_size
from pgolf_jax.runtime.log import Progress, log, progress
from pgolf_jax.settings.load import differences, from_dict, to_dict
from pgolf_jax.training import Schedule, StepPlan
from pgolf_jax.training.checkpoint import Checkpoints
from pgolf_jax.training.figures import curves, learning_rates, speed
from pgolf_jax.training.step import StepMetrics, TrainState, TrainStep, chosen, trained

Programs = dict[tuple[int, bool], jax.stages.Compiled]
"""(sequence length, looping) → the compiled step."""


_draw = jax.jit(parameters.init, static_argnums=0)


class StepDone(NamedTuple):
  """A step that was given to the devices, which may still be at work on it."""

  step: int  # counted from 1
  plan: StepPlan
  metrics: StepMetrics
  score: dict[str, float]  # by name, of the parameters after the step; empty where they were not scored


class Trainer:
  """One training run in a run folder.

  Args:
    run: its settings decide everything.
    mesh: has the axis `data`.
    data_folder: shards of the training stream.
    initial: parameters to start from; None draws them from the seed.
    validate: called with the step and the raw parameters every `val_loss_every` steps, the clock stopped; what it
      returns joins the step's line.
  """

  def __init__(
    self,
    run: RunFolder,
    mesh: Mesh,
    data_folder: str | Path,
    *,
    initial: Params | None = None,
    validate: Callable[[int, Params], dict[str, float]] | None = None,
  ):
    settings = run.settings
    t = settings.train
    self.run, self.mesh, self.settings = run, mesh, settings
    self._validate = validate
    self._world = world_size(settings, mesh)
    self._row_tokens = t.batch_tokens // t.micro_batches
    self.step = TrainStep(settings, mesh)
    m = settings.model
    self.loader = Loader(
      data_folder, world_size=self._world, row_tokens=self._row_tokens, bos_id=m.bos_id, vocab_size=m.vocab_size
    )
    self.schedule = Schedule(settings)
    self.clock = Clock()
    self._shards = {k: v for k, v in made_from(run, "train", data_folder).items() if k.startswith("fineweb_train")}
    if initial is None:
      initial = _draw(settings.model, jax.random.key(settings.seed))
    self._initial = initial

  def train(self) -> tuple[TrainState, dict]:
    """Trains to the end; returns the last state and the stage's result.

    Raises:
      UserError: the loss or the gradient is not finite; the newest good checkpoint stays.
      Stopped: a signal came; the state is saved.
    """
    t, count = self.settings.train, parameters.count(self.settings.model)
    began = time.perf_counter()
    programs = self._compile()
    state = self.step.init(self._initial)
    self._warm_up(programs, state)
    log.info(
      "train: %s parameters, %d devices, %d ranks, %d programs ready after %.1f s",
      f"{count:,}", self.mesh.size, self._world, len(programs), time.perf_counter() - began,
    )  # fmt: skip
    for operation, choice in chosen(self.settings).items():
      log.info("implementation of %s: %s", operation, choice)
    with (
      contextlib.closing(Checkpoints(self.run.checkpoints, self.step)) as checkpoints,
      signals.postponed_signals() as self._arrived,
    ):
      checkpoints.warm_up()
      first, state, lines = self._resume(checkpoints, state)
      metrics = MetricsWriter(self.run, lines, curves, writes=distributed.is_leader())
      before_clock = time.perf_counter() - began
      with contextlib.closing(metrics):
        steps, state = self._loop(programs, first, state, checkpoints, metrics)
      if checkpoints.latest() != steps:
        checkpoints.save(steps, state, self._progress(metrics))
      _, signum = self.clock.agreed_with(self._arrived())
    if signum:
      raise Stopped(signum, f"step {steps}")
    if self.clock.compilations:
      log.warning("train: FAULT: %d programs were compiled inside the clock", self.clock.compilations)
    return state, {
      "steps": steps,
      "seconds": self.clock.seconds,
      "tokens": steps * t.batch_tokens,
      "tokens_per_second": steps * t.batch_tokens / max(self.clock.seconds, 1e-9),
      "parameters": count,
      "weights": parameters.content_hash(trained(state.params, state.average, t.average_share)),
      "devices": self.mesh.size,
      "device": self.mesh.devices.flat[0].device_kind,
      "compile_and_warm_up_seconds": before_clock,
      "recompilations_in_clock": self.clock.compilations,
    }

  def _compile(self) -> Programs:
    """Compiles every step program, several at a time."""
    shapes = self.schedule.shapes()
    programs = {}
    with progress("compiling", total=len(shapes), unit="programs") as bar, ThreadPoolExecutor() as pool:
      for shape, program in zip(shapes, pool.map(lambda shape: self.step.compiled(*shape), shapes), strict=True):
        programs[shape] = program
        bar.advance()
    return programs

  def _warm_up(self, programs: Programs, state: TrainState) -> None:
    """Runs every program, and `warmup_steps` steps in each looping mode, on a copy that is dropped."""
    t = self.settings.train
    if t.warmup_steps <= 0:
      return
    tokens = np.zeros((t.micro_batches, self._row_tokens + 1), np.uint16)
    inputs = self.step.inputs(tokens, lr_scale=0.0, momentum=0.0)
    copy = jax.tree.map(jnp.copy, state)
    warm_modes = set()
    with progress("warming up"):
      for (_, looping), program in programs.items():
        for _ in range(1 if looping in warm_modes else t.warmup_steps):
          copy, metrics = program(copy, inputs)
        warm_modes.add(looping)
      jax.block_until_ready(metrics)

  def _resume(self, checkpoints: Checkpoints, state: TrainState) -> tuple[int, TrainState, list[dict]]:
    """Returns (steps done, state, their metrics) of the newest whole checkpoint, or (0, `state`, none) if none is."""
    newest = checkpoints.restore_newest()
    if newest is None:
      return 0, state, []
    latest, state, saved = newest
    changed = differences(from_dict(saved["settings"], where="the checkpoint's settings"), self.settings)
    for name, (old, new) in changed.items():
      if name not in ("train.stop_step", "data.path", "data.tokenizer"):
        raise UserError(f"{self.run.path}: the steps so far were trained with {name}={old}, now it is {new}.")
    read = saved["shards"]
    if changed := [name for name in {**read, **self._shards} if read.get(name) != self._shards.get(name)]:
      raise UserError(
        f"{self.run.path}: the steps so far read another {changed[0]} than the data folder has now; "
        "put that one back, or train in another folder with --out."
      )
    self.clock = Clock(saved["elapsed"])
    self.loader.restore(saved["loader"])
    self.schedule.restore(saved["schedule"])
    log.info("train: continuing after step %d, %.1f s into the clock", latest, self.clock.seconds)
    return latest, state, saved["metrics"]

  def _progress(self, writer: MetricsWriter) -> dict:
    """Returns what a checkpoint keeps beside the state."""
    state = {
      "metrics": writer.lines,
      "loader": self.loader.state(),
      "schedule": self.schedule.state(),
      "settings": to_dict(self.settings),
      "shards": self._shards,
    }
    return {"elapsed": self.clock.agreed(), **state}

  def _loop(
    self, programs: Programs, step: int, state: TrainState, checkpoints: Checkpoints, writer: MetricsWriter
  ) -> tuple[int, TrainState]:
    """Trains on from `step` steps done; returns how many are done and the state."""
    t, schedule, clock = self.settings.train, self.schedule, self.clock
    last = min(t.iterations, t.stop_step or t.iterations)
    # With a step schedule the bar counts steps, else seconds of the clock.
    timed = math.isfinite(schedule.time_cap)
    total, unit = (schedule.time_cap, "s") if timed else (last, "steps")
    shown = saved = clock.seconds
    running: StepDone | None = None
    with progress("training", total=total, unit=unit) as bar:
      bar.advance(shown if timed else step)
      clock.start()
      while step < last:
        elapsed, signum = clock.agreed_with(self._arrived())
        if 2 * elapsed - shown >= schedule.time_cap:  # the step that is still running may end past the cap
          jax.block_until_ready(state)
          elapsed, signum = clock.agreed_with(self._arrived())
        if signum or elapsed >= schedule.time_cap:
          break
        plan = schedule.plan(step, elapsed)
        if plan.seq_len_changed and self.settings.data.discard_prefetched:
          self.loader.skip(2)
        tokens = self.loader.step(t.micro_batches // self._world)
        inputs = self.step.inputs(tokens, plan.lr_scale, plan.momentum)
        state, metrics = programs[plan.seq_len, plan.looping](state, inputs)
        step += 1
        # The devices work on this step while the host waits for the one before.
        before, running = running, StepDone(step, plan, metrics, {})
        self._report(before, writer, bar)
        if self._validate is not None and t.val_loss_every and step % t.val_loss_every == 0:
          jax.block_until_ready(state)
          with clock.stopped():
            running = running._replace(score=self._validate(step, state.params))
        bar.advance(elapsed - shown if timed else 1)
        shown = elapsed
        is_due = elapsed - saved >= t.checkpoint_every_seconds
        if is_due or (t.checkpoint_every_steps and step % t.checkpoint_every_steps == 0):
          self._report(running, writer, bar)
          running = None
          checkpoints.save(step, state, self._progress(writer))
          saved = elapsed
      jax.block_until_ready(state)
      clock.stop()
      self._report(running, writer, bar)
    return step, state

  def _report(self, done: StepDone | None, writer: MetricsWriter, bar: Progress) -> None:
    """Waits for a step and writes down what it says."""
    if done is None:
      return
    step, plan, metrics, score = done
    loss = float(np.asarray(metrics.loss).mean())
    grad_norm = float(np.asarray(metrics.grad_norm).max())
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
      folder = self.run.checkpoints
      advice = f"the newest good checkpoint is in {folder}; " if any(folder.iterdir()) else ""
      raise UserError(
        f"Training stopped at step {step}: loss {loss}, gradient norm {grad_norm}; {advice}lower the learning rates "
        "and run again."
      )
    seconds = self.clock.seconds
    before = writer.lines[-1]["seconds"] if writer.lines else 0.0
    line = {
      "step": step,
      "loss": loss,
      "grad_norm": grad_norm,
      "lr_scale": plan.lr_scale,
      **learning_rates(self.settings, plan.lr_scale),
      "momentum": plan.momentum,
      "seq_len": plan.seq_len,
      "looping": plan.looping,
      "progress": plan.progress,
      "seconds": seconds,
    }
    writer.write(line | speed(self.settings, self.mesh, plan, seconds - before) | score)
    bar.note(f"step {step} loss {loss:.4f}")
    every = self.settings.train.log_every
    if step <= 5 or (every and step % every == 0):
      rate = step * self.settings.train.batch_tokens / max(seconds, 1e-9)
      log.info("step %d | loss %.4f | lr × %.3f | seq %d%s | %.1f s | %s tokens/s", step, loss, plan.lr_scale,
               plan.seq_len, " looping" if plan.looping else "", seconds, f"{rate:,.0f}")  # fmt: skip
