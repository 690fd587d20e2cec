"""Every implementation of the softcapped cross-entropy, forward and gradient, against the formula in float32."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf_jax.kernels.softcapped_xent import api, linear, mosaic_tpu, reference, xla


def arguments(seed, n, v, scale, dtype):
  """z, target, hint and the cotangents of both results; some hints are the target."""
  keys = jax.random.split(jax.random.key(seed), 6)
  z = (scale * jax.random.normal(keys[0], (n, v))).astype(dtype)
  target = jax.random.randint(keys[1], (n,), 0, v)
  hint = jnp.where(jax.random.bernoulli(keys[2], 0.3, (n,)), target, jax.random.randint(keys[3], (n,), 0, v))
  return z, target, hint, *jax.random.normal(keys[4], (2, n))


def distance(got, want):
  return float(jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want))


def exact(z, target, hint, d_nll, d_hint, cap_pos, cap_neg):
  def f(z):
    return reference.softcapped_xent_with_hint(z, target, hint, cap_pos=cap_pos, cap_neg=cap_neg)

  results, pull = jax.vjp(f, z.astype(jnp.float32))
  return *results, *pull((d_nll, d_hint)), *pull((d_nll, jnp.zeros_like(d_hint)))


class Cases:
  """What every implementation must pass; a class per implementation says for which shapes and types."""

  implementation: str
  n, v = 12, 50
  dtype = jnp.bfloat16
  tolerance = 5e-3
  examples = 3

  @pytest.fixture(scope="class")
  @classmethod
  def compiled(cls, run):
    def both(z, target, hint, d_nll, d_hint, cap_pos, cap_neg):
      caps = {"cap_pos": cap_pos, "cap_neg": cap_neg, "implementation": cls.implementation}
      results, pull = jax.vjp(lambda z: api.softcapped_xent_with_hint(z, target, hint, **caps), z)
      nll, pull_nll = jax.vjp(lambda z: api.softcapped_xent(z, target, **caps), z)
      return *results, *pull((d_nll, d_hint)), *pull_nll(d_nll), nll

    return run(both)

  def test_agrees_with_the_formula(self, compiled):
    @settings(max_examples=self.examples, deadline=None)
    @given(
      seed=st.integers(0, 2**31 - 1),
      scale=st.sampled_from((1.0, 20.0, 200.0)),
      cap_pos=st.sampled_from((5.0, 30.0, 120.0)),
      cap_neg=st.sampled_from((5.0, 30.0, 120.0)),
    )
    def check(seed, scale, cap_pos, cap_neg):
      values = arguments(seed, self.n, self.v, scale, self.dtype)
      caps = jnp.float32(cap_pos), jnp.float32(cap_neg)
      nll, hint_logp, dz, dz_without_hint, nll_alone = compiled(*values, *caps)
      want = exact(*values, *caps)
      np.testing.assert_allclose(nll, want[0], atol=1e-4, rtol=1e-5)
      np.testing.assert_allclose(hint_logp, want[1], atol=1e-4, rtol=1e-5)
      np.testing.assert_array_equal(nll, nll_alone)
      assert dz.dtype == self.dtype
      assert distance(dz, want[2]) < self.tolerance
      assert distance(dz_without_hint, want[3]) < self.tolerance

    check()


class TestXla(Cases):
  implementation = "xla"
  examples = 20


class TestXlaFloat32(TestXla):
  dtype = jnp.float32
  tolerance = 1e-5


class TestMosaicGpu(Cases):
  """Two blocks of rows, more blocks of columns than stages."""

  implementation = "mosaic_gpu"
  n, v = 128, 384


class TestMosaicTpu(Cases):
  """Two blocks of rows, the second not full."""

  implementation = "mosaic_tpu"
  n, v = 260, 128
  examples = 1


class TestMosaicTpuFloat32(TestMosaicTpu):
  """Two blocks of columns."""

  n, v = 20, 2304
  dtype = jnp.float32
  tolerance = 1e-5
  examples = 2


def test_mosaic_tpu_takes_any_shape_that_it_does_not_refuse(interpret_tpu):
  """Both passes against XLA's, which the cases above hold to the formula."""

  @settings(max_examples=2, deadline=None)
  @given(
    n=st.integers(1, 40),
    v=st.integers(1, 9).map(lambda n: 128 * n),
    hinted=st.booleans(),
    dtype=st.sampled_from((jnp.bfloat16, jnp.float32)),
  )
  def check(n, v, hinted, dtype):
    z, target, hint, d_nll, d_hint = arguments(n, n, v, 20.0, dtype)
    caps = jnp.float32(30.0), jnp.float32(12.0)
    hints = (hint, d_hint) if hinted else (None, None)
    lse_want = xla.log_sum_exp(z, *caps)
    rest = (lse_want, target, -d_nll, *hints, d_nll, *caps)
    with interpret_tpu():
      lse = jax.block_until_ready(mosaic_tpu.log_sum_exp(z, *caps))
      dz = jax.block_until_ready(mosaic_tpu.gradient(z, *rest))
    np.testing.assert_allclose(lse, lse_want, rtol=1e-5)
    assert dz.dtype == dtype and dz.shape == (n, v)
    assert distance(dz, xla.gradient(z, *rest).astype(jnp.float32)) < (5e-3 if dtype == jnp.bfloat16 else 1e-5)

  check()


