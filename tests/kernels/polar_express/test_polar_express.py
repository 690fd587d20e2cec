"""The orthogonalisation against its formula in float32, and its bfloat16 roundings one by one."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from backend_cases import BackendCases, backends_under_test
from hypothesis import strategies as st

from pgolf_jax.kernels import polar_express
from pgolf_jax.kernels.polar_express.reference import COEFFICIENTS


def random(seed, shape, dtype):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


class Cases(BackendCases):
  """Wide, tall and square matrices; the result of every number of steps."""

  results = ("one step", "two", "three", "four", "five")
  differentiated = 0
  dtype = jnp.float32
  examples = 10

  @staticmethod
  def operation(u, *, implementation):
    return [polar_express.polar_express(u, steps=steps, implementation=implementation) for steps in range(1, 6)]

  @classmethod
  def cases(cls):
    def case(seed, shape):
      return (random(seed, shape, cls.dtype),), (), {}

    return st.builds(case, st.integers(0, 2**31 - 1), st.sampled_from([(1, 8, 8), (3, 8, 20), (2, 20, 8)]))

  def compare(self, got, want):
    for name, g, w in zip(self.results, got, want, strict=True):
      np.testing.assert_allclose(g, w, atol=2e-4, err_msg=name)


class TestXla(Cases):
  implementation = "xla"


def test_every_backend_is_tested():
  assert backends_under_test(Cases) | {"reference"} == set(polar_express.OPERATION.backends)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(2, 32, 96), (2, 96, 32)])
def test_singular_values_come_near_one(shape, dtype):
  u = random(0, shape, dtype)
  singular = np.linalg.svd(np.asarray(jax.jit(polar_express.polar_express)(u), np.float32), compute_uv=False)
  assert singular.min() > 0.7
  assert singular.max() < 1.3


def rounded_one_by_one(u, steps):
  """The definition in NumPy: every product and every sum is a bfloat16 array."""
  bf16 = ml_dtypes.bfloat16

  def wide(x):
    return x.astype(np.float32)

  def product(x, y):
    return (wide(x) @ wide(y)).astype(bf16)

  x = u if u.shape[0] <= u.shape[1] else u.T
  norm = np.sqrt(np.square(wide(x)).sum()).astype(bf16)
  norm = (wide(norm) + np.float32(1e-7)).astype(bf16)
  x = (wide(x) / wide(norm)).astype(bf16)
  for a, b, c in np.float32(COEFFICIENTS[:steps]):
    gram = product(x, x.T)
    scaled = wide((b * wide(gram)).astype(bf16)) + wide((c * wide(product(gram, gram))).astype(bf16))
    polynomial = scaled.astype(bf16)
    x = (wide((a * wide(x)).astype(bf16)) + wide(product(polynomial, x))).astype(bf16)
  return x if u.shape[0] <= u.shape[1] else x.T


@pytest.mark.parametrize("shape", [(16, 48), (48, 16)])
def test_bfloat16_rounds_each_product_and_each_sum(shape):
  """Sums inside a product may differ by their order, which sometimes changes a rounding; a rounding that is left out of
  a whole array changes most of its numbers."""
  u = random(3, shape, jnp.bfloat16)
  for steps in (1, 2):
    got = np.asarray(jax.jit(lambda u, steps=steps: polar_express.polar_express(u[None], steps=steps)[0])(u))
    want = rounded_one_by_one(np.asarray(u), steps)
    assert (got != want).mean() < 0.02 * steps
    assert np.abs(got.astype(np.float32) - want.astype(np.float32)).max() < 0.05


def test_no_compiler_may_skip_a_rounding():
  """A cast alone leaves XLA free to keep float32 inside a fusion, which some of its backends do and others do not."""
  u = jax.ShapeDtypeStruct((2, 16, 16), jnp.bfloat16)
  text = jax.jit(lambda u: polar_express.polar_express(u, steps=3)).lower(u).as_text()
  norms, per_step = 3, 8
  assert text.count("stablehlo.reduce_precision") == norms + 3 * per_step


def test_matrices_of_a_stack_do_not_mix():
  u = random(4, (3, 12, 20), jnp.float32)
  orthogonalise = jax.jit(polar_express.polar_express)
  whole = orthogonalise(u)
  for i in range(3):
    np.testing.assert_allclose(whole[i], orthogonalise(u[i : i + 1])[0], atol=1e-5)


@pytest.mark.usefixtures("unchecked_shapes")
def test_refuses_with_the_numbers():
  with pytest.raises(ValueError, match=r"not \(4, 4\) of float32"):
    polar_express.polar_express(jnp.zeros((4, 4)))
  with pytest.raises(ValueError, match=r"steps=-1 must not be negative"):
    polar_express.polar_express(jnp.zeros((1, 4, 4)), steps=-1)
