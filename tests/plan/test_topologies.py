"""Topologies that `pgolf plan` offers: each can be had here, with as many devices as its name says."""

import math

import pytest

from pgolf_jax.plan import hardware


@pytest.mark.parametrize("name", hardware._EXAMPLES)
def test_every_topology_that_is_offered_has_a_device_for_each_chip(name):
  """GPUs are lowered for where nothing compiles for them; TPUs are there with libtpu alone."""
  family, _, sizes = name.partition(":")
  if family not in (*hardware.GPUS, "cpu") and not hardware.has_libtpu():
    pytest.skip("libtpu is not installed: nothing can be compiled for TPUs")
  topology = hardware.topology(name)
  assert topology.mesh.size == math.prod(int(n) for n in sizes.split("x") if n)
  assert name == "cpu" or topology.chip.memory > 0


@pytest.mark.parametrize(("name", "chips"), [("v6e:1x1", 1), ("v5e:1x2", 2), ("v5e:2x2", 4), ("v5p:1x1x1", 1)])
def test_topologies_may_be_smaller_than_a_host(name, chips):
  if not hardware.has_libtpu():
    pytest.skip("libtpu is not installed: nothing can be compiled for TPUs")
  assert hardware.topology(name).mesh.size == chips