@pytest.mark.parametrize("n", [1, 7, 16, 23])
def test_linear_form_agrees_in_blocks_of_any_number_of_tokens(monkeypatch, n):
  monkeypatch.setattr(linear, "_BLOCK_LOGITS", 8 * 30)
  keys = jax.random.split(jax.random.key(n), 4)
  x, weight = jax.random.normal(keys[0], (n, 10)), jax.random.normal(keys[1], (30, 10))
  target, d_nll = jax.random.randint(keys[2], (n,), 0, 30), jax.random.normal(keys[3], (n,))
  caps = {"cap_pos": 20.0, "cap_neg": 25.0}

  def both(f):
    nll, pull = jax.vjp(f, x, weight)
    return nll, *pull(d_nll)

  def dense(x, weight):
    z = jnp.einsum("nd,vd->nv", x, weight, precision="highest")
    return reference.softcapped_xent_with_hint(z, target, target, **caps)[0]

  got = jax.jit(lambda: both(lambda x, w: api.linear_softcapped_xent(x, w, target, **caps)))()
  for g, w in zip(got, both(dense), strict=True):
    np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5)


def test_linear_form_never_holds_all_logits():
  n, d, v = 32768, 64, 8192
  x, weight = jax.ShapeDtypeStruct((n, d), jnp.float32), jax.ShapeDtypeStruct((v, d), jnp.float32)
  target = jax.ShapeDtypeStruct((n,), jnp.int32)

  def loss(x, weight, target):
    return api.linear_softcapped_xent(x, weight, target, cap_pos=30.0, cap_neg=30.0).mean()

  memory = jax.jit(jax.grad(loss, (0, 1))).lower(x, weight, target).compile().memory_analysis()
  assert memory.temp_size_in_bytes < n * v * 4 / 2


def gradient_of_the_head(x, weight, target):
  def loss(x, weight):
    return api.linear_softcapped_xent(x, weight, target, cap_pos=30.0, cap_neg=30.0).mean()

  return jax.grad(loss, (0, 1))(x, weight)


RECORD = [
  jax.ShapeDtypeStruct((98304, 512), jnp.bfloat16),
  jax.ShapeDtypeStruct((8192, 512), jnp.bfloat16),
  jax.ShapeDtypeStruct((98304,), jnp.int32),
]


def test_every_product_of_the_linear_form_takes_its_operands_as_they_are():
  text = jax.jit(gradient_of_the_head).lower(*RECORD).as_text()
  operands = re.findall(r"stablehlo\.dot_general .*: \(tensor<[\dx]*(\w+)>, tensor<[\dx]*(\w+)>\)", text)
  assert operands == 3 * [("bf16", "bf16")], "logits and two gradients"


