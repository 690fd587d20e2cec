"""The training step of a config on the devices that are there, and the way to the first one.

`pgolf bench step` times the step beside plain XLA and PyTorch; `pgolf bench start` times a process as far as its first
step, with an empty and a warm compile cache.
"""

import dataclasses
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pgolf_jax import kernels
from pgolf_jax.bench import harness
from pgolf_jax.bench.harness import Measurement, Way, Work
from pgolf_jax.bench.kernels import segment_starts
from pgolf_jax.bench.pytorch import torch_gpt_on
from pgolf_jax.data.folder import ensure_prepared
from pgolf_jax.errors import UserError
from pgolf_jax.kernels.hardware import peaks
from pgolf_jax.model import flops
from pgolf_jax.model import params as parameters
from pgolf_jax.model.gpt import bind, packed_nll
from pgolf_jax.plan import memory
from pgolf_jax.run_folder import RunFolder
from pgolf_jax.runtime import distributed
from pgolf_jax.runtime.distributed import data_mesh, replicated, usable_devices
from pgolf_jax.runtime.jax_setup import options_of_a_step
from pgolf_jax.settings import Settings, check
from pgolf_jax.settings.arguments import Overrides, Positional, with_config
from pgolf_jax.settings.load import load
from pgolf_jax.training import Schedule
from pgolf_jax.training.loop import Trainer
from pgolf_jax.training.step import StepInputs, TrainState, TrainStep, chosen

Pass = Literal["forward", "gradient", "step"]


@dataclasses.dataclass(frozen=True)
class StepArgs:
  """What `pgolf bench step` times; its options say what each of these is."""

  passes: tuple[Pass, ...] = ("step",)
  looping: Literal["off", "on", "both"] = "both"
  repeats: int = 10
  torch: Literal["eager", "compiled", "none"] = "eager"
  profile: Path | None = None
  noise: bool = False
  settings: Settings = dataclasses.field(default_factory=Settings)


def step(
  config: Positional[Path | None] = None,
  passes: tuple[Pass, ...] = ("step",),
  looping: Literal["off", "on", "both"] = "both",
  repeats: int = 10,
  torch: Literal["eager", "compiled", "none"] = "eager",
  profile: Path | None = None,
  noise: bool = False,
  settings: Overrides = Settings(),
) -> None:
  """Time the training step of a config, for each sequence length of its schedule, looping off and on.

  What a run would take is compared with plain XLA, where a run takes kernels, and with PyTorch, where it is installed
  and there is one device. Tokens are random; each document is as long as a segment may be, the most work that a step
  can have.

  Example: pgolf bench step configs/record_1xgpu.toml --repeats 20 --profile traces

  On a CPU: pgolf bench step --train.compute-dtype float32 --train.batch-tokens 4096 --train.micro-batches 1
            --train.seq-schedule 1024@1.0 --looping on --passes forward gradient step --repeats 5

  Args:
    config: TOML file of settings; the record's settings if not given.
    passes: the whole step, or loss alone and loss with gradient of one micro-batch on one device.
    looping: which of the model's two forms to time.
    repeats: timed turns, after two that are not counted; the median is printed.
    torch: how PyTorch runs: operation by operation, through torch.compile, or not at all.
    profile: folder for an xprof trace of three steps of the last shape.
    noise: time the first way twice, to show which differences mean nothing.
  """
  del config  # it has given the settings
  # PyTorch has a memory pool of its own beside JAX's, which would else take three quarters of a GPU at once.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  distributed.start()
  columns = {
    **harness.MILLISECONDS,
    **harness.rate("tokens"),
    **harness.ROOFLINE,
    "planned GiB": lambda m: harness.figure(m.facts, 2**30),
    **harness.PEAK,
    **harness.COMPARISON,
  }
  measurements, notes = measure(StepArgs(passes, looping, repeats, torch, profile, noise, settings))
  harness.show("training step", measurements, columns, notes)


