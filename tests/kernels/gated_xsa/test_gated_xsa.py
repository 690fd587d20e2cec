"""Every backend of XSA and the gate, forward and gradient, against the formula in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backend_cases import BackendCases, backends_under_test, with_gradient
from hypothesis import strategies as st

from pgolf_jax.kernels import gated_xsa
from pgolf_jax.kernels.gated_xsa import reference


class Cases(BackendCases):
  operation = gated_xsa.OPERATION
  results = ("x", "dy", "dv", "d_gate")
  optional = ("d_gate",)
  differentiated = 3
  static = ("scale",)
  shapes = ((2, 9, 4, 2, 12), (1, 5, 3, 1, 8))
  """B, T, H, K and C of each case."""
  gates = st.booleans()

  @classmethod
  def draw(cls, seed, shape, has_gate):
    """Arguments, one position of which has the value zero, and the cotangent of the result."""
    random = np.random.default_rng(seed)
    b, t, h, k, c = shape
    y, dx, v, gate = (
      jnp.asarray(random.standard_normal(s), cls.dtype) for s in ((b, t, h, c), (b, t, h, c), (b, t, k, c), (b, t, h))
    )
    return (y, v.at[0, 1, 0].set(0), gate if has_gate else None), dx, {"scale": 0.7}

  @classmethod
  def cases(cls):
    return st.builds(cls.draw, st.integers(0, 2**31), st.sampled_from(cls.shapes), cls.gates)


class TestXla(Cases):
  implementation = "xla"
  examples = 6


class TestXlaFloat32(TestXla):
  dtype = jnp.float32
  tolerance = 1e-5


class TestMosaicGpu(Cases):
  """Several heads for a value, one, wide heads, and as many as make a row of 256."""

  implementation = "mosaic_gpu"
  shapes = ((2, 12, 8, 4, 64), (1, 16, 4, 4, 128), (1, 8, 4, 1, 64))
  gates = st.just(True)
  examples = 4


def test_every_backend_is_tested():
  assert backends_under_test(Cases) | {"reference"} == set(gated_xsa.OPERATION.backends)


def test_the_formula_by_hand():
  """(3, 4) less its component along (0, 2) is (3, 0), of which the gate of zero lets half through."""
  x = reference.gated_xsa(jnp.array([[[[3.0, 4.0]]]]), jnp.array([[[[0.0, 2.0]]]]), jnp.zeros((1, 1, 1)), scale=0.5)
  np.testing.assert_allclose(x[0, 0, 0], [1.5, 0])


def shapes(t=64, h=8, k=4, c=64, dtype=jnp.bfloat16):
  heads = jax.ShapeDtypeStruct((1, t, h, c), dtype)
  return (heads, jax.ShapeDtypeStruct((1, t, k, c), dtype), jax.ShapeDtypeStruct((1, t, h), dtype)), heads


@pytest.mark.parametrize("heads", [(8, 4, 64), (4, 4, 128), (8, 2, 64)])
def test_lowers_for_hopper_with_both_kernels(hopper_kernels, heads):
  both = lambda arguments, cotangents: with_gradient(Cases)(arguments, cotangents, scale=0.5)  # noqa: E731
  assert hopper_kernels(both, *shapes(98304, *heads)) == 2


def test_chooses_xla_on_a_cpu_and_says_why():
  name, reason = gated_xsa.OPERATION.choose(*shapes()[0], scale=1.0)
  assert name == "xla" and "it needs a Hopper GPU" in reason


def test_mosaic_gpu_refuses_what_it_cannot_do(pretend_hopper):
  def insist(has_gate=True, **sizes):
    (y, v, gate), _ = shapes(**sizes)
    arguments = y, v, gate if has_gate else None
    return gated_xsa.OPERATION.choose(*arguments, scale=1.0, implementation="mosaic_gpu").name

  with pretend_hopper():
    assert insist() == "mosaic_gpu"
    for options, words in (
      ({"has_gate": False}, "needs a gate"),
      ({"t": 65}, "not 65"),
      ({"c": 96}, "not 8 of 96 for 4 values"),
      ({"h": 6, "k": 2}, "not 6 of 64 for 2 values"),
      ({"dtype": jnp.float32}, "not float32"),
    ):
      with pytest.raises(ValueError, match=words):
        insist(**options)


@pytest.mark.usefixtures("unchecked_shapes")
def test_refuses_with_the_numbers():
  (y, v, gate), _, options = Cases.draw(0, (1, 4, 4, 2, 6), True)
  with pytest.raises(ValueError, match=r"do not fit, or H is no multiple of K"):
    gated_xsa.gated_xsa(y[:, :, :3], v, gate[:, :, :3], **options)
  with pytest.raises(ValueError, match=r"must be \(1, 4, 4\), not \(1, 4, 3\)"):
    gated_xsa.gated_xsa(y, v, gate[:, :, :3], **options)
  with pytest.raises(ValueError, match="not bfloat16, float32, bfloat16"):
    gated_xsa.gated_xsa(y, v.astype(jnp.float32), gate, **options)
