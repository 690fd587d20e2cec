"""What changes over a run: progress, learning rate, momentum, sequence length, looping. Recipe section 3.

Plain Python on numbers: a schedule is tested and plotted without a device.
"""

import dataclasses

from pgolf_jax.settings import OptimizerConfig, Settings, TrainConfig


def lr_factor(config: TrainConfig, progress: float, step: int) -> float:
  """Returns the warm-down's factor: 1 while progress < 1 − warmdown_frac, then falling linearly, never below min_lr.

  Args:
    progress: share of the run that is done, in [0, 1].
    step: steps done; read only where `warmdown_iters` gives the warm-down's length in steps of a run with a time cap.
  """
  if config.warmdown_iters > 0:
    share = config.warmdown_iters / max(config.iterations if not config.max_wallclock_seconds else step, 1)
    # With a time cap the warm-down's share of the clock follows the mean step time so far: t·(iters/step).
    left = 1.0 - progress
    span = share if not config.max_wallclock_seconds else share * progress
    return max(left / max(span, 1e-9), config.min_lr) if left <= span else 1.0
  if config.warmdown_frac <= 0 or progress < 1.0 - config.warmdown_frac:
    return 1.0
  return max((1.0 - progress) / config.warmdown_frac, config.min_lr)


def muon_momentum(config: OptimizerConfig, step: int) -> float:
  """Returns μ of 0-based step `step`, which rises linearly from the warm-up's start to `muon_momentum`."""
  steps = config.muon_momentum_warmup_steps
  share = min(step / steps, 1.0) if steps > 0 else 1.0
  return (1 - share) * config.muon_momentum_warmup_start + share * config.muon_momentum


@dataclasses.dataclass(frozen=True)
class StepPlan:
  """What one step is run with."""

  progress: float  # share of the run that is done
  seq_len: int  # longest segment, tokens
  looping: bool
  lr_scale: float  # factor on every learning rate
  momentum: float  # Muon's μ
  seq_len_changed: bool  # since the step before


@dataclasses.dataclass
class Schedule:
  """Turns (step, elapsed seconds) into a StepPlan.

  It remembers when the sequence length last changed and that looping has begun; a checkpoint keeps this (`state`).
  """

  settings: Settings
  seq_len: int | None = None  # of the step before
  changed_at: int | None = None  # step at which the sequence length last changed
  looping: bool = False

  @property
  def train(self) -> TrainConfig:
    """The training section of the settings."""
    return self.settings.train

  @property
  def time_cap(self) -> float:
    """Seconds that training may take; infinite without a cap."""
    cap = self.train.max_wallclock_seconds
    return cap - self.settings.quantize.reserve_seconds if cap > 0 else float("inf")

  def shapes(self) -> list[tuple[int, bool]]:
    """Returns every (sequence length, looping) that can occur, in order."""
    loops, looping_at = self.settings.model.num_loops > 0, self.train.enable_looping_at
    shapes: dict[tuple[int, bool], None] = {}
    begin = 0.0
    for seq_len, until in self.train.length_stages:
      if not loops or begin < looping_at:
        shapes[seq_len, False] = None
      if loops and until >= looping_at:
        shapes[seq_len, True] = None
      begin = until
    return list(shapes)

  def progress(self, step: int, elapsed: float) -> float:
    """Returns the share of the run that is done before 0-based step `step`, in [0, 1]."""
    if self.train.schedule_mode == "step" or self.train.max_wallclock_seconds <= 0:
      share = step / max(self.train.iterations, 1)
    else:
      share = elapsed / max(self.time_cap, 1e-9)
    return min(max(share, 0.0), 1.0)

  def plan(self, step: int, elapsed: float) -> StepPlan:
    """Returns the plan of 0-based step `step`, which starts after `elapsed` seconds of training."""
    p = self.progress(step, elapsed)
    seq_len = next(s.seq_len for s in self.train.length_stages if p <= s.until)
    changed = self.seq_len is not None and seq_len != self.seq_len
    if changed:
      self.changed_at = step
    self.seq_len = seq_len
    scale = lr_factor(self.train, p, step)
    scale *= [stage.scale for stage in self.train.scale_stages if p + 1e-12 >= stage.at][-1]
    if self.changed_at is not None and self.train.seq_change_warmup_steps > 0:
      scale *= min((step - self.changed_at + 1) / self.train.seq_change_warmup_steps, 1.0)
    self.looping = self.looping or (self.settings.model.num_loops > 0 and p >= self.train.enable_looping_at)
    momentum = muon_momentum(self.settings.optimizer, step)
    return StepPlan(p, seq_len, self.looping, scale, momentum, changed)

  def state(self) -> dict[str, int]:
    """Returns what a checkpoint keeps; −1 stands for None."""
    return {
      "seq_len": -1 if self.seq_len is None else self.seq_len,
      "changed_at": -1 if self.changed_at is None else self.changed_at,
      "looping": int(self.looping),
    }

  def restore(self, state: dict[str, int]) -> None:
    """Takes over what `state` returned."""
    self.seq_len = None if state["seq_len"] < 0 else int(state["seq_len"])
    self.changed_at = None if state["changed_at"] < 0 else int(state["changed_at"])
    self.looping = bool(state["looping"])
