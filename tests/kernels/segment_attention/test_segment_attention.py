"""Every backend of segment attention, forward and gradient, against the dense definition in float32."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backend_cases import BackendCases, backends_under_test, with_gradient
from hypothesis import strategies as st

from pgolf_jax.bench.gpu_day_kernels import trying
from pgolf_jax.kernels import segment_attention
from pgolf_jax.kernels.segment_attention import mosaic_tpu


def starts(cuts, t, longest):
  """Each position's segment start, for segments that begin at 0, at the cuts, and every `longest` tokens after."""
  begins = np.zeros(t, np.int32)
  begins[list(cuts)] = list(cuts)
  begins = np.maximum.accumulate(begins)
  position = np.arange(t)
  return position - (position - begins) % longest


class Cases(BackendCases):
  operation = segment_attention.OPERATION
  results = ("y", "dq", "dk", "dv")
  differentiated = 3
  static = ("max_segment",)
  b, t, h, k, c = 2, 37, 4, 2, 8
  longest = 1000

  @classmethod
  def draw(cls, seed):
    """q, k and v, and the cotangent of the result."""
    random = np.random.default_rng(seed)
    heads = (cls.h, cls.k, cls.k, cls.h)
    return [jnp.asarray(random.standard_normal((cls.b, cls.t, n, cls.c)), cls.dtype) for n in heads]

  @classmethod
  def cases(cls):
    def case(seed, cuts):
      *arguments, dy = cls.draw(seed)
      start = jnp.asarray(np.stack([starts(sorted(row), cls.t, cls.longest) for row in cuts]))
      return (*arguments, start), dy, {"max_segment": cls.longest}

    cuts = st.sets(st.integers(1, cls.t - 1), max_size=6)
    return st.builds(case, st.integers(0, 2**31 - 1), st.lists(cuts, min_size=cls.b, max_size=cls.b))

  def test_documents_are_apart_to_the_bit(self, backend):
    """A document's outputs and gradients do not depend on the one before it or the one after it."""
    drawn, others = self.draw(1), self.draw(2)
    first, end = self.t // 3, 2 * self.t // 3
    start = jnp.broadcast_to(jnp.asarray(starts((first, end), self.t, self.longest)), (self.b, self.t))

    def results(q, k, v, dy):
      return [np.asarray(x) for x in backend((q, k, v, start), dy, max_segment=self.longest)]

    whole = results(*drawn)
    inside = (np.arange(self.t) >= first) & (np.arange(self.t) < end)
    changed = results(*(jnp.where(inside[:, None, None], a, b) for a, b in zip(drawn, others, strict=True)))
    for got, want in zip(whole, changed, strict=True):
      np.testing.assert_array_equal(got[:, first:end], want[:, first:end])
      assert not np.array_equal(got[:, :first], want[:, :first])

  def test_a_query_that_sees_one_key_has_no_gradient_and_gives_none(self, backend):
    """Of a row of such queries q and k have gradients of exactly zero; of one between documents q has."""
    q, k, v, dy = self.draw(3)
    alone = jnp.broadcast_to(jnp.arange(self.t, dtype=jnp.int32), (self.b, self.t))
    y, dq, dk, dv = (np.asarray(x, np.float32) for x in backend((q, k, v, alone), dy, max_segment=self.longest))
    assert not dq.any() and not dk.any() and dv.any()
    np.testing.assert_allclose(y, np.repeat(np.asarray(v, np.float32), self.h // self.k, axis=2), rtol=0.01, atol=1e-6)
    third = self.t // 3
    start = jnp.broadcast_to(jnp.asarray(starts((third, third + 1), self.t, self.longest)), alone.shape)
    dq = np.asarray(backend((q, k, v, start), dy, max_segment=self.longest)[1], np.float32)
    is_zero_T = ~dq.any(axis=(0, 2, 3))
    np.testing.assert_array_equal(is_zero_T, np.asarray(start[0] == np.arange(self.t)))


class TestXla(Cases):
  implementation = "xla"
  examples = 10


class TestXlaFloat32(TestXla):
  dtype = jnp.float32
  tolerance = 1e-5


class TestMosaicGpu(Cases):
  """Blocks that a segment leaves in the middle, crosses, or misses; a last block that is not full; two key heads."""

  implementation = "mosaic_gpu"
  b, t, h, k, c = 1, 150, 4, 2, 64

  def test_heads_by_themselves_give_the_same_bits(self, run, backend):
    *arguments, dy = self.draw(4)
    start = jnp.asarray(starts((40, 41, 100), self.t, self.longest))[None]
    together = backend((*arguments, start), dy, max_segment=self.longest)
    with trying("segment_attention", "mosaic_gpu", {"HEADS": 1}):
      apart = run(with_gradient(type(self), implementation="mosaic_gpu"), self.static)
      for a, b in zip(together, apart((*arguments, start), dy, max_segment=self.longest), strict=True):
        np.testing.assert_array_equal(a, b)


class TestMosaicTpu(Cases):
  """Five blocks, the last not full, and walks of up to four; two key heads side by side."""

  implementation = "mosaic_tpu"
  examples = 1
  b, t, h, k, c = 1, 520, 4, 2, 64
  longest = 300

  @pytest.fixture(scope="class", autouse=True)
  @classmethod
  def small_blocks(cls):
    with mock.patch.object(mosaic_tpu, "_BLOCK", 128):
      yield


class TestMosaicTpuWideHeads(Cases):
  """Two rows; heads that fill the lanes, in float32; whole blocks, though no segment is as long as one."""

  implementation = "mosaic_tpu"
  examples = 1
  b, t, h, k, c = 2, 140, 3, 1, 128
  longest = 60
  dtype = jnp.float32
  tolerance = 1e-5


def test_every_backend_is_tested():
  assert backends_under_test(Cases) | {"reference"} == set(segment_attention.OPERATION.backends)


def shapes(b, t, h, k, c):
  """Of q, k, v, start and dy."""
  q, kv = (jax.ShapeDtypeStruct((b, t, heads, c), jnp.bfloat16) for heads in (h, k))
  return q, kv, kv, jax.ShapeDtypeStruct((b, t), jnp.int32), q


@pytest.mark.parametrize(
  ("b", "t", "h", "k", "c"), [(1, 98304, 8, 4, 64), (24, 3072, 8, 4, 64), (3, 100, 6, 2, 128), (2, 64, 4, 4, 64)]
)
def test_lowers_for_hopper_with_three_kernels(hopper_kernels, b, t, h, k, c):
  f = with_gradient(Cases, implementation="mosaic_gpu")
  assert hopper_kernels(lambda *a: f(a[:4], a[4], max_segment=t), *shapes(b, t, h, k, c)) == 3


@pytest.mark.parametrize(
  ("b", "t", "h", "k", "c"), [(1, 12288, 8, 4, 64), (3, 112, 8, 4, 64), (1, 300, 6, 2, 128), (2, 1000, 2, 1, 256)]
)
def test_compiles_for_a_tpu_with_two_kernels(tpu_kernels, b, t, h, k, c):
  f = with_gradient(Cases, implementation="mosaic_tpu")
  assert tpu_kernels(lambda *a: f(a[:4], a[4], max_segment=min(t, 3072)), *shapes(b, t, h, k, c)) == 2


def obstacle(backend, width, dtype, heads=2):
  shape = jax.ShapeDtypeStruct((1, 8, heads, width), dtype)
  start = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  return segment_attention.OPERATION.obstacle(backend, shape, shape, shape, start, max_segment=8)


def test_mosaic_gpu_says_what_it_cannot_do(pretend_hopper):
  assert "not cpu" in obstacle("mosaic_gpu", 64, jnp.bfloat16)
  with pretend_hopper():
    assert "head width of 64 or 128, not 24" in obstacle("mosaic_gpu", 24, jnp.bfloat16)
    assert "not float32" in obstacle("mosaic_gpu", 64, jnp.float32)
    assert obstacle("mosaic_gpu", 64, jnp.bfloat16) is None


def test_mosaic_tpu_says_what_it_cannot_do(pretend_tpu):
  assert "not cpu" in obstacle("mosaic_tpu", 64, jnp.bfloat16)
  with pretend_tpu():
    assert "head width of 64, 128 or 256, not 24" in obstacle("mosaic_tpu", 24, jnp.bfloat16)
    assert "not float16" in obstacle("mosaic_tpu", 64, jnp.float16)
    assert "fill 128 lanes, not 3 of 64" in obstacle("mosaic_tpu", 64, jnp.bfloat16, heads=3)
    assert obstacle("mosaic_tpu", 64, jnp.bfloat16) is None


@pytest.mark.parametrize(
  ("kind", "heads", "kv_heads", "longest", "why"),
  [
    ("TPU v4", 8, 4, 3072, None),
    ("TPU v4", 16, 2, 3072, "need 19 MiB of VMEM, of 16"),
    ("TPU v5 lite", 16, 2, 3072, None),
    ("TPU v5 lite", 8, 4, 32_768, None),
    ("TPU v5 lite", 16, 2, 16_384, "of VMEM, of 48"),
  ],
)
def test_mosaic_tpu_takes_no_more_memory_than_there_is(pretend_device, kind, heads, kv_heads, longest, why):
  """libtpu compiles, and refuses, just these."""
  q, k = (jax.ShapeDtypeStruct((1, longest, count, 64), jnp.bfloat16) for count in (heads, kv_heads))
  start = jax.ShapeDtypeStruct((1, longest), jnp.int32)
  with pretend_device(kind, "tpu"):
    said = segment_attention.OPERATION.obstacle("mosaic_tpu", q, k, k, start, max_segment=longest)
  assert said is None if why is None else why in said


@pytest.mark.usefixtures("unchecked_shapes")
def test_refuses_with_the_numbers():
  q, k, start = jnp.zeros((1, 8, 3, 4)), jnp.zeros((1, 8, 2, 4)), jnp.zeros((1, 8), jnp.int32)
  with pytest.raises(ValueError, match="the 3 query heads must be a multiple of the 2"):
    segment_attention.segment_attention(q, k, k, start, max_segment=8)
  with pytest.raises(ValueError, match=r"\(1, 8, 3, 4\).*\(1, 7, 2, 4\)"):
    segment_attention.segment_attention(q, k[:, :7], k[:, :7], start, max_segment=8)
  with pytest.raises(ValueError, match="max_segment=0"):
    segment_attention.segment_attention(q, q, q, start, max_segment=0)