def measure(arguments: StepArgs) -> tuple[list[Measurement], list[str]]:
  """Returns the table's rows, and notes on what they mean and on what was left out.

  Raises:
    UserError: the settings do not fit the devices that are there.
  """
  if arguments.profile and "step" not in arguments.passes:
    raise UserError("--profile traces the whole step, which is not among --passes.")
  settings, t = arguments.settings, arguments.settings.train
  mesh = data_mesh(usable_devices(t.micro_batches))
  check.check(settings, device_count=mesh.size)
  device = mesh.devices.flat[0]
  taken = chosen(settings)
  notes = [
    f"{mesh.size} × {device.device_kind}, jax {jax.__version__}, {t.compute_dtype}: steps of {t.batch_tokens:,} tokens,"
    f" micro-batches of {t.batch_tokens // t.micro_batches:,}; medians of {arguments.repeats}",
    harness.describe_peaks(device.device_kind),
    "MFU counts the model's products, 3 × 2 × tokens × (positions × (matrices + D·(segment + 1)) + V·D), a third of it "
    "for `forward`; the roofline counts Muon's products and the bytes of state too",
    *(f"{operation}: {choice}" for operation, choice in taken.items()),
  ]
  backends = ("kernels", "xla") if any(not choice.startswith("xla ") for choice in taken.values()) else ("xla",)
  pytorch, obstacle = torch_gpt_on(device.platform) if arguments.torch != "none" else (None, "")
  if pytorch is not None and mesh.size > 1:
    pytorch, obstacle = None, f"its step is for one device, not {mesh.size}"
  if pytorch is not None and (names := pytorch.not_written(settings)):
    pytorch, obstacle = None, f"its step has no {', '.join(names)}"
  notes += [f"PyTorch was left out: {obstacle}"] if obstacle else []
  lengths = list(dict.fromkeys(seq_len for seq_len, _ in Schedule(settings).shapes()))
  looping = arguments.looping if settings.model.num_loops else "off"
  modes = {"off": [False], "on": [True], "both": [False, True]}[looping]
  params, measurements = first_params(settings), []
  for passes in arguments.passes:
    for seq_len in lengths:
      for looping in modes:
        case = Case(settings, mesh, params, passes, seq_len, looping)
        ways = [case.jax_way(backend) for backend in backends]
        if pytorch is not None:
          ways.append(pytorch.way(case, compiled=arguments.torch == "compiled"))
        rows, left_out = harness.measure(ways, arguments.repeats, warmups=2, noise=arguments.noise)
        measurements += rows
        notes += left_out
        if arguments.profile and (passes, seq_len, looping) == ("step", lengths[-1], modes[-1]):
          notes.append(case.trace(arguments.profile, backends[0]))
  return measurements, notes


