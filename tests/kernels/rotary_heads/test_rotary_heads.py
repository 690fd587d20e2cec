"""Every backend of attention's heads, forward and gradient, against the formula in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backend_cases import BackendCases, backends_under_test, with_gradient
from hypothesis import strategies as st

from pgolf_jax.kernels import rotary_heads
from pgolf_jax.kernels.rotary_heads import reference


class Cases(BackendCases):
  operation = rotary_heads.OPERATION
  results = ("q", "k", "v", "v too", "d_qkv", "d_gain")
  float32 = ("d_gain",)
  differentiated = 2
  static = ("kv_heads",)
  shapes = ((2, 9, 12, 2, 12, 3), (1, 17, 15, 3, 8, 4))
  """B, T, H, K, C and R of each case. The gain's gradient is a sum for each head, which can cancel, but not in a dozen
  heads at once."""

  @classmethod
  def draw(cls, seed, b, t, h, k, c, r):
    """Arguments, and cotangents of the results."""
    random = np.random.default_rng(seed)
    angle = random.uniform(0, 2 * np.pi, (t, r))
    qkv = random.standard_normal((b, t, (h + 2 * k) * c)) * np.exp(random.standard_normal((b, t, 1)))
    gain, cos, sin = (jnp.asarray(x, jnp.float32) for x in (random.uniform(-2, 2, h), np.cos(angle), np.sin(angle)))
    cotangents = [jnp.asarray(random.standard_normal((b, t, n, c)), cls.dtype) for n in (h, k, k, k)]
    return (jnp.asarray(qkv, cls.dtype), gain, cos, sin), tuple(cotangents), {"kv_heads": k}

  @classmethod
  def cases(cls):
    return st.builds(lambda seed, shape: cls.draw(seed, *shape), st.integers(0, 2**31), st.sampled_from(cls.shapes))


class TestXla(Cases):
  implementation = "xla"
  examples = 6


class TestXlaFloat32(TestXla):
  dtype = jnp.float32
  tolerance = 1e-5


class TestMosaicGpu(Cases):
  """More than one row and tile, an odd number of heads, and heads that are turned whole."""

  implementation = "mosaic_gpu"
  shapes = ((2, 128, 3, 1, 64, 8), (1, 64, 2, 2, 128, 64))
  examples = 2


def test_every_backend_is_tested():
  assert backends_under_test(Cases) | {"reference"} == set(rotary_heads.OPERATION.backends)


def test_the_formula_by_hand():
  """One query, key and value head of four numbers, of which the first two are turned by a right angle."""
  qkv = jnp.array([[[3.0, 4.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 5.0, 6.0, 7.0, 8.0]]])
  zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1))
  q, k, v, v_too = reference.rotary_heads(qkv, jnp.array([10.0]), zero, one, kv_heads=1)
  np.testing.assert_allclose(q[0, 0, 0], [16, -12, 0, 0], rtol=1e-6)
  np.testing.assert_allclose(k[0, 0, 0], [1, -1, 1, 1], rtol=1e-6)
  np.testing.assert_allclose([v[0, 0, 0], v_too[0, 0, 0]], [[5, 6, 7, 8]] * 2)


def shapes(b, t, h, k, c, r, dtype=jnp.bfloat16):
  array = jax.ShapeDtypeStruct
  return (
    array((b, t, (h + 2 * k) * c), dtype), array((h,), jnp.float32), *[array((t, r), jnp.float32)] * 2,
  ), tuple(array((b, t, n, c), dtype) for n in (h, k, k, k))  # fmt: skip


def both_passes(k, **chosen):
  return lambda arguments, cotangents: with_gradient(Cases, **chosen)(arguments, cotangents, kv_heads=k)


@pytest.mark.parametrize("sizes", [(1, 98304, 8, 4, 64, 8), (24, 3072, 3, 1, 128, 64)])
def test_lowers_for_hopper_with_both_kernels(hopper_kernels, sizes):
  assert hopper_kernels(both_passes(sizes[3]), *shapes(*sizes)) == 2


def test_cos_and_sin_have_no_gradient():
  (qkv, gain, cos, sin), _, options = Cases.draw(0, 1, 4, 2, 1, 8, 2)
  for backend in ("xla", "reference"):
    total = lambda cos, sin: sum(  # noqa: E731
      x.astype(jnp.float32).sum()
      for x in rotary_heads.rotary_heads(qkv, gain, cos, sin, **options, implementation=backend)  # noqa: B023
    )
    assert not any(jnp.any(g) for g in jax.grad(total, (0, 1))(cos, sin))


def test_chooses_xla_on_a_cpu_and_says_why():
  arguments, _ = shapes(1, 64, 2, 1, 64, 8)
  name, reason = rotary_heads.OPERATION.choose(*arguments, kv_heads=1)
  assert name == "xla" and "it needs a Hopper GPU" in reason


def test_mosaic_gpu_refuses_what_it_cannot_do(pretend_hopper):
  def insist(t=64, c=64, dtype=jnp.bfloat16):
    arguments, _ = shapes(1, t, 2, 1, c, 8, dtype)
    return rotary_heads.OPERATION.choose(*arguments, kv_heads=1, implementation="mosaic_gpu").name

  with pretend_hopper():
    assert insist() == "mosaic_gpu"
    for options, words in (
      ({"t": 65}, "64 and T=65"),
      ({"c": 96}, "not 96"),
      ({"dtype": jnp.float32}, "not float32"),
    ):
      with pytest.raises(ValueError, match=words):
        insist(**options)


@pytest.mark.usefixtures("unchecked_shapes")
def test_refuses_with_the_numbers():
  (qkv, gain, cos, sin), _, options = Cases.draw(0, 1, 4, 2, 1, 8, 2)
  with pytest.raises(ValueError, match=r"H \+ 2·2 heads"):
    rotary_heads.rotary_heads(qkv, gain[:1], cos, sin, kv_heads=2)
  with pytest.raises(ValueError, match=r"\[4, R ≤ 4\], not \(3, 2\)"):
    rotary_heads.rotary_heads(qkv, gain, cos[:3], sin[:3], **options)
  with pytest.raises(ValueError, match="not float32, bfloat16 and float32"):
    rotary_heads.rotary_heads(qkv, gain, cos.astype(jnp.bfloat16), sin, **options)
