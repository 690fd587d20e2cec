"""Each place where releases of JAX differ, and what breaks there without its guard."""

from unittest import mock

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pgolf_jax.kernels import hardware, hopper


def load_0_10(ref, idx, *, layout=None, optimized=True):
  return ref, idx, layout, optimized


def load_0_11(ref, *, layout=None, optimized=True):
  return ref, None, layout, optimized


def load_with_an_optional_index(ref, idx=None, *, layout=None, optimized=True):
  return ref, idx, layout, optimized


@pytest.mark.parametrize(
  ("load", "index"),
  [(load_0_10, ()), (load_0_11, None), (load_with_an_optional_index, None)],
  ids=["0.10", "0.11", "optional"],
)
def test_pallas_load_needs_an_index_in_jax_0_10_and_refuses_one_later(load, index):
  """Without it, all kernels for Hopper GPUs fail with a TypeError when they are traced."""
  with mock.patch.object(plgpu, "load", load):
    assert hopper.load("ref", "layout") == ("ref", index, "layout", False)


def test_a_mesh_without_a_described_device_leaves_the_default_one():
  """`abstract_device` is not on all of JAX's meshes: read plainly, it would be an AttributeError in every operation."""
  with mock.patch.object(jax.sharding, "get_abstract_mesh", lambda: object()):
    assert hardware.target().platform == "cpu"


def test_a_device_that_does_not_say_its_cores_has_one():
  """CPU devices have no `core_count`, nor have TPUs in every release."""

  class Device:
    platform, device_kind = "tpu", "TPU v4"

  with mock.patch.object(jax, "devices", lambda *_: [Device()]):
    assert hardware.target() == hardware.Target("tpu", "TPU v4", 1)