def test_blocks_of_the_linear_form_fill_a_gpu(pretend_hopper):
  with pretend_hopper():
    text = str(jax.make_jaxpr(gradient_of_the_head)(*RECORD))
  assert "bf16[32768,8192]" in text and "bf16[4096,8192]" not in text


def test_caps_get_no_gradient():
  z, target, *_ = arguments(0, 3, 5, 1.0, jnp.float32)
  gradient = jax.grad(lambda cap: api.softcapped_xent(z, target, cap_pos=cap, cap_neg=cap).sum())(30.0)
  assert gradient == 0


def test_probabilities_sum_to_one():
  z = arguments(1, 1, 40, 50.0, jnp.float32)[0]
  nll = api.softcapped_xent(jnp.tile(z, (40, 1)), jnp.arange(40), cap_pos=30.0, cap_neg=12.0)
  assert abs(float(jnp.exp(-nll).sum()) - 1) < 1e-5


@pytest.mark.parametrize(("n", "v"), [(98304, 8192), (24 * 64, 8192), (64, 1024)])
def test_lowers_for_hopper_with_both_kernels(hopper_kernels, n, v):
  z = jax.ShapeDtypeStruct((n, v), jnp.bfloat16)
  index = jax.ShapeDtypeStruct((n,), jnp.int32)

  def loss(z, target, hint):
    nll, hint_logp = api.softcapped_xent_with_hint(z, target, hint, cap_pos=30.0, cap_neg=30.0)
    return nll.mean() + hint_logp.mean()

  assert hopper_kernels(jax.grad(loss), z, index, index) == 2


@pytest.mark.parametrize(
  ("n", "v", "dtype"), [(4096, 8192, jnp.bfloat16), (4096, 8192, jnp.float32), (3, 384, jnp.bfloat16)]
)
def test_compiles_for_a_tpu_with_both_kernels(tpu_kernels, n, v, dtype):
  z, index = jax.ShapeDtypeStruct((n, v), dtype), jax.ShapeDtypeStruct((n,), jnp.int32)

  def loss(z, target, hint):
    nll, hint_logp = api.softcapped_xent_with_hint(z, target, hint, cap_pos=30.0, cap_neg=30.0)
    return nll.mean() + hint_logp.mean()

  assert tpu_kernels(jax.grad(loss), z, index, index) == 2


def test_chooses_xla_on_a_cpu_and_says_why():
  name, reason = api.choose(jax.ShapeDtypeStruct((8, 128), jnp.bfloat16))
  assert name == "xla"
  assert "it needs a Hopper GPU" in reason and "it needs a TPU, not cpu" in reason


def test_refuses_with_the_numbers(pretend_hopper, pretend_tpu):
  z, target, *_ = arguments(0, 6, 5, 1.0, jnp.float32)
  with pytest.raises(ValueError, match=r"\(5,\) of int32 for z_NxV.shape=\(6, 5\)"):
    api.softcapped_xent(z, target[:5], cap_pos=30.0, cap_neg=30.0)
  with pytest.raises(ValueError, match=r"not \(6,\) of int32"):
    api.softcapped_xent(target, target, cap_pos=30.0, cap_neg=30.0)
  with pytest.raises(ValueError, match=r"\(6, 5\).*\(7, 4\)"):
    api.linear_softcapped_xent(z, jnp.zeros((7, 4)), target, cap_pos=30.0, cap_neg=30.0)
  with pretend_hopper(), pytest.raises(ValueError, match="N=6 and V=5"):
    api.choose(z.astype(jnp.bfloat16), implementation="mosaic_gpu")
  with pretend_tpu():
    assert api.choose(jax.ShapeDtypeStruct((6, 128), jnp.float32), implementation="mosaic_tpu").name == "mosaic_tpu"
    with pytest.raises(ValueError, match="N=6 and V=5"):
      api.choose(z, implementation="mosaic_tpu")
    with pytest.raises(ValueError, match="not float16"):
      api.choose(jax.ShapeDtypeStruct((6, 128), jnp.float16), implementation="mosaic_tpu")
