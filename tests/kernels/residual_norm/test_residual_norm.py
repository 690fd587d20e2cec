"""Every backend of the residual sum and its norm, forward and gradient, against the formula in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backend_cases import BackendCases, backends_under_test, with_gradient
from hypothesis import strategies as st

from pgolf_jax.kernels import residual_norm
from pgolf_jax.kernels.residual_norm import reference


class Cases(BackendCases):
  operation = residual_norm.OPERATION
  results = ("y", "n", "dx", "d_added", "d_add", "d_keep")
  float32 = ("d_add", "d_keep")
  optional = ("d_keep",)
  differentiated = 4
  static = ("scale",)
  shapes = ((2, 9, 12), (1, 5, 17))
  """B, T and D of each case. In rows of a few elements the sum can cancel, and what bfloat16 loses of it is then more
  than the tolerance, whoever computes it."""

  @classmethod
  def draw(cls, seed, shape, has_keep):
    """Arguments, and cotangents of the results."""
    random = np.random.default_rng(seed)
    size = np.exp(random.standard_normal((*shape[:2], 1)))
    x, added = (jnp.asarray(random.standard_normal(shape) * size, cls.dtype) for _ in range(2))
    add, keep = (jnp.asarray(random.uniform(-2, 2, shape[2]), jnp.float32) for _ in range(2))
    cotangents = tuple(jnp.asarray(random.standard_normal(shape), cls.dtype) for _ in range(2))
    return (x, added, add, keep if has_keep else None), cotangents, {"scale": 0.5}

  @classmethod
  def cases(cls):
    return st.builds(cls.draw, st.integers(0, 2**31), st.sampled_from(cls.shapes), st.booleans())


class TestXla(Cases):
  implementation = "xla"
  examples = 6


class TestXlaFloat32(TestXla):
  dtype = jnp.float32
  tolerance = 1e-5


class TestMosaicGpu(Cases):
  """More tiles than thread blocks, which take different numbers of them, and both widths."""

  implementation = "mosaic_gpu"
  shapes = ((2, 28, 256), (1, 40, 512))
  examples = 3


def test_every_backend_is_tested():
  assert backends_under_test(Cases) | {"reference"} == set(residual_norm.OPERATION.backends)


def test_the_formula_by_hand():
  """3·1 + 1·0 and 2·1 + 2·1 have the mean square 12.5, and the norm is doubled."""
  y, n = reference.residual_norm(
    jnp.array([[1.0, 1.0]]), jnp.array([[0.0, 1.0]]), jnp.array([1.0, 2.0]), jnp.array([3.0, 2.0]), scale=2.0
  )
  np.testing.assert_allclose(y[0], [3, 4])
  np.testing.assert_allclose(n[0], np.array([6, 8]) / np.sqrt(12.5), rtol=1e-6)


def shapes(b, t, d, has_keep, dtype=jnp.bfloat16):
  rows, factor = jax.ShapeDtypeStruct((b, t, d), dtype), jax.ShapeDtypeStruct((d,), jnp.float32)
  return (rows, rows, factor, factor if has_keep else None), (rows, rows)


@pytest.mark.parametrize("has_keep", [False, True])
def test_lowers_for_hopper_with_both_kernels(hopper_kernels, has_keep):
  both = lambda arguments, cotangents: with_gradient(Cases)(arguments, cotangents, scale=1.0)  # noqa: E731
  assert hopper_kernels(both, *shapes(1, 98304, 512, has_keep)) == 2


def test_chooses_xla_on_a_cpu_and_says_why():
  name, reason = residual_norm.OPERATION.choose(*shapes(1, 64, 512, True)[0], scale=1.0)
  assert name == "xla" and "it needs a Hopper GPU" in reason


def test_mosaic_gpu_refuses_what_it_cannot_do(pretend_hopper):
  def insist(t=64, d=512, dtype=jnp.bfloat16):
    arguments, _ = shapes(1, t, d, True, dtype)
    return residual_norm.OPERATION.choose(*arguments, scale=1.0, implementation="mosaic_gpu").name

  with pretend_hopper():
    assert insist() == "mosaic_gpu"
    for options, words in (
      ({"t": 65}, "not 65 of 512"),
      ({"d": 384}, "of 384"),
      ({"dtype": jnp.float32}, "not float32"),
    ):
      with pytest.raises(ValueError, match=words):
        insist(**options)


@pytest.mark.usefixtures("unchecked_shapes")
def test_refuses_with_the_numbers():
  (x, added, add, keep), _, options = Cases.draw(0, (1, 4, 6), True)
  with pytest.raises(ValueError, match=r"alike, not bfloat16 \(1, 4, 6\) and bfloat16 \(1, 3, 6\)"):
    residual_norm.residual_norm(x, added[:, :3], add, keep, **options)
  with pytest.raises(ValueError, match=r"float32 \[6\], not float32 \(5,\)"):
    residual_norm.residual_norm(x, added, add, keep[:5], **options)