def first_params(settings: Settings) -> dict[str, np.ndarray]:
  """Weights to time with.

  Matrices that training starts at zero are drawn at random: else half of the backward pass would be trivial.
  """
  random = np.random.default_rng(0)
  first = jax.device_get(jax.jit(lambda key: parameters.init(settings.model, key))(jax.random.key(settings.seed)))
  return {k: v if v.any() else random.normal(scale=0.02, size=v.shape).astype(v.dtype) for k, v in first.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
  """One pass at one shape, on random tokens.

  Attributes:
    passes: the whole step on the mesh, or one micro-batch on its first device.
    documents: lengths of the documents that fill a micro-batch; each fills a segment if not given.
    lr_scale, momentum: of all steps. They all see the same tokens: the scale is small, so that the weights stay.
  """

  settings: Settings
  mesh: Mesh
  params: dict[str, np.ndarray]
  passes: Pass
  seq_len: int
  looping: bool
  documents: tuple[int, ...] | None = None
  lr_scale: float = 1e-3
  momentum: float = 0.95

  @property
  def device(self) -> jax.Device:
    return self.mesh.devices.flat[0]

  @functools.cached_property
  def tokens_MxT1(self) -> np.ndarray:
    """One micro-batch, or all of a step."""
    t, m = self.settings.train, self.settings.model
    shape = (t.micro_batches if self.passes == "step" else 1, t.batch_tokens // t.micro_batches + 1)
    tokens = np.random.default_rng(0).integers(0, m.vocab_size - 1, shape, np.uint16)
    tokens += tokens >= m.bos_id
    begins = np.cumsum((0, *(self.documents or (self.seq_len,) * (shape[1] // self.seq_len))))
    tokens[:, begins[begins < shape[1]]] = m.bos_id
    return tokens

  @functools.cached_property
  def segments(self) -> tuple[int, ...]:
    """Lengths of a micro-batch's segments."""
    start_T = segment_starts(self.tokens_MxT1.shape[1] - 1, self.seq_len, self.documents or (self.seq_len,))
    return tuple(np.unique(start_T, return_counts=True)[1].tolist())

  @functools.cached_property
  def work(self) -> Work:
    """Tokens of all devices; operations and bytes of one."""
    targets = self.tokens_MxT1[:, 1:].size
    devices = self.mesh.size if self.passes == "step" else 1
    # The length of equal segments in which a query sees as many keys.
    even = sum(n * n for n in self.segments) / sum(self.segments)
    forward = flops.forward(self.settings.model, targets // devices, even, looping=self.looping)
    products = model_flops = forward if self.passes == "forward" else 3 * forward
    if self.passes == "step":
      products = flops.train_step(self.settings, devices, even, looping=self.looping)
    # A step reads and writes parameters, their average, and Adam's two moments or Muon's one.
    times = {"forward": 1, "gradient": 2, "step": 6}[self.passes]
    num_bytes = times * sum(x.nbytes for x in self.params.values())
    return Work(targets, "tokens", products, num_bytes, model_flops, peaks(self.device.device_kind))

  def labels(self, by: str) -> dict[str, str]:
    return {"pass": self.passes, "segments": str(self.seq_len), "looping": "on" if self.looping else "off", "by": by}

  def jax_way(self, backend: str, options: Mapping[str, Any] = MappingProxyType({})) -> Way:
    """A compiled program: plain XLA for "xla", for "kernels" what a run takes. Its facts are its planned bytes.

    Args:
      options: of XLA's compiler.
    """
    given = tuple(options.items())
    return Way(
      self.labels(backend),
      functools.partial(self.start, backend, given),
      self.work,
      count_memory=functools.partial(harness.device_memory, self.device),
      inspect=lambda _: sum(memory(self.compiled(backend, given)).values()),
    )

  @functools.lru_cache(maxsize=2)  # noqa: B019
  def compiled(self, backend: str, options: tuple[tuple[str, Any], ...] = ()) -> jax.stages.Compiled:
    settings, shape = self.settings, {"seq_len": self.seq_len, "looping": self.looping}
    given = options_of_a_step(self.device.platform) | dict(options)
    with kernels.prefer(*["xla"] * (backend == "xla")):
      if self.passes == "step":
        return TrainStep(settings, self.mesh).lower(**shape).compile(given)
      dtype = jnp.dtype(settings.train.compute_dtype)
      loss = lambda p, rows: packed_nll(bind(settings.model, p), rows, dtype=dtype, **shape).mean()  # noqa: E731
      f = jax.jit(loss if self.passes == "forward" else jax.value_and_grad(loss))
      return f.lower(*self._micro_batch()).compile(given)

  def _micro_batch(self):
    return jax.device_put((self.params, self.tokens_MxT1.astype(np.int32)), self.device)

  def first_step(self) -> tuple[TrainState, StepInputs]:
    """The arguments of the first step, on the devices."""
    step = TrainStep(self.settings, self.mesh)
    return step.init(self.params), step.inputs(self.tokens_MxT1, self.lr_scale, self.momentum)

  def update(self) -> Callable[[], Any]:
    """Places a state and random gradients; returns a function that does what follows the gradients of a step."""
    step = TrainStep(self.settings, self.mesh)
    state, inputs = self.first_step()
    grads = {name: np.random.default_rng(0).normal(scale=0.01, size=x.shape) for name, x in self.params.items()}
    grads = jax.device_put({name: x.astype(np.float32) for name, x in grads.items()}, replicated(self.mesh))
    update = jax.shard_map(
      step.update, mesh=self.mesh, in_specs=(step.specs, P(), P()), out_specs=step.specs, check_vma=False
    )
    program = jax.jit(update, donate_argnums=0)
    # The rows of a step have no part in it.
    inputs = inputs._replace(tokens_BxT1=np.zeros((), np.uint16))

    def run():
      nonlocal state
      state = program(state, grads, inputs)
      return state.params

    return run

  def start(self, backend: str, options: tuple[tuple[str, Any], ...] = ()) -> Callable[[], Any]:
    """Places the arguments; returns a function that runs the program once, from the state the last run left."""
    program = self.compiled(backend, options)
    if self.passes != "step":
      return functools.partial(program, *self._micro_batch())
    state, inputs = self.first_step()

    def run():
      nonlocal state
      state, metrics = program(state, inputs)
      return metrics

    return run

  def trace(self, folder: Path, backend: str) -> str:
    """Writes a trace of three steps; returns a note that says where."""
    run = self.start(backend)
    jax.block_until_ready(run())
    with jax.profiler.trace(folder):
      for i in range(3):
        with jax.profiler.StepTraceAnnotation("train", step_num=i):
          jax.block_until_ready(run())
    return f"{folder}: a trace of three steps at {self.seq_len} (xprof --logdir {folder})"


COMMAND = with_config(step, optional=True)


def start(config: Positional[Path], repeats: int = 5) -> None:
  """Time a process as far as its first training step, with an empty compile cache and with a full one.

  Example: pgolf bench start configs/demo.toml

  Args:
    config: TOML file of settings.
    repeats: starts of either kind, after one of each that does not count.
  """
  distributed.leave_devices()
  with tempfile.TemporaryDirectory() as folder:
    ways = [
      Way({"compile cache": "empty"}, lambda: lambda: _start(config, Path(tempfile.mkdtemp(dir=folder)))),
      Way({"compile cache": "warm"}, lambda: lambda: _start(config, Path(folder, "warm"))),
    ]
    measurements, _ = harness.measure(ways, repeats)
  harness.show(f"start, {config}", measurements, {**harness.SECONDS, **harness.CORES, **harness.COMPARISON})


def _start(config: Path, cache: Path) -> None:
  environ = os.environ | {
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
  program = f"from pgolf_jax.bench import step; step.train_one_step({str(config)!r})"
  subprocess.run([sys.executable, "-c", program], env=environ, check=True, capture_output=True)


def train_one_step(config: str) -> None:
  """Trains for one step in a run folder that is then deleted."""
  settings = load(config)
  settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, stop_step=1))
  distributed.start()
  with tempfile.TemporaryDirectory() as folder:
    Trainer(RunFolder(folder, settings), data_mesh(), ensure_prepared(settings)).train()


START = start
