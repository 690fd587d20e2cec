"""For which hardware a computation is being traced, and the choice of an implementation for it."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import jax


class Target(NamedTuple):
  """The hardware that a traced computation will run on."""

  platform: str
  """JAX's platform name: `cpu`, `gpu` or `tpu`."""
  kind: str
  """The maker's name for the chip, such as `NVIDIA H100 80GB HBM3` or `TPU v5 lite`."""
  cores: int
  """Multiprocessors of a GPU, cores of a TPU chip; 1 where JAX does not say."""

  @property
  def is_hopper(self) -> bool:
    return self.platform in ("gpu", "cuda") and any(name in self.kind for name in ("H100", "H200", "GH200", "H800"))

  def hopper_obstacle(self) -> str | None:
    """Why kernels for Hopper GPUs cannot run on this hardware, or None."""
    return None if self.is_hopper else f"it needs a Hopper GPU, not {self.kind} ({self.platform})"


class Choice(NamedTuple):
  """The implementation taken for a call, and why it was this one."""

  name: str
  reason: str


def target() -> Target:
  """The hardware of the current trace.

  In order: the device of an abstract mesh (ahead-of-time compilation for hardware that is not there), the
  device set by `jax.default_device`, the first device of the default backend.
  """
  described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
  if described is not None:
    return Target(described.platform, described.device_kind, described.num_cores or 1)
  device = jax.config.jax_default_device
  if not hasattr(device, "device_kind"):
    device = jax.devices(device)[0]
  return Target(device.platform, device.device_kind, getattr(device, "core_count", 1))


def backend(operation: str, name: str) -> ModuleType:
  """The module of one implementation, imported when it is first taken: Pallas is slow to import where unused."""
  return importlib.import_module(f"pgolf_jax.kernels.{operation}.{name}")


def mosaic_gpu_obstacle(operation: str, *arguments) -> str | None:
  """Why `operation` cannot take its Mosaic GPU kernels here, for these arguments, or None."""
  return target().hopper_obstacle() or backend(operation, "mosaic_gpu").obstacle(*arguments)


def mosaic_tpu_obstacle(operation: str, *arguments) -> str | None:
  """Why `operation` cannot take its Mosaic TPU kernels here, for these arguments, or None."""
  here = target()
  if here.platform != "tpu":
    return f"it needs a TPU, not {here.kind} ({here.platform})"
  return backend(operation, "mosaic_tpu").obstacle(*arguments)


def choose(
  operation: str,
  implementation: str | None,
  obstacles: dict[str, Callable[[], str | None]],
) -> Choice:
  """Takes the implementation asked for, or the first one that is possible.

  Args:
    operation: the operation's name, for the error.
    implementation: a name to insist on, or None to pick.
    obstacles: by implementation name, in order of preference, a function that returns why it cannot be used
      here, or None if it can.

  Raises:
    ValueError: the implementation is unknown, or it was insisted on and is not possible.
  """
  if implementation is not None:
    if implementation not in obstacles:
      raise ValueError(f"{operation} has no {implementation=}; it has {', '.join(obstacles)}")
    if obstacle := obstacles[implementation]():
      raise ValueError(f"{operation}: {implementation=} is not possible: {obstacle}")
    return Choice(implementation, "asked for")
  passed_over = []
  for name, why_not in obstacles.items():
    obstacle = why_not()
    if obstacle is None:
      return Choice(name, "; ".join(passed_over) or "the first choice")
    passed_over.append(f"{name} not possible: {obstacle}")
  raise ValueError(f"{operation}: no implementation is possible: {'; '.join(passed_over)}")
