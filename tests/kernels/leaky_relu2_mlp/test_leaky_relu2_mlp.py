"""Every backend of the LeakyReLU² MLP, forward and gradient, against the formula in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backend_cases import BackendCases, backends_under_test, distance, with_gradient
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf_jax.kernels import leaky_relu2_mlp
from pgolf_jax.kernels.leaky_relu2_mlp import mosaic_gpu, mosaic_tpu, xla


def draw(seed, n, d, f, dtype):
  """x, up and down, and the cotangent of the result."""
  random = np.random.default_rng(seed)
  scaled_shapes = (1, (n, d)), (d**-0.5, (f, d)), (f**-0.5, (d, f)), (1, (n, d))
  return [jnp.asarray(scale * random.standard_normal(shape), dtype) for scale, shape in scaled_shapes]


class Cases(BackendCases):
  operation = leaky_relu2_mlp.OPERATION
  results = ("y", "dx", "d_up", "d_down")
  differentiated = 3
  static = ("slope",)
  n, d, f = 24, 16, 40
  slopes = (0.3,)

  @classmethod
  def cases(cls):
    def case(seed, slope):
      *arguments, dy = draw(seed, cls.n, cls.d, cls.f, cls.dtype)
      return arguments, dy, {"slope": slope}

    return st.builds(case, st.integers(0, 2**31 - 1), st.sampled_from(cls.slopes))


class TestXla(Cases):
  implementation = "xla"
  examples = 10
  slopes = (0.3, 0.7, 1.0)


class TestXlaFloat32(TestXla):
  dtype = jnp.float32
  tolerance = 1e-5


class TestMosaicGpu(Cases):
  """More steps than stages, and tokens that do not fill their tiles."""

  implementation = "mosaic_gpu"
  n, d, f = 200, 256, 256
  examples = 1


class TestMosaicTpu(Cases):
  """Several steps of the sum, and tokens that do not fill their tile."""

  implementation = "mosaic_tpu"
  n, d, f = 260, 640, 128
  examples = 1


class TestMosaicTpuFloat32(TestMosaicTpu):
  """Several tiles of columns."""

  n, d, f = 20, 128, 1152
  dtype = jnp.float32
  tolerance = 1e-5
  slopes = (0.7,)


def test_every_backend_is_tested():
  assert backends_under_test(Cases) | {"reference"} == set(leaky_relu2_mlp.OPERATION.backends)


def test_one_cluster_computes_all_tiles_in_turn(interpret_gpu):
  """Two tiles of columns for each of two pairs of tiles of rows, under the detector of races."""
  x, up, down, dy = draw(0, 300, 256, 512, jnp.bfloat16)
  with interpret_gpu(cores=mosaic_gpu._CLUSTER):
    u, a = jax.block_until_ready(mosaic_gpu.up(x, up, slope=0.3))
    du = jax.block_until_ready(mosaic_gpu.up_gradient(dy, down, u, slope=0.3))
  for got, want in zip((u, a, du), (*xla.up(x, up, slope=0.3), xla.up_gradient(dy, down, u, slope=0.3)), strict=True):
    assert distance(got, want.astype(jnp.float32)) < 5e-3


def test_mosaic_tpu_takes_any_shape_that_it_does_not_refuse(interpret_tpu):
  """Both products against XLA's, which the cases above hold to the formula."""
  lanes = st.integers(1, 5).map(lambda n: 128 * n)
  tokens = st.one_of(st.integers(1, 80), st.integers(250, 270))

  @settings(max_examples=2, deadline=None)
  @given(n=tokens, d=lanes, f=lanes, dtype=st.sampled_from((jnp.bfloat16, jnp.float32)))
  def check(n, d, f, dtype):
    x, up, down, dy = draw(n, n, d, f, dtype)
    with interpret_tpu():
      u, a = mosaic_tpu.up(x, up, slope=0.3)
      du = jax.block_until_ready(mosaic_tpu.up_gradient(dy, down, u, slope=0.3))
    for got, want in zip((u, a, du), (*xla.up(x, up, slope=0.3), xla.up_gradient(dy, down, u, slope=0.3)), strict=True):
      assert got.dtype == dtype and got.shape == (n, f)
      assert distance(got, want.astype(jnp.float32)) < (5e-3 if dtype == jnp.bfloat16 else 1e-5)

  check()


