"""Several devices and several processes on one run: the mesh, how processes find each other, and who speaks for all.

All processes see the same run folder and data folder. Process 0, the leader, alone writes files and logs; Orbax shares
out the writing of checkpoints by itself.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pgolf_jax.errors import UserError, no_device
from pgolf_jax.runtime import jax_setup, log
from pgolf_jax.settings import Settings

AXIS = "data"
"""The one axis of every mesh."""

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start() -> None:
  """Sets XLA's options, joins the other processes of the run and turns on the compile cache.

  Every verb that computes calls it before its first look at a device. Afterwards only the leader prints.

  Raises:
    UserError: JAX finds no device of the kind that it is told to use, or as `initialize`.
  """
  jax_setup.set_xla_options()
  initialize()
  jax_setup.use_compile_cache()
  log.started()
  try:
    several = jax.process_count() > 1
  except (RuntimeError, AssertionError) as error:
    raise UserError(no_device()) from error
  if several and not is_leader():
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def leave_devices() -> None:
  """Makes this process see CPUs alone, so that it takes no GPU or TPU from the processes that it starts.

  These inherit XLA's options through the environment.
  """
  jax_setup.set_xla_options()
  jax.config.update("jax_platforms", "cpu")
  log.started()


def initialize() -> None:
  """Joins the other processes of the run, if there are any.

  Processes are described by `JAX_COORDINATOR_ADDRESS` (host:port), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, or else by
  the cluster that started them, which JAX detects by itself: a SLURM step or an Open MPI job of several tasks, a TPU
  slice of several hosts, a Kubernetes job. Collectives between CPUs go through gloo, JAX's default.

  Raises:
    UserError: only some of the three variables are set, or a number is not one.
  """
  if jax.distributed.is_initialized():
    return
  given = [name for name in _EXPLICIT if os.environ.get(name)]
  if len(given) == len(_EXPLICIT):
    address, count, index = (os.environ[name] for name in _EXPLICIT)
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
      raise UserError(f"JAX_PROCESS_ID={index} must count from 0 to below JAX_NUM_PROCESSES={count}.")
    jax.distributed.initialize(address, int(count), int(index), cluster_detection_method="deactivate")
  elif _is_cluster(os.environ):
    jax.distributed.initialize()
  elif given:
    missing = ", ".join(name for name in _EXPLICIT if name not in given)
    raise UserError(f"{given[0]} is set, but {missing} is not; several processes need all three, one process none.")
  else:
    return
  if not is_leader():
    log.silence()


def _is_cluster(environ) -> bool:
  """Whether a cluster that JAX can detect has started several processes; one process needs no coordinator."""
  if environ.get("SLURM_PROCID") and environ.get("SLURM_STEP_NODELIST"):
    return int(environ.get("SLURM_NTASKS", "1")) > 1
  if environ.get("OMPI_COMM_WORLD_SIZE"):
    return int(environ["OMPI_COMM_WORLD_SIZE"]) > 1
  hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
  if hosts:
    return len(hosts.split(",")) > 1 or "MEGASCALE_COORDINATOR_ADDRESS" in environ
  # An indexed Kubernetes job, as in configs/launch/gke.yaml.
  return "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ


def is_leader() -> bool:
  """Returns whether this is the process that writes files and logs."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Returns once every process has come here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def for_all_hosts(mesh: Mesh) -> NamedSharding | None:
  """Returns the sharding of a program's outputs that every process will read: whole, on all devices.

  It is None, XLA's choice, where there is one process. Gathering an array after the program would compile another
  program, while a clock may be running.
  """
  return NamedSharding(mesh, P()) if jax.process_count() > 1 else None


def leaders(seconds: float, number: int = 0) -> tuple[float, int]:
  """Returns the leader's seconds and the largest number of all, so that every process decides alike, in one exchange.

  With several processes it waits for the steps that were dispatched before; the first call compiles a program.

  Args:
    seconds: of this process's clock.
    number: a small whole number, such as a signal's.
  """
  if jax.process_count() == 1:
    return seconds, number
  each = multihost_utils.process_allgather(np.array([seconds, number], np.float32))
  return float(each[0, 0]), int(each[:, 1].max())


@contextlib.contextmanager
def leader_first(name: str) -> Iterator[None]:
  """The leader does what is in the block before the others begin it, so that they find what it has written."""
  if not is_leader():
    barrier(name)
  try:
    yield
  finally:
    if is_leader():
      barrier(name)


def data_mesh(devices: list[jax.Device] | None = None) -> Mesh:
  """A mesh of these devices, or of all devices of all processes, along the axis `data`.

  Raises:
    UserError: as `jax_setup.check_options`.
  """
  jax_setup.check_options()
  return Mesh(np.asarray(devices if devices is not None else jax.devices()), (AXIS,))


def usable_devices(micro_batches: int) -> list[jax.Device]:
  """The devices of a run: in one process the most that can share a step's micro-batches evenly, in several all."""
  devices = jax.devices()
  if jax.process_count() > 1:
    return devices
  return devices[: max(n for n in range(1, len(devices) + 1) if micro_batches % n == 0)]


def run_mesh(settings: Settings) -> Mesh:
  """Returns the mesh that a run with these settings takes here, and whatever scores its weights again."""
  return data_mesh(usable_devices(settings.train.micro_batches))


def platform(mesh: Mesh | AbstractMesh) -> str:
  """Returns "cpu", "gpu" or "tpu"; the devices of the mesh need not be there."""
  return (mesh.abstract_device if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0]).platform


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
