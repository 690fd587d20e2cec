"""The training loop: the only place where training state changes.

Order of resuming:
 1. every step program is compiled, ahead of time, from shapes alone;
 2. warm-up steps run on a copy of the initial state, which is then dropped;
 3. the newest whole checkpoint, if any, gives state, clock, loader cursor and schedule;
 4. metrics of later steps are dropped, for they will be done again;
 5. the clock continues where it stood.
"""

import math
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pgolf_jax.data.loader import Loader
from pgolf_jax.errors import UserError
from pgolf_jax.model import params as parameters
from pgolf_jax.model.params import Params
from pgolf_jax.run_folder import RunFolder
from pgolf_jax.runtime import distributed
from pgolf_jax.runtime.clock import compilations
from pgolf_jax.runtime.log import log
from pgolf_jax.runtime.mesh import world_size
from pgolf_jax.runtime.progress import progress
from pgolf_jax.training.checkpoint import Checkpoints
from pgolf_jax.training.implementations import chosen
from pgolf_jax.training.metrics import MetricsWriter
from pgolf_jax.training.schedule import Schedule, StepPlan
from pgolf_jax.training.step import StepMetrics, TrainState, argument_shapes, init_state, make_step, place_rows


class Trainer:
  """One training run in a run folder.

  Args:
    run: its settings decide everything.
    mesh: has the axis `data`.
    data_folder: shards of the training stream.
    initial: parameters to start from; None draws them from the seed.
    validate: called with the step and the raw parameters every `val_loss_every` steps, the clock stopped.
  """

  def __init__(self, run: RunFolder, mesh: Mesh, data_folder, *, initial: Params | None = None, validate=None):
    self.run, self.mesh, self.settings = run, mesh, run.settings
    settings = self.settings
    t = settings.train
    self._validate = validate
    self._world = world_size(settings, mesh)
    self._rows = t.micro_batches
    self._span = t.batch_tokens // t.micro_batches + 1
    self.loader = Loader(data_folder, world_size=self._world, row_tokens=self._span - 1, bos_id=settings.model.bos_id)
    self.schedule = Schedule(t, settings.optimizer, settings.model.num_loops, settings.quantize.reserve_seconds)
    if initial is None:
      initial = jax.jit(lambda key: parameters.init(settings.model, key))(jax.random.key(settings.seed))
    self._initial = initial
    self._shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), initial)

  def compile(self) -> dict[tuple[int, bool], jax.stages.Compiled]:
    """Every step program, by (sequence length, looping)."""
    arguments = argument_shapes(self.settings, self.mesh, self._shapes)

    def build(shape: tuple[int, bool]):
      step = make_step(self.settings, self.mesh, self._shapes, seq_len=shape[0], looping=shape[1])
      return step.lower(*arguments).compile()

    shapes = self.schedule.shapes()
    with progress("compiling", total=len(shapes), unit="programs") as bar, ThreadPoolExecutor() as pool:
      programs = {}
      for shape, program in zip(shapes, pool.map(build, shapes), strict=True):
        programs[shape] = program
        bar.advance()
    return programs

  def _warm_up(self, programs: dict, state: TrainState) -> None:
    """Runs every program, and `warmup_steps` steps in each looping mode, on a copy that is dropped."""
    if self.settings.train.warmup_steps <= 0:
      return
    rows = place_rows(self.mesh, np.zeros((self._rows, self._span), np.uint16))
    copy = jax.tree.map(jnp.copy, state)
    seen = set()
    for shape, program in programs.items():
      steps = self.settings.train.warmup_steps if shape[1] not in seen else 1
      seen.add(shape[1])
      for _ in range(steps):
        copy, metrics = program(copy, rows, np.float32(0.0), np.float32(0.0))
    jax.block_until_ready(metrics)

  def _local_elapsed(self) -> float:
    return self._before + time.perf_counter() - self._began

  def _elapsed(self) -> float:
    """Seconds of training so far, the same on every process: what decides anything must come from here."""
    return distributed.leaders(self._local_elapsed())

  def _progress(self) -> dict:
    return {"elapsed": self._elapsed(), "loader": self.loader.state(), "schedule": self.schedule.state()}

  def train(self) -> tuple[TrainState, dict]:
    """Trains to the end; returns the last state and the stage's result.

    Raises:
      UserError: the loss or the gradient is not finite; the newest good checkpoint is kept.
    """
    t = self.settings.train
    started = time.perf_counter()
    programs = self.compile()
    state = init_state(self.settings, self.mesh, self._initial)
    self._warm_up(programs, state)
    log.info(
      "train: %s parameters, %d devices, %d ranks, %d programs ready after %.1f s",
      f"{parameters.count(self.settings.model):,}", self.mesh.size, self._world, len(programs),
      time.perf_counter() - started,
    )  # fmt: skip
    for operation, choice in chosen(self.settings).items():
      log.info("implementation of %s: %s", operation, choice)
    checkpoints = Checkpoints(self.run.checkpoints, self.settings, self.mesh, self._shapes)
    checkpoints.warm_up()
    step, self._before = 0, 0.0
    if (latest := checkpoints.latest()) is not None:
      state, kept = checkpoints.restore(latest)
      step, self._before = latest, kept["elapsed"]
      self.loader.restore(kept["loader"])
      self.schedule.restore(kept["schedule"])
      log.info("train: continuing after step %d, %.1f s into the clock", step, self._before)
    writer = None
    if distributed.is_leader():
      writer = MetricsWriter(self.run.metrics, self.run.path / "tensorboard", first_step=step)
    try:
      state, step = self._loop(programs, state, step, checkpoints, writer)
      if checkpoints.latest() != step:
        checkpoints.save(step, state, self._progress())
    finally:
      checkpoints.close()
      if writer is not None:
        writer.close()
    return state, {
      "steps": step,
      "seconds": self._before,
      "tokens": step * t.batch_tokens,
      "tokens_per_second": step * t.batch_tokens / max(self._before, 1e-9),
      "parameters": parameters.count(self.settings.model),
      "devices": self.mesh.size,
      "compile_and_warm_up_seconds": self._began_first - started,
      "recompilations_in_clock": self._recompilations,
    }

  def _loop(self, programs, state, step, checkpoints, writer) -> tuple[TrainState, int]:
    t = self.settings.train
    last = min(t.iterations, t.stop_step or t.iterations)
    accumulation = self._rows // self._world
    # With a step schedule the bar counts steps, else seconds of the clock.
    timed = math.isfinite(self.schedule.time_cap)
    total, unit = (self.schedule.time_cap, "s") if timed else (last, "steps")
    self._began = time.perf_counter()
    self._elapsed()  # compiles what several processes compare their clocks with
    compiled = compilations()
    self._recompilations = 0
    self._began = self._began_first = time.perf_counter()
    saved_at = self._before
    pending: tuple[int, StepPlan, StepMetrics] | None = None
    with progress("training", total=total, unit=unit) as bar:
      bar.advance(self._before if timed else step)
      shown = self._before
      while step < last and (elapsed := self._elapsed()) < self.schedule.time_cap:
        plan = self.schedule.plan(step, elapsed)
        if plan.seq_len_changed and self.settings.data.discard_prefetched:
          self.loader.skip(2)
        rows = place_rows(self.mesh, self.loader.step(accumulation))
        program = programs[plan.seq_len, plan.looping]
        state, metrics = program(state, rows, np.float32(plan.lr_scale), np.float32(plan.momentum))
        step += 1
        # The devices work on this step while the host waits for the one before.
        if pending is not None:
          self._report(pending, writer, bar)
        pending = (step, plan, metrics)
        bar.advance(elapsed - shown if timed else 1)
        shown = elapsed
        due = elapsed - saved_at >= t.checkpoint_every_seconds
        if due or (t.checkpoint_every_steps and step % t.checkpoint_every_steps == 0):
          self._report(pending, writer, bar)
          pending = None
          checkpoints.save(step, state, self._progress())
          saved_at = elapsed
        if self._validate is not None and t.val_loss_every and step % t.val_loss_every == 0:
          jax.block_until_ready(state)
          self._before = self._elapsed()
          recompiled = compilations() - compiled
          self._validate(step, state.params)
          compiled = compilations() - recompiled
          self._began = time.perf_counter()
      jax.block_until_ready(state)
      self._before = self._elapsed()
      self._began = time.perf_counter()
      if pending is not None:
        self._report(pending, writer, bar)
    self._recompilations = compilations() - compiled
    if self._recompilations:
      log.warning("train: FAULT: %d programs were compiled inside the clock", self._recompilations)
    return state, step

  def _report(self, pending: tuple[int, StepPlan, StepMetrics], writer: MetricsWriter | None, bar) -> None:
    step, plan, metrics = pending
    loss = float(np.asarray(metrics.loss).mean())
    grad_norm = float(np.asarray(metrics.grad_norm).max())
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
      raise UserError(
        f"Training stopped at step {step}: loss {loss}, gradient norm {grad_norm}. The newest good checkpoint is in "
        f"{self.run.checkpoints}; lower the learning rates and run again."
      )
    seconds = self._local_elapsed()
    if writer is not None:
      writer.write(
        {
          "step": step,
          "loss": loss,
          "grad_norm": grad_norm,
          "lr_scale": plan.lr_scale,
          "momentum": plan.momentum,
          "seq_len": plan.seq_len,
          "looping": plan.looping,
          "progress": plan.progress,
          "seconds": seconds,
        }
      )
    bar.note(f"step {step} loss {loss:.4f}")
    every = self.settings.train.log_every
    if step <= 5 or (every and step % every == 0):
      rate = step * self.settings.train.batch_tokens / max(seconds, 1e-9)
      log.info("step %d | loss %.4f | lr × %.3f | seq %d%s | %.1f s | %s tokens/s", step, loss, plan.lr_scale,
               plan.seq_len, " looping" if plan.looping else "", seconds, f"{rate:,.0f}")  # fmt: skip