def test_slope_decides_the_negative_side():
  x, up, down = jnp.array([[-2.0]]), jnp.ones((1, 1)), jnp.ones((1, 1))
  assert leaky_relu2_mlp.leaky_relu2_mlp(x, up, down, slope=0.5)[0, 0] == 1.0
  assert jax.grad(lambda x: leaky_relu2_mlp.leaky_relu2_mlp(x, up, down, slope=0.5)[0, 0])(x)[0, 0] == -1.0


def shapes(n, d, f, dtype):
  return [jax.ShapeDtypeStruct(s, dtype) for s in ((n, d), (f, d), (d, f), (n, d))]


def both_passes(x, up, down, dy):
  return with_gradient(Cases)((x, up, down), dy, slope=0.3)


@pytest.mark.parametrize(("n", "d", "f"), [(98304, 512, 2048), (24 * 3072, 512, 2048), (1000, 64, 256)])
def test_lowers_for_hopper_with_both_kernels(hopper_kernels, n, d, f):
  assert hopper_kernels(both_passes, *shapes(n, d, f, jnp.bfloat16)) == 2


@pytest.mark.parametrize(
  ("n", "d", "f", "dtype"),
  [
    (12288, 512, 2048, jnp.bfloat16),
    (300, 1024, 4096, jnp.float32),
    (9, 384, 640, jnp.bfloat16),
  ],
)
def test_compiles_for_a_tpu_with_both_kernels(tpu_kernels, n, d, f, dtype):
  assert tpu_kernels(both_passes, *shapes(n, d, f, dtype)) == 2


def test_chooses_xla_on_a_cpu_and_says_why():
  name, reason = leaky_relu2_mlp.OPERATION.choose(*shapes(128, 128, 128, jnp.bfloat16)[:3], slope=0.3)
  assert name == "xla"
  assert "it needs a Hopper GPU" in reason and "it needs a TPU, not cpu" in reason


@pytest.mark.usefixtures("unchecked_shapes")
def test_refuses_with_the_numbers():
  x, up, down, _ = draw(0, 8, 16, 32, jnp.float32)
  with pytest.raises(ValueError, match=r"\(8, 16\).*\(32, 16\).*\(32, 16\)"):
    leaky_relu2_mlp.leaky_relu2_mlp(x, up, up, slope=0.3)
  with pytest.raises(ValueError, match="float32, bfloat16 and float32"):
    leaky_relu2_mlp.leaky_relu2_mlp(x, up.astype(jnp.bfloat16), down, slope=0.3)
  with pytest.raises(ValueError, match=r"slope=1\.5"):
    leaky_relu2_mlp.leaky_relu2_mlp(x, up, down, slope=1.5)
  with pytest.raises(ValueError, match="no implementation='triton'"):
    leaky_relu2_mlp.leaky_relu2_mlp(x, up, down, slope=0.3, implementation="triton")


def test_mosaic_gpu_refuses_what_it_cannot_do(pretend_hopper):
  def insist(d, f, dtype=jnp.bfloat16):
    return leaky_relu2_mlp.OPERATION.choose(*shapes(8, d, f, dtype)[:3], slope=0.3, implementation="mosaic_gpu")

  with pretend_hopper():
    assert insist(64, 256).name == "mosaic_gpu"
    with pytest.raises(ValueError, match="D=96 and F=256"):
      insist(96, 256)
    with pytest.raises(ValueError, match="not float32"):
      insist(64, 256, jnp.float32)
  with pytest.raises(ValueError, match="not cpu"):
    insist(64, 256)


def test_mosaic_tpu_refuses_what_it_cannot_do(pretend_tpu):
  def insist(d, f, dtype, n=8):
    return leaky_relu2_mlp.OPERATION.choose(*shapes(n, d, f, dtype)[:3], slope=0.3, implementation="mosaic_tpu")

  with pretend_tpu():
    assert insist(128, 256, jnp.bfloat16).name == "mosaic_tpu"
    with pytest.raises(ValueError, match="N=8, D=96 and F=256"):
      insist(96, 256, jnp.bfloat16)
    with pytest.raises(ValueError, match="N=0, D=128 and F=256"):
      insist(128, 256, jnp.bfloat16, n=0)
    with pytest.raises(ValueError, match="not float16"):
      insist(128, 256, jnp.float16)
  with pytest.raises(ValueError, match="it needs a TPU, not cpu"):
    insist(128, 256, jnp.bfloat16)
