"""Descriptions of hardware that need not be there: meshes to compile for, and the memory and links of their chips."""

import dataclasses
import difflib
import importlib.util
import os
import re

import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh

from pgolf_jax.errors import UserError
from pgolf_jax.plan.compiled import SHARED_MEMORY
from pgolf_jax.runtime.distributed import AXIS

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """A kind of device; its matrix rate and memory bandwidth are in kernels/hardware.py.

  Attributes:
    memory: bytes.
    link: bytes/s that one device can send to the others.
  """

  memory: int
  link: float


# TPUs: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e: HBM, and half of the (two-way) interchip bandwidth per chip.
# H100 SXM: NVIDIA H100 data sheet, 80 GB and half of NVLink's 900 GB/s.
CHIPS = {
  "TPU v4": Chip(32 * GIB, 150e9),
  "TPU v5 lite": Chip(16 * GIB, 100e9),
  "TPU v5": Chip(95 * GIB, 300e9),
  "TPU v6 lite": Chip(32 * GIB, 224e9),
  "NVIDIA H100 80GB HBM3": Chip(80 * 10**9, 450e9),
}

_H100 = "NVIDIA H100 80GB HBM3"
# The properties of a GPU that XLA's compiler asks for, as a GpuTargetConfig message. Sizes and limits: NVIDIA H100 data
# sheet (SXM) and the table of compute capability 9.0 in the CUDA C++ Programming Guide.
_H100_TARGET = f"""
platform_name: "CUDA"
device_description_str: "{_H100}"
dnn_version_info {{ major: 9 minor: 10 }}
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: {80 * 10**9}
  memory_bandwidth: 3350000000000
  l2_cache_size: {50 * 2**20}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {SHARED_MEMORY}
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
"""
_GPUS_OF_A_HOST = 8
_EXAMPLES = ("h100:1", "h100:8", "v4:2x2x2", "v5e:2x4", "v5p:2x2x1", "v6e:2x4")
# Without these libtpu would look for a TPU's host when it is loaded, and refuse to be loaded by two processes.
_LIBTPU = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_MIN_LOG_LEVEL": "3",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices of one kind along the axis `data`.

  Attributes:
    mesh: of described devices, or abstract where nothing installed here can compile for them.
    platform: JAX's name for lowering.
    kind: the devices' `device_kind`.
    only_lowers: the reason why programs are only lowered, or None where they are compiled.
  """

  name: str
  mesh: Mesh | AbstractMesh
  platform: str
  kind: str
  only_lowers: str | None = None

  @property
  def chip(self) -> Chip | None:
    """None for a kind of device that is not listed."""
    return CHIPS.get(self.kind)


def topology(name: str) -> Topology:
  """Returns the devices of that name, such as `v5e:2x4` or `h100:8`.

  Without JAX's CUDA plugin programs for H100s are only lowered.

  Raises:
    UserError: there is no such topology, or it is one of TPUs and libtpu is not installed.
  """
  if match := re.fullmatch(r"h100:(\d+)", name.lower()):
    return _h100(int(match[1]), name)
  if not re.fullmatch(r"(v\d\w*|tpu7x):\d+(x\d+){1,2}", name.lower()):
    near = difflib.get_close_matches(name, _EXAMPLES, n=1)
    raise UserError(f"Unknown topology {name!r}; {f'did you mean {near[0]}' if near else f'try {_EXAMPLES[3]}'}?")
  return _tpu(name.lower())


def has_libtpu() -> bool:
  """Whether programs can be compiled for TPUs here."""
  return importlib.util.find_spec("libtpu") is not None


def has_cuda() -> bool:
  """Whether JAX's CUDA plugin is installed, which compiles for NVIDIA GPUs and needs neither a GPU nor a driver."""
  return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def _h100(count: int, name: str) -> Topology:
  if count < 1:
    raise UserError("A topology needs at least one device, as in h100:1.")
  if not has_cuda():
    return _lowered_h100(count, name, "nothing here compiles for H100s: lowered for CUDA only")
  # Without this the plugin would refuse to start where there is no driver whose version it could check.
  os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
  hosts = count // _GPUS_OF_A_HOST if count % _GPUS_OF_A_HOST == 0 else 1
  try:
    devices = topologies.get_topology_desc(
      platform="cuda", topology_name="h100", target_config=_H100_TARGET, topology=f"1x{hosts}x{count // hosts}"
    ).devices
  except Exception as e:
    reason = f"JAX's CUDA plugin does not compile here ({str(e).splitlines()[0]}): lowered for CUDA only"
    return _lowered_h100(count, name, reason)
  return Topology(name, Mesh(np.asarray(devices), (AXIS,)), "cuda", devices[0].device_kind)


def _lowered_h100(count: int, name: str, reason: str) -> Topology:
  device = AbstractDevice(device_kind=_H100, num_cores=132, platform="gpu")
  return Topology(name, AbstractMesh((count,), (AXIS,), abstract_device=device), "cuda", _H100, only_lowers=reason)


def _tpu(name: str) -> Topology:
  if not has_libtpu():
    raise UserError(f"Compiling for {name} needs libtpu, which is not installed: pip install 'pgolf_jax[tpu]'.")
  for variable, value in _LIBTPU.items():
    os.environ.setdefault(variable, value)
  try:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
  except Exception as e:
    raise UserError(f"libtpu does not know the topology {name}: {str(e).splitlines()[0]}") from e
  return Topology(name, Mesh(np.asarray(devices), (AXIS,)), "tpu", devices[0].device_kind)
