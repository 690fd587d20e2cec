"""Memory estimated from traces, held against what compilers took."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pgolf_jax.plan import GIB, estimate, hardware, programs
from pgolf_jax.runtime.distributed import AXIS
from pgolf_jax.settings import builtin
from pgolf_jax.settings.load import changed, from_toml

NO_TTT = {"ttt.enabled": False}
RECORD, ONE, DEMO = "record_8xh100", "record_1xgpu", "demo"
PHASE = {"ttt.phase.prefix_docs": 7, "ttt.phase.chunk_tokens": 4096}


def kind_of_tpu(count, kind="TPU v5 lite"):
  return AbstractMesh((count,), (AXIS,), abstract_device=AbstractDevice(device_kind=kind, num_cores=1, platform="tpu"))


# Config, further settings, topology → GiB of a device that each program took, compiled for it (docs/log.md; H100s by
# jax 0.12.0.1, T4 and RTX 4090 by 0.10.2).
COMPILED = [
  (RECORD, NO_TTT, "h100:8", [35.9]),
  ("gpu_16gb", NO_TTT, "t4", [4.63]),
]
SLOW = [
  (RECORD, {}, "h100:8", [35.9, 19.0, 2.6]),
  (ONE, {}, "h100:1", [35.7, 19.2, 18.7]),
  (DEMO, PHASE, "rtx4090", [0.17, 0.29, 0.32]),
  ("gpu_24gb", NO_TTT, "rtx4090", [10.35]),
]
ON_TPUS = [("v5e_8", NO_TTT, kind_of_tpu(8), [7.7]), (RECORD, NO_TTT, kind_of_tpu(4, "TPU v5"), [72.2])]


@pytest.mark.parametrize(
  ("config", "more", "topology", "known"),
  [*COMPILED, *(pytest.param(*case, marks=pytest.mark.slow) for case in [*SLOW, *ON_TPUS])],
)
def test_compilers_took_what_the_estimate_says(config, more, topology, known, monkeypatch):
  monkeypatch.setattr(hardware, "has_cuda", lambda: False)
  mesh = hardware.topology(topology).mesh if isinstance(topology, str) else topology
  settings = changed(from_toml(builtin.find(config)), more)
  platform = mesh.abstract_device.platform
  sizes = [sum(estimate.memory(p.trace()).values()) for p in programs(settings, mesh, every_shape=False)]
  assert len(sizes) == len(known)
  for estimated, taken in zip(sizes, known, strict=True):
    low, high = (size / GIB for size in estimate.scaled(estimated, platform))
    assert low <= taken <= high, f"{taken} GiB were taken, {estimated / GIB:.2f} estimated"


MIB = 2**20
VECTOR = jax.ShapeDtypeStruct((MIB // 4,), jnp.float32)  # a mebibyte


def held(f, *shapes):
  parts = estimate.memory(jax.jit(f).trace(*shapes))
  return parts["arguments"] / MIB, parts["temporaries"] / MIB


def test_what_is_used_later_is_held_and_what_is_fused_is_not():
  assert held(lambda x: jnp.sin(jnp.sin(x)), VECTOR) == (1, 2), "one result beside the one it is computed from"
  assert held(lambda x: jnp.sin(x * 2 + 1), VECTOR) == (1, 1), "a product and a sum are held nowhere"
  assert held(lambda x: jnp.sin(x) * jnp.cos(x) * jnp.tan(x), VECTOR) == (1, 3), "three factors at once"


def test_a_gradient_holds_what_the_forward_pass_keeps_for_it():
  def loss(x):
    for _ in range(8):
      x = jnp.sin(x)
    return x.sum()

  assert held(loss, VECTOR)[1] == 2
  assert 8 <= held(jax.grad(loss), VECTOR)[1] <= 10


def test_a_loop_adds_what_its_body_holds_once():
  def loop(x):
    return jax.lax.scan(lambda c, _: (jnp.sin(jnp.sin(c)), None), x, None, length=100)[0]

  assert 2 <= held(loop, VECTOR)[1] <= 3


def test_shapes_are_those_of_one_device():
  mesh = AbstractMesh((4,), (AXIS,), axis_types=(AxisType.Auto,))
  spec = jax.sharding.PartitionSpec(AXIS)
  f = jax.shard_map(jnp.sin, mesh=mesh, in_specs=spec, out_specs=spec)
  assert held(f, VECTOR) == (0.25, 0.25)
