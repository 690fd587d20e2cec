"""The mesh: one axis, `data`, over all devices of all processes, and how host arrays come to lie on it."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pgolf_jax.settings import Settings

AXIS = "data"


def data_mesh(devices: list[jax.Device] | None = None) -> Mesh:
  """A mesh of these devices, or of all devices of all processes, along the axis `data`."""
  return Mesh(np.asarray(devices if devices is not None else jax.devices()), (AXIS,))


def usable_devices(micro_batches: int) -> list[jax.Device]:
  """The devices of a run: in one process the most that can share a step's micro-batches evenly, in several all."""
  devices = jax.devices()
  if jax.process_count() > 1:
    return devices
  return devices[: max(n for n in range(1, len(devices) + 1) if micro_batches % n == 0)]


def world_size(settings: Settings, mesh: Mesh) -> int:
  """The number of ranks that share out the stream: one per device unless the settings say otherwise."""
  return settings.train.world_size or mesh.size


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of what lies whole on every device."""
  return NamedSharding(mesh, P())


def shardings(mesh: Mesh, specs):
  """A tree of PartitionSpecs as NamedShardings."""
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))


def place(mesh: Mesh, x: np.ndarray, spec: P) -> jax.Array:
  """A host array on the mesh; every process holds the whole of it and places its own part."""
  return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])
