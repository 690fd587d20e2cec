"""NVIDIA GPUs that programs can be compiled for without one: by name, what XLA's compiler asks of each."""

import dataclasses

_GB = 10**9


@dataclasses.dataclass(frozen=True)
class Gpu:
  """A card; its matrix rate and memory bandwidth are in kernels/hardware.py.

  Attributes:
    kind: the `device_kind` under which JAX reports it.
    capability: compute capability, such as (8, 9).
    cores: multiprocessors.
    clock_ghz: boost clock.
    memory: bytes; makers count in powers of ten.
    cache: bytes of the L2 cache.
    link: bytes/s that one card can send to the others: half of NVLink's rate, or one direction of its PCIe slot.
  """

  kind: str
  capability: tuple[int, int]
  cores: int
  clock_ghz: float
  memory: int
  cache: int
  link: float


# NVIDIA's data sheets of T4, L4, A100, H100, H200 and HGX B200; Amazon's page on G5 for A10G; the white papers
# of GA102, AD102 and Blackwell for GeForce cards. B200: 180 of 192 GB can be used.
GPUS = {
  "t4": Gpu("Tesla T4", (7, 5), 40, 1.59, 16 * _GB, 4 << 20, 15.75e9),
  "l4": Gpu("NVIDIA L4", (8, 9), 58, 2.04, 24 * _GB, 48 << 20, 31.5e9),
  "a10g": Gpu("NVIDIA A10G", (8, 6), 80, 1.71, 24 * _GB, 6 << 20, 31.5e9),
  "a100-40": Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 108, 1.41, 40 * _GB, 40 << 20, 300e9),
  "a100-80": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 80 * _GB, 40 << 20, 300e9),
  "rtx3090": Gpu("NVIDIA GeForce RTX 3090", (8, 6), 82, 1.695, 24 * _GB, 6 << 20, 31.5e9),
  "rtx4090": Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 2.52, 24 * _GB, 72 << 20, 31.5e9),
  "rtx5090": Gpu("NVIDIA GeForce RTX 5090", (12, 0), 170, 2.407, 32 * _GB, 96 << 20, 63e9),
  "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 80 * _GB, 50 << 20, 450e9),
  "h200": Gpu("NVIDIA H200", (9, 0), 132, 1.98, 141 * _GB, 50 << 20, 450e9),
  "b200": Gpu("NVIDIA B200", (10, 0), 148, 1.965, 180 * _GB, 126 << 20, 900e9),
}
"""Name of a topology, without the number of cards → card."""


@dataclasses.dataclass(frozen=True)
class _Limits:
  """Of one multiprocessor: float32 units, threads, bytes of shared memory, and those that one thread block may have."""

  units: int
  threads: int
  shared: int
  shared_of_block: int


# The table of technical specifications in the CUDA C++ Programming Guide.
_LIMITS = {
  (7, 5): _Limits(64, 1024, 65_536, 65_536),
  (8, 0): _Limits(64, 2048, 167_936, 166_912),
  (8, 6): _Limits(128, 1536, 102_400, 101_376),
  (8, 9): _Limits(128, 1536, 102_400, 101_376),
  (9, 0): _Limits(128, 2048, 233_472, 232_448),
  (10, 0): _Limits(128, 2048, 233_472, 232_448),
  (12, 0): _Limits(128, 1536, 102_400, 101_376),
}


def target_config(gpu: Gpu, bytes_per_s: float) -> str:
  """Returns a card's properties as the text of XLA's GpuTargetConfig message, from which it compiles.

  Args:
    bytes_per_s: of its memory.
  """
  limits, (major, minor) = _LIMITS[gpu.capability], gpu.capability
  return f"""
platform_name: "CUDA"
device_description_str: "{gpu.kind}"
dnn_version_info {{ major: 9 minor: 10 }}
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {gpu.cores}
  fpus_per_core: {limits.units}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory}
  memory_bandwidth: {int(bytes_per_s)}
  l2_cache_size: {gpu.cache}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: {limits.threads}
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {limits.shared_of_block}
  shared_memory_per_core: {limits.shared}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
"""
