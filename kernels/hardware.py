"""The hardware that a computation is traced for, and the peak rates of chips."""

import re
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
  """A chip's peak rates, from its maker's data sheet."""

  flops_per_s: float
  """Of dense matrix products of bfloat16 summed in float32; of float32 where the chip has no units for bfloat16."""
  bytes_per_s: float
  """Of its memory."""
  has_bfloat16: bool = True

  def floor_s(self, flops: float, num_bytes: float) -> float:
    """Returns the seconds that any program doing this work takes at least."""
    return max(flops / self.flops_per_s, num_bytes / self.bytes_per_s)


# NVIDIA: the data sheets of T4, L4, A100, H100, H200 and HGX B200; of A10G that of Amazon G5; of the GeForce
# cards the white papers of GA102, AD102 and Blackwell (tensor rates with sums in float32, which are half of those in
# float16 there). TPUs: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e.
_BY_KIND = {
  "T4": Peaks(8.1e12, 0.3e12, has_bfloat16=False),
  "L4": Peaks(121e12, 0.3e12),
  "A10G": Peaks(70e12, 0.6e12),
  "A100": Peaks(312e12, 2.039e12),
  "A100-PCIE-40GB": Peaks(312e12, 1.555e12),
  "A100-SXM4-40GB": Peaks(312e12, 1.555e12),
  "A100 80GB PCIe": Peaks(312e12, 1.935e12),
  "GeForce RTX 3090": Peaks(71e12, 0.936e12),
  "GeForce RTX 4090": Peaks(165.2e12, 1.008e12),
  "GeForce RTX 5090": Peaks(209.5e12, 1.792e12),
  "H100 PCIe": Peaks(756e12, 2.0e12),
  "H100 NVL": Peaks(835e12, 3.9e12),
  "H100": Peaks(989e12, 3.35e12),
  "GH200": Peaks(989e12, 4.0e12),
  "H200 NVL": Peaks(835e12, 4.8e12),
  "H200": Peaks(989e12, 4.8e12),
  "B200": Peaks(2250e12, 8.0e12),
  "TPU v4": Peaks(275e12, 1.2e12),
  "TPU v5 lite": Peaks(197e12, 0.819e12),
  "TPU v5e": Peaks(197e12, 0.819e12),
  "TPU v5p": Peaks(459e12, 2.765e12),
  "TPU v5": Peaks(459e12, 2.765e12),
  "TPU v6 lite": Peaks(918e12, 1.64e12),
  "TPU v6e": Peaks(918e12, 1.64e12),
}
# A card whose name goes on, such as a laptop's or a "Ti", is another card.
_WHOLE = "GeForce"


def peaks(kind: str) -> Peaks | None:
  """Returns the peaks for a `jax.Device.device_kind`, or None for a chip that is not listed, such as any CPU."""
  names = [name for name in _BY_KIND if _names(name, kind)]
  return _BY_KIND[max(names, key=len)] if names else None


def _names(name: str, kind: str) -> bool:
  """Whether a listed name stands in a device's kind as words of their own: L4 does not in L40S."""
  end = r"\Z" if name.startswith(_WHOLE) else r"(?!\w)"
  return re.search(rf"(?<!\w){re.escape(name)}{end}", kind) is not None
