"""Hardware that need not be there: a mesh to lower programs for, and what its chips hold and exchange."""

import dataclasses
import difflib
import os
import re

from pgolf_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a kind of device holds and sends; its matrix rate and memory bandwidth are in kernels/peaks.py."""

  memory: int  # bytes a device
  link: float  # bytes/s that a device can send to the others


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
_EXAMPLES = ("h100:1", "h100:8", "v4:2x2x2", "v5e:2x4", "v5p:2x2x1", "v6e:2x4")
# libtpu looks for a TPU's surroundings when it is loaded; there are none, and other processes may load it as well.
_LIBTPU = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_MIN_LOG_LEVEL": "3",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices along the axis `data`.

  Attributes:
    mesh: a `jax.sharding.Mesh` of described devices, or an `AbstractMesh` where nothing here can compile for them.
    platform: JAX's name of it for lowering.
    kind: the devices' `device_kind`.
    only_lowers: why programs are lowered and not compiled, or None.
  """

  name: str
  mesh: object
  platform: str
  kind: str
  only_lowers: str | None = None

  @property
  def chip(self) -> Chip | None:
    return CHIPS.get(self.kind)


def topology(name: str) -> Topology:
  """The devices of that name, such as `v5e:2x4` or `h100:8`.

  Raises:
    UserError: there is no such topology, or libtpu, which describes TPUs, is not installed.
  """
  if found := re.fullmatch(r"h100:(\d+)", name.lower()):
    return _h100(int(found[1]), name)
  if not re.fullmatch(r"(v\d\w*|tpu7x):\d+(x\d+){1,2}", name.lower()):
    near = difflib.get_close_matches(name, _EXAMPLES, n=1)
    raise UserError(f"Unknown topology {name!r}; {f'did you mean {near[0]}' if near else f'try {_EXAMPLES[3]}'}?")
  return _tpu(name.lower())


def has_libtpu() -> bool:
  """Whether programs can be compiled for TPUs here."""
  import importlib.util

  return importlib.util.find_spec("libtpu") is not None


def _h100(count: int, name: str) -> Topology:
  from jax.sharding import AbstractDevice, AbstractMesh

  if count < 1:
    raise UserError("A topology needs at least one device, as in h100:1.")
  device = AbstractDevice(device_kind=_H100, num_cores=132, platform="gpu")
  mesh = AbstractMesh((count,), ("data",), abstract_device=device)
  return Topology(name, mesh, "cuda", _H100, only_lowers="nothing here compiles for H100s: lowered for CUDA only")


def _tpu(name: str) -> Topology:
  if not has_libtpu():
    raise UserError(f"Compiling for {name} needs libtpu, which is not installed: pip install 'pgolf_jax[tpu]'.")
  for variable, value in _LIBTPU.items():
    os.environ.setdefault(variable, value)
  import numpy as np
  from jax.experimental import topologies
  from jax.sharding import Mesh

  try:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
  except Exception as e:
    raise UserError(f"libtpu does not know the topology {name}: {str(e).splitlines()[0]}") from e
  return Topology(name, Mesh(np.asarray(devices), ("data",)), "tpu", devices[0].device_kind)
