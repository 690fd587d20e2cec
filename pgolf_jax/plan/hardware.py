"""Descriptions of hardware that need not be there: meshes to compile for, and the memory and links of their chips."""

import dataclasses
import difflib
import importlib.util
import math
import os
import re

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh

from pgolf_jax.errors import UserError
from pgolf_jax.kernels.hardware import peaks
from pgolf_jax.plan.gpus import GPUS, Gpu, target_config
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
CHIPS = {
  "TPU v4": Chip(32 * GIB, 150e9),
  "TPU v5 lite": Chip(16 * GIB, 100e9),
  "TPU v5": Chip(95 * GIB, 300e9),
  "TPU v6 lite": Chip(32 * GIB, 224e9),
  **{gpu.kind: Chip(gpu.memory, gpu.link) for gpu in GPUS.values()},
}

_GPUS_OF_A_HOST = 8
_EXAMPLES = ("cpu", *GPUS, *(f"{name}:8" for name in GPUS), "v4:2x2x2", "v5e:1x1", "v5e:2x4", "v5p:2x2x1", "v6e:2x4")
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
  """Returns the devices of that name, such as `v5e:2x4`, `h100:8` or `rtx4090`, or `cpu` for the machine at hand.

  Without JAX's CUDA plugin programs for NVIDIA GPUs are only lowered.

  Raises:
    UserError: there is no such topology, or it is one of TPUs and libtpu is not installed.
  """
  if name.lower() == "cpu":
    return Topology(name, Mesh(np.asarray(jax.devices("cpu")[:1]), (AXIS,)), "cpu", "cpu")
  gpu, _, count = name.lower().partition(":")
  if gpu in GPUS and re.fullmatch(r"\d*", count):
    return _gpus(GPUS[gpu], int(count or 1), name)
  if not re.fullmatch(r"(v\d\w*|tpu7x):\d+(x\d+){1,2}", name.lower()):
    near = difflib.get_close_matches(name.lower(), _EXAMPLES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(GPUS)}, or TPUs such as v5e:2x4."
    raise UserError(f"Unknown topology {name}; {hint}")
  return _tpu(name.lower())


def has_bfloat16(topology: Topology) -> bool:
  """Whether devices multiply bfloat16 by units of their own; taken for granted of those that are not listed."""
  limits = peaks(topology.kind)
  return limits is None or limits.has_bfloat16


def has_libtpu() -> bool:
  """Whether programs can be compiled for TPUs here."""
  return importlib.util.find_spec("libtpu") is not None


def has_cuda() -> bool:
  """Whether JAX's CUDA plugin is installed, which compiles for NVIDIA GPUs and needs neither a GPU nor a driver."""
  return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def _gpus(gpu: Gpu, count: int, name: str) -> Topology:
  if count < 1:
    raise UserError(f"A topology needs at least one device, as in {name.partition(':')[0]}:1.")
  if not has_cuda():
    return _lowered(gpu, count, name, "nothing here compiles for NVIDIA GPUs: lowered for CUDA only")
  # Without this the plugin would refuse to start where there is no driver whose version it could check.
  os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
  hosts = count // _GPUS_OF_A_HOST if count % _GPUS_OF_A_HOST == 0 else 1
  try:
    devices = topologies.get_topology_desc(
      platform="cuda",
      topology_name=name.partition(":")[0],
      target_config=target_config(gpu, peaks(gpu.kind).bytes_per_s),
      topology=f"1x{hosts}x{count // hosts}",
    ).devices
  except Exception as e:
    reason = f"JAX's CUDA plugin does not compile here ({str(e).splitlines()[0]}): lowered for CUDA only"
    return _lowered(gpu, count, name, reason)
  return Topology(name, Mesh(np.asarray(devices), (AXIS,)), "cuda", devices[0].device_kind)


def _lowered(gpu: Gpu, count: int, name: str, reason: str) -> Topology:
  device = AbstractDevice(device_kind=gpu.kind, num_cores=gpu.cores, platform="gpu")
  return Topology(name, AbstractMesh((count,), (AXIS,), abstract_device=device), "cuda", gpu.kind, only_lowers=reason)


def _tpu(name: str) -> Topology:
  if not has_libtpu():
    raise UserError(f"Compiling for {name} needs libtpu, which is not installed: pip install 'pgolf_jax[tpu]'.")
  for variable, value in _LIBTPU.items():
    os.environ.setdefault(variable, value)
  family, _, sizes = name.partition(":")
  # A host has 2 × 2 chips unless libtpu is told otherwise, and no smaller topology can be made of such hosts.
  options = {"chips_per_host_bounds": [*(math.gcd(2, int(n)) for n in sizes.split("x")[:2]), 1]}
  if family == "v4":
    options["chip_config_name"] = "megacore"  # a chip is one device, as it is where programs run, not one for each core
  try:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
  except Exception as e:
    raise UserError(f"libtpu does not know the topology {name}: {str(e).splitlines()[0]}") from e
  return Topology(name, Mesh(np.asarray(devices), (AXIS,)), "tpu", devices[0].device_kind)
