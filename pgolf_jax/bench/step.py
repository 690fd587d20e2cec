"""`pgolf bench step`: the training step of a config on the devices that are there, beside plain XLA and PyTorch."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro

from pgolf_jax.bench import harness
from pgolf_jax.bench.harness import Measurement
from pgolf_jax.bench.step_ways import Case, Pass
from pgolf_jax.errors import UserError
from pgolf_jax.model import params as parameters
from pgolf_jax.runtime import distributed
from pgolf_jax.runtime.mesh import data_mesh, usable_devices
from pgolf_jax.settings import check
from pgolf_jax.settings.arguments import Defaults, settings_of
from pgolf_jax.settings.config import Settings
from pgolf_jax.training.implementations import chosen
from pgolf_jax.training.schedule import Schedule


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
  """Timed turns, after two that are not counted; the median is printed."""
  torch: Literal["eager", "compiled", "none"] = "eager"
  """How PyTorch runs: operation by operation, through torch.compile, or not at all."""
  profile: Path | None = None
  """Folder for an xprof trace of three steps of the last shape."""
  noise: bool = False
  """Time the first way twice, to show which differences mean nothing."""
  settings: Annotated[Settings, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Settings)


def step(arguments: Annotated[StepArgs, tyro.conf.arg(name="")] = StepArgs()) -> None:
  """Time the training step of a config, for each sequence length of its schedule, looping off and on.

  What a run would take is compared with plain XLA, where a run takes kernels, and with PyTorch, where it is installed
  and there is one device. Tokens are random; each document is as long as a segment may be, the most work that a step
  can have.

  Example: pgolf bench step configs/record_1xgpu.toml --repeats 20 --profile traces

  On a CPU: pgolf bench step --train.compute-dtype float32 --train.batch-tokens 4096 --train.micro-batches 1
            --train.seq-schedule 1024@1.0 --looping on --passes forward gradient step --repeats 5
  """
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
  measurements, notes = measure(arguments)
  harness.show("training step", measurements, columns, notes)


def measure(arguments: StepArgs) -> tuple[list[Measurement], list[str]]:
  """Returns the table's rows, and notes on what they mean and on what was left out.

  Raises:
    UserError: the settings do not fit the devices that are there.
  """
  if arguments.profile is not None and "step" not in arguments.passes:
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
    "MFU: model FLOPs over the time at the peak rate of all devices; model FLOPs are 3 × 2 × tokens × (positions × "
    "(matrices + D·(segment + 1)) + V·D), all as dense products, and a third of that for `forward`. The roofline "
    "counts Muon's products too, and the bytes of state that are read and written.",
    *(f"{operation}: {choice}" for operation, choice in taken.items()),
  ]
  backends = ("kernels", "xla") if any(not choice.startswith("xla ") for choice in taken.values()) else ("xla",)
  pytorch = None
  if arguments.torch != "none":
    pytorch, obstacle = harness.pytorch(device.platform)
    if mesh.size > 1:
      pytorch, obstacle = None, f"its step is for one device, not {mesh.size}"
    notes += [f"PyTorch was left out: {obstacle}"] if obstacle else []
  schedule = Schedule(settings)
  lengths = list(dict.fromkeys(seq_len for seq_len, _ in schedule.shapes()))
  modes = {"off": [False], "on": [True], "both": [False, True]}[arguments.looping]
  if settings.model.num_loops == 0:
    modes = [False]
  params, measurements = first_params(settings), []
  for passes in arguments.passes:
    for seq_len in lengths:
      for looping in modes:
        case = Case(settings, mesh, params, passes, seq_len, looping)
        ways = [case.jax_way(backend) for backend in backends]
        if pytorch is not None:
          ways.append(case.torch_way(pytorch, compiled=arguments.torch == "compiled"))
        rows, left_out = harness.measure(ways, arguments.repeats, warmups=2, noise=arguments.noise)
        measurements += rows
        notes += left_out
        if arguments.profile is not None and (passes, seq_len, looping) == ("step", lengths[-1], modes[-1]):
          notes.append(case.trace(arguments.profile, backends[0]))
  return measurements, notes


def first_params(settings: Settings) -> dict[str, np.ndarray]:
  """Weights to time with.

  Matrices that training starts at zero are drawn at random: else half of the backward pass would be trivial.
  """
  random = np.random.default_rng(0)
  first = jax.device_get(jax.jit(lambda key: parameters.init(settings.model, key))(jax.random.key(settings.seed)))
  return {k: v if v.any() else random.normal(scale=0.02, size=v.shape).astype(v.dtype) for k, v in first.items()}


def _read_config(path: Path | None) -> dict[str, StepArgs]:
  return {"arguments": StepArgs(config=path, settings=settings_of(path))}


COMMAND = Defaults(step, _read_config, example="configs/demo.toml", optional=True)
