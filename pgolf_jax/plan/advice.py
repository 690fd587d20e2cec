"""Whether the hardware that is here can do a config: one sentence before a run, with the config to take instead."""

from typing import NamedTuple

from jax.sharding import Mesh

from pgolf_jax.kernels.hardware import peaks
from pgolf_jax.model import flops
from pgolf_jax.plan import estimate
from pgolf_jax.plan.hardware import CHIPS, GIB
from pgolf_jax.runtime.memory import cores
from pgolf_jax.settings import Settings
from pgolf_jax.training import Schedule
from pgolf_jax.training.step import TrainStep

_CORE_FLOPS_PER_S = 40e9  # what a CPU core was seen to do in training steps (docs/log.md), rounded
_LONG_STEP = 60.0  # seconds
_GB = 10**9


class Device(NamedTuple):
  """What is known of a kind of device.

  Attributes:
    platform: JAX's name: cpu, gpu, tpu.
    memory: bytes; None where nothing says.
    count: devices of a run.
  """

  platform: str
  kind: str
  memory: int | None
  count: int

  @classmethod
  def of(cls, mesh: Mesh) -> "Device":
    """Returns the kind of a mesh's devices."""
    first = mesh.local_devices[0]  # another process's says nothing of its memory
    chip = CHIPS.get(first.device_kind)
    memory = chip.memory if chip else (first.memory_stats() or {}).get("bytes_limit")
    return cls(first.platform, first.device_kind, memory, mesh.size)


def warning(settings: Settings, mesh: Mesh) -> str | None:
  """Returns why these devices will not do this run well, and the config that they would; None if they may."""
  device = Device.of(mesh)
  instead = f"take `pgolf run {fitting(device)}` instead"
  if device.platform == "cpu":
    return _slow(settings, mesh, instead)
  limits = peaks(device.kind)
  if limits is not None and not limits.has_bfloat16 and settings.train.compute_dtype == "bfloat16":
    return (
      f"{device.kind} has no units for bfloat16, so that every product is converted to float32 first; "
      f"{instead}, or set train.compute_dtype=float32."
    )
  if device.memory is None:
    return None
  least = estimate.scaled(_step_bytes(settings, mesh), device.platform)[0]
  if least <= device.memory:
    return None
  return (
    f"A training step takes {least / GIB:.0f} GiB of memory or more, but {device.kind} has "
    f"{device.memory / GIB:.0f}: {instead}, or raise train.micro_batches, which makes the rows shorter."
  )


def _slow(settings: Settings, mesh: Mesh, instead: str) -> str | None:
  """The warning where a step takes minutes on this machine's cores."""
  seq_len, looping = Schedule(settings).shapes()[-1]
  work = mesh.size * flops.train_step(settings, mesh.size, seq_len, looping=looping)
  seconds = work / (_CORE_FLOPS_PER_S * cores())
  if seconds < _LONG_STEP:
    return None
  took = f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.0f} hours"
  return (
    f"One training step of this config is {work / 1e12:.0f} TFLOP, about {took} on the {cores()} CPU cores here: "
    f"{instead}."
  )


def _step_bytes(settings: Settings, mesh: Mesh) -> int:
  traced = TrainStep(settings, mesh).trace(*Schedule(settings).shapes()[-1])
  return sum(estimate.memory(traced).values())


def fitting(device: Device) -> str:
  """Returns the name of the built-in config for such hardware."""
  if device.platform == "cpu":
    return "demo"
  if device.platform == "tpu":
    return "v5e_8" if device.count >= 8 else "v5e_1"
  limits = peaks(device.kind)
  memory = device.memory or 0
  if memory < 20 * _GB or (limits is not None and not limits.has_bfloat16):
    return "gpu_16gb"
  if memory < 60 * _GB:
    return "gpu_24gb"
  return "record_8xh100" if device.count >= 8 else "record_1xgpu"
