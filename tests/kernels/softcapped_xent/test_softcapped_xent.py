"""Every backend of the softcapped cross-entropy, forward and gradient, against the formula in float32."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backend_cases import BackendCases, backends_under_test, distance
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf_jax.kernels import softcapped_xent
from pgolf_jax.kernels import softcapped_xent as xent
from pgolf_jax.kernels.softcapped_xent import mosaic_tpu, xla

CAPS = {"cap_pos": 30.0, "cap_neg": 12.0}


def draw(seed, n, v, scale, dtype):
  """z, target, hint, and the cotangents of both results; some hints are the target."""
  random = np.random.default_rng(seed)
  z = jnp.asarray(scale * random.standard_normal((n, v)), dtype)
  target, other = random.integers(0, v, (2, n), np.int32)
  hint = np.where(random.random(n) < 0.3, target, other)
  d_nll, d_hint = random.standard_normal((2, n), np.float32)
  return z, *map(jnp.asarray, (target, hint, d_nll, d_hint))


class Cases(BackendCases):
  """The cross-entropy with a hint, and that without, of the same logits."""

  results = ("nll", "hint_logp", "nll without a hint", "dz", "dz without a hint")
  differentiated = 2
  n, v = 12, 50
  tolerance = 5e-3
  examples = 3

  @staticmethod
  def operation(z, same_z, target, hint, **options):
    with_hint = xent.softcapped_xent_with_hint(z, target, hint, **options)
    return *with_hint, xent.softcapped_xent(same_z, target, **options)

  @classmethod
  def cases(cls):
    def case(seed, scale, cap_pos, cap_neg):
      z, target, hint, d_nll, d_hint = draw(seed, cls.n, cls.v, scale, cls.dtype)
      options = {"cap_pos": jnp.float32(cap_pos), "cap_neg": jnp.float32(cap_neg)}
      return (z, z, target, hint), (d_nll, d_hint, d_nll), options

    caps = st.sampled_from((5.0, 30.0, 120.0))
    return st.builds(case, st.integers(0, 2**31 - 1), st.sampled_from((1.0, 20.0, 200.0)), caps, caps)

  def compare(self, got, want):
    nll, hint_logp, nll_alone, *gradients = got
    np.testing.assert_allclose(nll, want[0], atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(hint_logp, want[1], atol=1e-4, rtol=1e-5)
    np.testing.assert_array_equal(nll, nll_alone)
    for name, g, w in zip(self.results[3:], gradients, want[3:], strict=True):
      assert g.dtype == self.dtype, name
      assert distance(g, w) < self.tolerance, name


class TestXla(Cases):
  implementation = "xla"
  examples = 20


class TestXlaFloat32(TestXla):
  dtype = jnp.float32
  # 1 − tanh² of logits far beyond a cap is a difference of nearly equal numbers: at a slope of 0.003 it has 2e-5.
  tolerance = 3e-5


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


def test_every_backend_is_tested():
  assert backends_under_test(Cases) | {"reference"} == set(xent.OPERATION.backends)


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
    z, target, hint, d_nll, d_hint = draw(n, n, v, 20.0, dtype)
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
  monkeypatch.setattr(xent, "_BLOCK_LOGITS", 8 * 30)
  random = np.random.default_rng(n)
  x, weight, d_nll = (random.standard_normal(shape, np.float32) for shape in ((n, 10), (30, 10), (n,)))
  target = random.integers(0, 30, n, np.int32)

  def dense(x, weight):
    z = jnp.einsum("nd,vd->nv", x, weight, precision="highest")
    return xent.softcapped_xent(z, target, **CAPS, implementation="reference")

  def with_gradient(f, x, weight):
    nll, pull = jax.vjp(f, x, weight)
    return nll, *pull(d_nll)

  @jax.jit
  def both(x, weight):
    in_blocks = with_gradient(lambda *a: xent.linear_softcapped_xent(*a, target, **CAPS), x, weight)
    return in_blocks, with_gradient(dense, x, weight)

  for got, want in zip(*both(x, weight), strict=True):
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_no_block_of_the_linear_form_is_larger_than_its_bound():
  for tokens, vocabulary in ((1, 30), (98304, 8192), (65600, 8192), (5, 2**26)):
    blocks, size = softcapped_xent.block_count(tokens, vocabulary), softcapped_xent.block_size(tokens, vocabulary)
    assert (blocks - 1) * size < tokens <= blocks * size
    assert size == 1 or size * vocabulary <= 2**25


def test_linear_form_never_holds_all_logits():
  n, d, v = 32768, 64, 8192
  x, weight = jax.ShapeDtypeStruct((n, d), jnp.float32), jax.ShapeDtypeStruct((v, d), jnp.float32)
  target = jax.ShapeDtypeStruct((n,), jnp.int32)

  def loss(x, weight, target):
    return xent.linear_softcapped_xent(x, weight, target, **CAPS).mean()

  memory = jax.jit(jax.grad(loss, (0, 1))).lower(x, weight, target).compile().memory_analysis()
  assert memory.temp_size_in_bytes < n * v * 4 / 2


def gradient_of_the_head(x, weight, target):
  def loss(x, weight):
    return xent.linear_softcapped_xent(x, weight, target, **CAPS).mean()

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


@pytest.mark.parametrize(
  ("kind", "tokens"), [("NVIDIA H100 80GB HBM3", 98304), ("NVIDIA GeForce RTX 4090", 24576), ("NVIDIA L4", 32768)]
)
def test_a_gpu_holds_the_logits_that_its_memory_has_room_for(pretend_device, kind, tokens):
  """All of a micro-batch on a Hopper GPU, a third of it elsewhere; the head's product is then not computed again."""
  x, weight, target = RECORD
  with pretend_device(kind, "gpu"):
    text = str(
      jax.make_jaxpr(gradient_of_the_head)(x.update(shape=(tokens, 512)), weight, target.update(shape=(tokens,)))
    )
    blocks = xent.block_count(98304, 8192)
  assert text.count("dot_general") == 3 and f"bf16[{tokens},8192]" in text
  assert blocks == (1 if "H100" in kind else 3)


