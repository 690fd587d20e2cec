"""The hardware that a computation is traced for, and the peak rates of chips."""

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
  def is_gpu(self) -> bool:
    return self.platform in ("gpu", "cuda")

  @property
  def is_hopper(self) -> bool:
    return self.is_gpu and any(name in self.kind for name in ("H100", "H200", "GH200", "H800"))


def target() -> Target:
  """Returns the hardware of the current trace.

  The first of: the device of an abstract mesh (ahead-of-time compilation for hardware that is not there), the
  device set by `jax.default_device`, the first device of the default backend.
  """
  described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
  if described is not None:
    return Target(described.platform, described.device_kind, described.num_cores or 1)
  device = jax.config.jax_default_device
  if not hasattr(device, "device_kind"):
    device = jax.devices(device)[0]
  return Target(device.platform, device.device_kind, getattr(device, "core_count", 1))


class Peaks(NamedTuple):
  """A chip's dense bfloat16 matrix rate and memory bandwidth, from its maker's data sheet."""

  flops_per_s: float
  bytes_per_s: float

  def floor_s(self, flops: float, num_bytes: float) -> float:
    """Returns the seconds that any program doing this work takes at least."""
    return max(flops / self.flops_per_s, num_bytes / self.bytes_per_s)


_BY_KIND = {
  "H200": Peaks(989e12, 4.8e12),
  "GH200": Peaks(989e12, 4.0e12),
  "H100 PCIe": Peaks(756e12, 2.0e12),
  "H100": Peaks(989e12, 3.35e12),
  "A100": Peaks(312e12, 2.039e12),
  "TPU v4": Peaks(275e12, 1.2e12),
  "TPU v5 lite": Peaks(197e12, 0.819e12),
  "TPU v5e": Peaks(197e12, 0.819e12),
  "TPU v5p": Peaks(459e12, 2.765e12),
  "TPU v5": Peaks(459e12, 2.765e12),
  "TPU v6 lite": Peaks(918e12, 1.64e12),
  "TPU v6e": Peaks(918e12, 1.64e12),
}


def peaks(kind: str) -> Peaks | None:
  """Returns the peaks for a `jax.Device.device_kind`, or None for a chip that is not listed, such as any CPU."""
  names = [name for name in _BY_KIND if name in kind]
  return _BY_KIND[max(names, key=len)] if names else None
