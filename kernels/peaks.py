"""What chips can do at most, for floors of time and shares of the roofline."""

from typing import NamedTuple


class Peaks(NamedTuple):
  """A chip's dense bfloat16 matrix rate and memory bandwidth, from its maker's data sheet."""

  flops_per_s: float
  bytes_per_s: float

  def floor_s(self, flops: float, num_bytes: float) -> float:
    """Seconds that no program doing this work can beat."""
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
  """The peaks of a `jax.Device.device_kind`, or None for a chip that is not listed (CPUs among them)."""
  names = [name for name in _BY_KIND if name in kind]
  return _BY_KIND[max(names, key=len)] if names else None