def test_caps_get_no_gradient():
  z, target, *_ = draw(0, 3, 5, 1.0, jnp.float32)
  for name in ("xla", "reference"):
    loss = lambda cap, name=name: xent.softcapped_xent(z, target, cap_pos=cap, cap_neg=cap, implementation=name).sum()  # noqa: E731
    assert jax.jit(jax.grad(loss))(30.0) == 0


def test_probabilities_sum_to_one():
  z = draw(1, 1, 40, 50.0, jnp.float32)[0]
  nll = jax.jit(lambda z: xent.softcapped_xent(jnp.tile(z, (40, 1)), jnp.arange(40), **CAPS))(z)
  assert abs(np.exp(-np.asarray(nll)).sum() - 1) < 1e-5


@pytest.mark.parametrize(("n", "v"), [(98304, 8192), (24 * 64, 8192), (64, 1024)])
def test_lowers_for_hopper_with_both_kernels(hopper_kernels, n, v):
  z = jax.ShapeDtypeStruct((n, v), jnp.bfloat16)
  index = jax.ShapeDtypeStruct((n,), jnp.int32)

  def loss(z, target, hint):
    nll, hint_logp = xent.softcapped_xent_with_hint(z, target, hint, **CAPS)
    return nll.mean() + hint_logp.mean()

  assert hopper_kernels(jax.grad(loss), z, index, index) == 2


@pytest.mark.parametrize(
  ("n", "v", "dtype"), [(4096, 8192, jnp.bfloat16), (4096, 8192, jnp.float32), (3, 384, jnp.bfloat16)]
)
def test_compiles_for_a_tpu_with_both_kernels(tpu_kernels, n, v, dtype):
  z, index = jax.ShapeDtypeStruct((n, v), dtype), jax.ShapeDtypeStruct((n,), jnp.int32)

  def loss(z, target, hint):
    nll, hint_logp = xent.softcapped_xent_with_hint(z, target, hint, **CAPS)
    return nll.mean() + hint_logp.mean()

  assert tpu_kernels(jax.grad(loss), z, index, index) == 2


def choose(n, v, dtype, implementation=None):
  index = jax.ShapeDtypeStruct((n,), jnp.int32)
  return xent.OPERATION.choose(jax.ShapeDtypeStruct((n, v), dtype), index, None, **CAPS, implementation=implementation)


def test_chooses_xla_on_a_cpu_and_says_why():
  name, reason = choose(8, 128, jnp.bfloat16)
  assert name == "xla"
  assert "it needs a Hopper GPU" in reason and "it needs a TPU, not cpu" in reason


@pytest.mark.usefixtures("unchecked_shapes")
def test_refuses_with_the_numbers(pretend_hopper, pretend_tpu):
  z, target, *_ = draw(0, 6, 5, 1.0, jnp.float32)
  with pytest.raises(ValueError, match=r"\(5,\) of int32 for z_NxV.shape=\(6, 5\)"):
    xent.softcapped_xent(z, target[:5], **CAPS)
  with pytest.raises(ValueError, match=r"not \(6,\) of int32"):
    xent.softcapped_xent(target, target, **CAPS)
  with pytest.raises(ValueError, match=r"\(6, 5\).*\(7, 4\)"):
    xent.linear_softcapped_xent(z, jnp.zeros((7, 4)), target, **CAPS)
  with pretend_hopper(), pytest.raises(ValueError, match="N=6 and V=5"):
    choose(6, 5, jnp.bfloat16, "mosaic_gpu")
  with pretend_tpu():
    assert choose(6, 128, jnp.float32, "mosaic_tpu").name == "mosaic_tpu"
    with pytest.raises(ValueError, match="N=6 and V=5"):
      choose(6, 5, jnp.float32, "mosaic_tpu")
    with pytest.raises(ValueError, match="not float16"):
      choose(6, 128, jnp.float16, "mosaic_tpu")
