"""`pgolf bench step`: the training step of a config on the devices that are there, beside plain XLA and PyTorch."""

import contextlib
import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pgolf_jax.errors import UserError
from pgolf_jax.settings.arguments import Defaults, settings_of
from pgolf_jax.settings.config import Settings

_TRACED_STEPS = 3
_GIB = 2**30

Pass = Literal["forward", "gradient", "step"]


@dataclasses.dataclass(frozen=True)
class StepArgs:
  """Arguments of `pgolf bench step`."""

  config: tyro.conf.Positional[Path | None] = None
  """TOML file of settings; the record's settings if not given."""
  passes: tuple[Pass, ...] = ("step",)
  """The whole step, or loss alone and loss with gradient of one micro-batch on one device."""
  looping: Literal["off", "on", "both"] = "both"
  """Which of the model's two forms to time."""
  repeats: int = 10
  """Timed calls, after two that are not counted; the median is printed."""
  torch: Literal["eager", "compiled", "none"] = "eager"
  """How PyTorch runs: operation by operation, through torch.compile, or not at all."""
  profile: Path | None = None
  """Folder for an xprof trace of three steps of the last shape."""
  settings: Annotated[Settings, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Settings)


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table.

  Attributes:
    by: `kernels`, `xla` (what a run would take is called so where that is all it takes), or `PyTorch`.
    seconds: median of one call.
    tokens: of one call, on all devices.
    mfu: model FLOP/s over the peak of the devices; None where no peak is known.
    floor_share: least time at the chips' peaks over `seconds`; None where no peak is known.
    planned_bytes: of one device, as XLA's compiler counts them; None for PyTorch.
    peak_bytes: most bytes in use on the first device so far, as the backend reports it; None where it does not.
    peak_is_own: whether this program raised that peak; if not, it needed no more than that.
  """

  passes: str
  seq_len: int
  looping: bool
  by: str
  seconds: float
  tokens: int
  mfu: float | None
  floor_share: float | None
  planned_bytes: int | None
  peak_bytes: int | None
  peak_is_own: bool


def step(arguments: Annotated[StepArgs, tyro.conf.arg(name="")] = StepArgs()) -> None:
  """Time the training step of a config, for each sequence length of its schedule, looping off and on.

  Beside what a run would take stand plain XLA, where a run takes kernels, and PyTorch, where it is installed and there
  is one device. Tokens are random; each document is as long as a segment may be, the most work that a step can have.

  Example: pgolf bench step configs/record_1xgpu.toml --repeats 20 --profile traces
  On a CPU: pgolf bench step --train.compute-dtype float32 --train.batch-tokens 4096 --train.micro-batches 1
            --train.seq-schedule 1024@1.0 --looping on --passes forward gradient step --repeats 5
  """
  # PyTorch has a memory pool of its own beside JAX's, which would else take three quarters of a GPU at once.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  from rich.console import Console
  from rich.table import Table

  from pgolf_jax.runtime import distributed

  distributed.start()
  rows, notes = measure(arguments)
  table = Table()
  for column in ("pass", "segments", "looping", "by", "ms", "tokens/s", "MFU", "roofline", "planned GiB", "peak GiB"):
    table.add_column(column, justify="left" if column in ("pass", "looping", "by") else "right")
  for row in rows:
    table.add_row(
      row.passes,
      f"{row.seq_len}",
      "on" if row.looping else "off",
      row.by,
      f"{row.seconds * 1e3:,.2f}",
      f"{row.tokens / row.seconds:,.0f}",
      "" if row.mfu is None else f"{row.mfu:.1%}",
      "" if row.floor_share is None else f"{row.floor_share:.1%}",
      "" if row.planned_bytes is None else f"{row.planned_bytes / _GIB:.2f}",
      "" if row.peak_bytes is None else f"{'' if row.peak_is_own else '≤ '}{row.peak_bytes / _GIB:.2f}",
    )
  console = Console()
  console.width = max(console.width, 110)  # narrower, the table would break its headings
  console.print(table)
  for note in notes:
    console.print(note, markup=False, highlight=False, soft_wrap=True)


@dataclasses.dataclass
class _Side:
  """One way to do a pass, compiled: `call` does it once and waits for it."""

  call: Callable[[], object]
  planned_bytes: int | None = None
  peak: Callable[[], int | None] = lambda: None


def measure(arguments: StepArgs) -> tuple[list[Row], list[str]]:
  """The table's rows, and what there is to say about them.

  Raises:
    UserError: the settings do not fit the devices that are there.
  """
  import jax

  from pgolf_jax.kernels.peaks import peaks
  from pgolf_jax.runtime.mesh import data_mesh, usable_devices
  from pgolf_jax.settings import check
  from pgolf_jax.training.implementations import chosen
  from pgolf_jax.training.schedule import Schedule

  if arguments.repeats < 1:
    raise UserError(f"--repeats {arguments.repeats} must be at least 1.")
  if arguments.profile is not None and "step" not in arguments.passes:
    raise UserError("--profile traces the whole step, which is not among --passes.")
  settings = arguments.settings
  mesh = data_mesh(usable_devices(settings.train.micro_batches))
  check.check(settings, device_count=mesh.size)
  t = settings.train
  kind = mesh.devices.flat[0].device_kind
  limits = peaks(kind)
  notes = [
    f"{mesh.size} × {kind}, jax {jax.__version__}, {t.compute_dtype}: steps of {t.batch_tokens:,} tokens, "
    f"micro-batches of {t.batch_tokens // t.micro_batches:,}; medians of {arguments.repeats}",
    _formula(limits, mesh.size, kind),
  ]
  taken = chosen(settings)
  notes += [f"{operation}: {choice}" for operation, choice in taken.items()]
  has_kernels = any(not choice.startswith("xla ") for choice in taken.values())
  schedule = Schedule(t, settings.optimizer, settings.model.num_loops, settings.quantize.reserve_seconds)
  lengths = list(dict.fromkeys(seq_len for seq_len, _ in schedule.shapes()))
  modes = {"off": [False], "on": [True], "both": [False, True]}[arguments.looping]
  if settings.model.num_loops == 0:
    modes = [False]
  torch_obstacle = _torch_obstacle(settings, mesh, arguments.torch)
  if torch_obstacle and arguments.torch != "none":
    notes.append(f"PyTorch was left out: {torch_obstacle}")
  params = first_params(settings)
  rows: list[Row] = []
  for passes in arguments.passes:
    for seq_len in lengths:
      for looping in modes:
        work = _Work(settings, mesh, params, passes, seq_len, looping)
        makers = {"kernels" if has_kernels else "xla": work.ours}
        if has_kernels:
          makers["xla"] = work.plain_xla
        if torch_obstacle is None:
          makers["PyTorch"] = lambda work=work: work.torch(compiled=arguments.torch == "compiled")
        found = _time(makers, arguments.repeats, f"{passes} at {seq_len}, looping {'on' if looping else 'off'}", notes)
        rows += [_row(work, by, limits, *figures) for by, figures in found.items()]
        gc.collect()
        if passes == "step" and arguments.profile is not None and (seq_len, looping) == (lengths[-1], modes[-1]):
          notes.append(_trace(work, arguments.profile))
  return rows, notes


def first_params(settings: Settings) -> dict:
  """The weights to time with, as NumPy arrays.

  Matrices that training starts at zero are drawn at random: else half of the backward pass would be trivial.
  """
  import jax
  import numpy as np

  from pgolf_jax.model import params as parameters

  random = np.random.default_rng(0)
  found = jax.device_get(jax.jit(lambda key: parameters.init(settings.model, key))(jax.random.key(settings.seed)))
  return {k: v if v.any() else random.normal(scale=0.02, size=v.shape).astype(v.dtype) for k, v in found.items()}


def _formula(limits, devices: int, kind: str) -> str:
  count = "3 × 2 × tokens × (positions × (matrices + D·(segment + 1)) + V·D), all as dense products"
  if limits is None:
    return f"{kind}: no peak known, so no MFU and no roofline (model FLOPs would be {count})."
  return (
    f"MFU: model FLOPs ÷ ({devices} × {limits.flops_per_s / 1e12:g}e12 × seconds), the dense bfloat16 peak; model "
    f"FLOPs are {count}; a third of that for `forward`. Roofline: the larger of all products (with those of Muon) at "
    f"that peak and the bytes of state read and written at {limits.bytes_per_s / 1e12:g} TB/s, over the time."
  )


def _torch_obstacle(settings: Settings, mesh, how: str) -> str | None:
  if how == "none":
    return "as asked for"
  try:
    import torch
  except ImportError:
    return "it is not installed; pip install 'pgolf_jax[torch]' adds it"
  from pgolf_jax.bench import _torch_gpt

  platform = mesh.devices.flat[0].platform
  if platform not in ("cpu", "gpu") or (platform == "gpu" and not torch.cuda.is_available()):
    return f"this PyTorch does not compute on {mesh.devices.flat[0].device_kind}"
  if mesh.size > 1:
    return f"its step is for one device, not {mesh.size}"
  return _torch_gpt.obstacle(settings.model)


class _Work:
  """One pass at one shape, and the ways to do it.

  Tokens of a document are random; a document fills a segment. So PyTorch, which gets documents as rows of a matrix,
  does the same work and finds the same loss.
  """

  def __init__(self, settings: Settings, mesh, params: dict, passes: str, seq_len: int, looping: bool):
    import numpy as np

    from pgolf_jax.plan import work

    self.settings, self.mesh, self.passes, self.seq_len, self.looping = settings, mesh, passes, seq_len, looping
    t, m = settings.train, settings.model
    span = t.batch_tokens // t.micro_batches
    count = t.micro_batches if passes == "step" else 1
    random = np.random.default_rng(0)
    tokens = random.integers(0, m.vocab_size - 1, (count, span + 1), np.uint16)
    tokens += tokens >= m.bos_id
    tokens[:, ::seq_len] = m.bos_id
    self.rows = tokens
    self.params = params
    self.tokens = count * span
    devices = mesh.size if passes == "step" else 1
    forward = work.forward(m, self.tokens // devices, seq_len, looping=looping)
    self.model_flops = forward if passes == "forward" else 3 * forward
    self.flops = work.train_step(settings, devices, seq_len, looping) if passes == "step" else self.model_flops
    sizes = {k: v.nbytes for k, v in self.params.items()}
    # A step reads and writes parameters, their average, and Adam's two moments or Muon's one.
    self.least_bytes = {"forward": 1, "gradient": 2, "step": 6}[passes] * sum(sizes.values())
    self.program = None

  def ours(self) -> _Side:
    """What a run would take."""
    self.program = self._compile()
    return self._side(self.program)

  def plain_xla(self) -> _Side:
    with only_xla():
      return self._side(self._compile())

  def _peak(self) -> int | None:
    stats = self.mesh.devices.flat[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")

  def _compile(self):
    """The pass as a compiled program."""
    import jax
    import jax.numpy as jnp

    from pgolf_jax.model.gpt import bind
    from pgolf_jax.model.loss import packed_nll
    from pgolf_jax.training.step import argument_shapes, make_step

    if self.passes == "step":
      step = make_step(self.settings, self.mesh, self.params, seq_len=self.seq_len, looping=self.looping)
      return step.lower(*argument_shapes(self.settings, self.mesh, self.params)).compile()
    config, dtype = self.settings.model, jnp.dtype(self.settings.train.compute_dtype)

    def loss(params, row):
      model = bind(config, params)
      return packed_nll(model, row, looping=self.looping, seq_len=self.seq_len, dtype=dtype).mean()

    f = jax.jit(loss if self.passes == "forward" else jax.value_and_grad(loss))
    return f.lower(*self._micro_batch()).compile()

  def _micro_batch(self):
    import jax

    return jax.device_put((self.params, self.rows.astype("int32")), self.mesh.devices.flat[0])

  def first_step(self):
    """(state before the step, the step's other arguments), on the devices."""
    import numpy as np

    from pgolf_jax.training.step import init_state, place_rows

    state = init_state(self.settings, self.mesh, self.params)
    return state, (place_rows(self.mesh, self.rows), np.float32(LR_SCALE), np.float32(MOMENTUM))

  def _side(self, program) -> _Side:
    import jax

    if self.passes != "step":
      arguments = self._micro_batch()
      return _Side(lambda: jax.block_until_ready(program(*arguments)), _planned(program), self._peak)
    first, others = self.first_step()
    state = [first]

    def call():
      state[0], metrics = program(state[0], *others)
      return jax.block_until_ready(metrics)

    return _Side(call, _planned(program), self._peak)

  def torch(self, compiled: bool) -> _Side:
    """The same in PyTorch, on the same kind of device."""
    import torch

    from pgolf_jax.bench._torch_gpt import TorchGPT, TorchStep
    from pgolf_jax.runtime.mesh import world_size

    settings = self.settings
    device = "cuda" if self.mesh.devices.flat[0].platform == "gpu" else "cpu"
    model = TorchGPT(settings.model, self.params, getattr(torch, settings.train.compute_dtype), device)
    loss = torch.compile(model.loss) if compiled else model.loss
    inputs = self.rows[:, :-1].reshape(len(self.rows), -1, self.seq_len)
    last = [*self.rows[:, self.seq_len :: self.seq_len].T]
    rows = torch.tensor([[[*row, end[i]] for row, end in zip(r, last, strict=True)] for i, r in enumerate(inputs)])
    rows = rows.to(device=device, dtype=torch.long)
    ranks = world_size(settings, self.mesh) if settings.optimizer.clip_scope == "rank" else 1
    whole = TorchStep(settings, model, ranks, loss)

    def forward():
      with torch.no_grad():
        return loss(rows[0], self.looping)

    def gradient():
      for value in model.params.values():
        value.grad = None
      found = loss(rows[0], self.looping)
      found.backward()
      return found.detach()

    def step():
      return whole(rows, self.looping, LR_SCALE, MOMENTUM)

    run = {"forward": forward, "gradient": gradient, "step": step}[self.passes]
    if device == "cpu":
      return _Side(run)
    torch.cuda.reset_peak_memory_stats()

    def call():
      found = run()
      torch.cuda.synchronize()
      return found

    return _Side(call, None, torch.cuda.max_memory_allocated)


LR_SCALE, MOMENTUM = 1e-3, 0.95
"""Of the timed steps, which all see the same tokens: small, so that the weights stay where they are."""


@contextlib.contextmanager
def only_xla() -> Iterator[None]:
  """What is traced inside takes plain XLA for every operation that has kernels."""
  from pgolf_jax.kernels import target

  chosen = target.choose
  target.choose = lambda operation, name, obstacles: chosen(operation, name or "xla", obstacles)
  try:
    yield
  finally:
    target.choose = chosen


def _planned(program) -> int | None:
  m = program.memory_analysis()
  if m is None:
    return None
  outputs = m.output_size_in_bytes - m.alias_size_in_bytes
  return m.argument_size_in_bytes + outputs + m.temp_size_in_bytes + m.generated_code_size_in_bytes


def _time(makers: dict[str, Callable[[], _Side]], repeats: int, what: str, notes: list[str]) -> dict[str, tuple]:
  """By side: median seconds, planned bytes, peak bytes, whether the peak is its own.

  The sides are timed in turn, so that a machine that slows down slows all of them.
  """
  sides, peaks, times = {}, {}, {}
  for by, make in makers.items():
    try:
      side = make()
      before = side.peak()
      side.call()
      side.call()
    except Exception as e:
      if not _is_out_of_memory(e):
        raise
      notes.append(f"{what}, {by}: does not fit in memory ({str(e).splitlines()[0][:200]})")
      continue
    after = side.peak()
    sides[by], peaks[by], times[by] = side, (after, after is not None and after > (before or 0)), []
  for _ in range(repeats):
    for by, side in sides.items():
      began = time.perf_counter()
      side.call()
      times[by].append(time.perf_counter() - began)
  return {by: (statistics.median(times[by]), side.planned_bytes, *peaks[by]) for by, side in sides.items()}


def _is_out_of_memory(error: Exception) -> bool:
  return type(error).__name__ == "OutOfMemoryError" or "RESOURCE_EXHAUSTED" in str(error)


def _row(work: _Work, by: str, limits, seconds: float, planned: int | None, peak: int | None, own: bool) -> Row:
  mfu = share = None
  if limits is not None:
    mfu = work.model_flops / limits.flops_per_s / seconds
    share = limits.floor_s(work.flops, work.least_bytes) / seconds
  return Row(work.passes, work.seq_len, work.looping, by, seconds, work.tokens, mfu, share, planned, peak, own)


def _trace(work: _Work, folder: Path) -> str:
  """Writes a trace of three steps; says where."""
  import jax

  program = work.program
  state, others = work.first_step()
  state, metrics = program(state, *others)
  jax.block_until_ready(metrics)
  with jax.profiler.trace(folder):
    for step in range(_TRACED_STEPS):
      with jax.profiler.StepTraceAnnotation("train", step_num=step):
        state, metrics = program(state, *others)
        jax.block_until_ready(metrics)
  looping = "on" if work.looping else "off"
  return f"{folder}: a trace of {_TRACED_STEPS} steps at {work.seq_len}, looping {looping} (xprof --logdir {folder})"


def _read_config(path: Path | None) -> dict[str, StepArgs]:
  return {"arguments": StepArgs(config=path, settings=settings_of(path))}


COMMAND = Defaults(step, _read_config, example="configs/demo.toml", optional=True)
