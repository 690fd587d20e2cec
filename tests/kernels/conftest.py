"""Kernels without their hardware: run in an interpreter on the CPU, or lowered for the hardware."""

import contextlib
import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

from pgolf_jax.kernels import hopper
from pgolf_jax.kernels.leaky_relu2_mlp import mosaic_gpu as mlp
from pgolf_jax.plan import hardware


def _described(kind: str, cores: int, platform: str):
  """A context in which traces take a device that is not there for their target."""
  device = AbstractDevice(device_kind=kind, num_cores=cores, platform=platform)
  return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def _pretend_hopper(cores: int = 132):
  return _described("NVIDIA H100 80GB HBM3", cores, "gpu")


def _pretend_tpu():
  return _described("TPU v5 lite", 1, "tpu")


_RECENT = hasattr(plgpu, "force_gpu_interpret_mode")
"""Whether Pallas' GPU interpreter is public, as from JAX 0.11 on. It looks for races, transposes operands, and has
clusters."""


def _gpu_interpreter():
  if _RECENT:
    return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True))
  from jax._src.pallas.mosaic_gpu.interpret import params  # a private place, which only JAX 0.10 has

  return params.force_gpu_interpret_mode(params.InterpretGPUParams())


def _is_reference(x) -> bool:
  return hasattr(x, "transforms") or "Ref" in type(jax.typeof(x)).__name__


def _is_transposed(x) -> bool:
  transforms = getattr(x, "transforms", ())
  return bool(transforms) and type(transforms[-1]).__name__ == "TransposeTransform"


_wgmma = plgpu.wgmma


def _staged_wgmma(sums, a, b):
  """Multiplies as wgmma does, with operands copied to shared memory where the interpreter can read them only there.

  These are operands in registers and, for the interpreter of JAX 0.10, transposed operands.
  """
  operands, values = [a, b], {}
  if not _is_reference(a):
    values[0] = a
  if _is_transposed(b) and not _RECENT:
    values[1] = dataclasses.replace(b, transforms=b.transforms[:-1])[...].T
  if not values:
    return _wgmma(sums, a, b)

  def multiply(*staged):
    for (i, value), smem in zip(values.items(), staged, strict=True):
      smem[...] = value
      operands[i] = smem
    plgpu.commit_smem()
    _wgmma(sums, *operands)

  return pl.run_scoped(multiply, *(plgpu.SMEM(value.shape, value.dtype) for value in values.values()))


def _run_state(f):
  """Does what pl.run_state does for an f that only adds products to its accumulators."""

  def run(sums):
    def scoped(*accs):
      f(accs)
      return tuple(acc[...] for acc in accs)

    added = pl.run_scoped(scoped, *(plgpu.ACC(x.shape, x.dtype) for x in sums))
    return jax.tree.map(jnp.add, sums, added)

  return run


@contextlib.contextmanager
def _interpreted_mosaic_gpu(cores: int = 132):
  """Runs kernels that are traced inside in Pallas' Mosaic GPU interpreter, as if for a GPU of so many multiprocessors.

  What the interpreter lacks is replaced by its equal: layouts are dropped, operands in registers are copied to
  shared memory, and accumulators that start from a value start from zero and have the value added. Where it has no
  clusters, blocks work alone.
  """
  with contextlib.ExitStack() as stack:
    for module, name, substitute in (
      (plgpu, "layout_cast", lambda x, _: x),
      (hopper, "load", lambda ref, _: ref[...]),
      (plgpu, "broadcasted_iota", lambda dtype, shape, axis, layout: jax.lax.broadcasted_iota(dtype, shape, axis)),
      (plgpu, "wgmma", _staged_wgmma),
      (plgpu, "wgmma_accumulator_load", lambda acc, *, wait_n: acc[...]),
      (pl, "run_state", _run_state),
      (plgpu.ACC, "init", staticmethod(lambda x: x)),
    ):
      stack.enter_context(mock.patch.object(module, name, substitute))
    if not _RECENT:
      stack.enter_context(mock.patch.object(mlp, "_CLUSTER", 1))
    stack.enter_context(_gpu_interpreter())
    stack.enter_context(_pretend_hopper(cores))
    yield


@contextlib.contextmanager
def _interpreted_mosaic_tpu():
  """Runs kernels that are traced inside in Pallas' Mosaic TPU interpreter, where memory is NaN until it is written."""
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")), _pretend_tpu():
    yield


_INTERPRETERS = {
  "xla": contextlib.nullcontext,
  "mosaic_gpu": _interpreted_mosaic_gpu,
  "mosaic_tpu": _interpreted_mosaic_tpu,
}


@pytest.fixture(scope="class")
def run(request):
  """run(f, static)(…): f, jitted once, with the kernels of the test class's `implementation` interpreted."""
  interpreter = _INTERPRETERS[request.cls.implementation]

  def compiled(f, static=()):
    jitted = jax.jit(f, static_argnames=static)

    def call(*arguments, **options):
      with interpreter():
        # The interpreter's callbacks compute with JAX: other work dispatched beside them can deadlock.
        return jax.block_until_ready(jitted(*arguments, **options))

    return call

  return compiled


@pytest.fixture
def hopper_kernels():
  """hopper_kernels(f, *arguments) → how many Mosaic GPU kernels f holds when lowered for CUDA and an H100."""

  def count(f, *arguments) -> int:
    with _pretend_hopper():
      lowered = jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.as_text().count("stablehlo.custom_call @mosaic_gpu")

  return count


@pytest.fixture
def tpu_kernels():
  """tpu_kernels(f, *shapes) → how many Mosaic TPU kernels f holds when compiled for a TPU v5e."""
  if not hardware.has_libtpu():
    pytest.skip("libtpu is not installed: nothing can be compiled for TPUs")
  chip = SingleDeviceSharding(hardware.topology("v5e:2x4").mesh.devices.flat[0])

  def count(f, *shapes) -> int:
    on_chip = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=chip) for s in shapes]
    with _pretend_tpu():
      lowered = jax.jit(f).trace(*on_chip).lower(lowering_platforms=("tpu",))
    return lowered.compile().as_text().count('custom_call_target="tpu_custom_call"')

  return count


@pytest.fixture
def interpret_gpu():
  """A context in which Mosaic GPU kernels run in Pallas' interpreter, which looks for races."""
  if not _RECENT:
    pytest.skip("this JAX's interpreter does not look for races")
  return _interpreted_mosaic_gpu


@pytest.fixture
def interpret_tpu():
  """A context in which Mosaic TPU kernels run in Pallas' interpreter."""
  return _interpreted_mosaic_tpu


@pytest.fixture
def pretend_hopper():
  """A context in which traces take an H100 for their target."""
  return _pretend_hopper


@pytest.fixture
def pretend_device():
  """pretend_device(kind, platform): a context in which traces take a device of that kind for their target."""
  return lambda kind, platform: _described(kind, 128, platform)


@pytest.fixture
def pretend_tpu():
  """A context in which traces take a TPU v5e for their target."""
  return _pretend_tpu
