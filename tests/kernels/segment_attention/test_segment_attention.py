"""Every implementation of segment attention, forward and gradient, against the dense definition in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf_jax.kernels import target
from pgolf_jax.kernels.segment_attention import api, mosaic_gpu, mosaic_tpu, reference


def starts(cuts, t, longest):
  """Each position's segment start, for segments that begin at 0, at the cuts, and every `longest` tokens after."""
  begins = np.zeros(t, np.int32)
  begins[list(cuts)] = list(cuts)
  begins = np.maximum.accumulate(begins)
  position = np.arange(t)
  return position - (position - begins) % longest


def with_gradient(f):
  def both(q, k, v, start, dy):
    y, pull = jax.vjp(lambda *a: f(*a, start), q, k, v)
    return y, *pull(dy.astype(y.dtype))

  return both


def distance(got, want):
  return float(jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want))


class Cases:
  """What every implementation must pass; a class per implementation says for which shapes and types."""

  implementation: str
  b, t, h, k, c = 2, 37, 4, 2, 8
  longest = 1000
  dtype = jnp.bfloat16
  tolerance = 1e-2
  examples = 3

  @classmethod
  def attend(cls, q, k, v, start):
    return api.segment_attention(q, k, v, start, max_segment=cls.t, implementation=cls.implementation)

  @classmethod
  def arguments(cls, seed):
    keys = jax.random.split(jax.random.key(seed), 4)
    heads = (cls.h, cls.k, cls.k, cls.h)
    return [
      jax.random.normal(key, (cls.b, cls.t, n, cls.c)).astype(cls.dtype) for key, n in zip(keys, heads, strict=True)
    ]

  @pytest.fixture(scope="class")
  @classmethod
  def compiled(cls, run):
    return run(with_gradient(cls.attend))

  def test_agrees_with_the_definition(self, compiled):
    @settings(max_examples=self.examples, deadline=None)
    @given(
      seed=st.integers(0, 2**31 - 1),
      cuts=st.lists(st.sets(st.integers(1, self.t - 1), max_size=6), min_size=self.b, max_size=self.b),
    )
    def check(seed, cuts):
      q, k, v, dy = self.arguments(seed)
      start = jnp.asarray(np.stack([starts(sorted(row), self.t, self.longest) for row in cuts]))
      got = compiled(q, k, v, start, dy)
      exact = with_gradient(reference.segment_attention)
      want = exact(*(a.astype(jnp.float32) for a in (q, k, v)), start, dy.astype(jnp.float32))
      for name, g, w in zip(("y", "dq", "dk", "dv"), got, want, strict=True):
        assert g.dtype == self.dtype
        assert distance(g, w) < self.tolerance, name

    check()

  def test_documents_are_apart_to_the_bit(self, compiled):
    """A document's outputs and gradients do not depend on the one before it or the one after it."""
    q, k, v, dy = self.arguments(1)
    others = self.arguments(2)
    first, end = self.t // 3, 2 * self.t // 3
    start = jnp.broadcast_to(jnp.asarray(starts((first, end), self.t, self.longest)), (self.b, self.t))
    changed = [
      a.at[:, :first].set(b[:, :first]).at[:, end:].set(b[:, end:]) for a, b in zip((q, k, v, dy), others, strict=True)
    ]
    whole = compiled(q, k, v, start, dy)
    other = compiled(*changed[:3], start, changed[3])
    for got, want in zip(whole, other, strict=True):
      np.testing.assert_array_equal(got[:, first:end], want[:, first:end])
      assert not np.array_equal(got[:, :first], want[:, :first])


class TestXla(Cases):
  implementation = "xla"
  examples = 10


class TestXlaFloat32(TestXla):
  dtype = jnp.float32
  tolerance = 1e-5


class TestMosaicGpu(Cases):
  """Blocks that a segment leaves in the middle, crosses, or misses; a last block that is not full."""

  implementation = "mosaic_gpu"
  examples = 2
  b, t, h, k, c = 1, 150, 2, 1, 64

  @classmethod
  def attend(cls, q, k, v, start):
    return mosaic_gpu.segment_attention(q, k, v, start)


class TestMosaicTpu(Cases):
  """Rows of three chunks, the last not full; segments are cut to the bound, and so begin in the chunk before, too."""

  implementation = "mosaic_tpu"
  interpreted_by_argument = True
  examples = 1
  b, t, h, k, c = 1, 290, 2, 1, 64
  longest = 128

  @classmethod
  def attend(cls, q, k, v, start):
    return mosaic_tpu.segment_attention(q, k, v, start, max_segment=cls.longest, interpret=True)


@pytest.mark.parametrize(
  ("b", "t", "h", "k", "c"), [(1, 98304, 8, 4, 64), (24, 3072, 8, 4, 64), (3, 100, 6, 2, 128), (2, 64, 4, 4, 64)]
)
def test_lowers_for_hopper_with_three_kernels(hopper_kernels, b, t, h, k, c):
  q = jax.ShapeDtypeStruct((b, t, h, c), jnp.bfloat16)
  kv = jax.ShapeDtypeStruct((b, t, k, c), jnp.bfloat16)
  start = jax.ShapeDtypeStruct((b, t), jnp.int32)
  assert hopper_kernels(with_gradient(mosaic_gpu.segment_attention), q, kv, kv, start, q) == 3


def test_mosaic_gpu_says_what_it_cannot_do(pretend_hopper):
  def obstacle(width, dtype):
    return target.mosaic_gpu_obstacle("segment_attention", jax.ShapeDtypeStruct((1, 8, 2, width), dtype))

  assert "not cpu" in obstacle(64, jnp.bfloat16)
  with pretend_hopper():
    assert "head width of 64 or 128, not 24" in obstacle(24, jnp.bfloat16)
    assert "not float32" in obstacle(64, jnp.float32)
    assert obstacle(64, jnp.bfloat16) is None


def test_refuses_with_the_numbers():
  q, k, start = jnp.zeros((1, 8, 3, 4)), jnp.zeros((1, 8, 2, 4)), jnp.zeros((1, 8), jnp.int32)
  with pytest.raises(ValueError, match="the 3 query heads must be a multiple of the 2"):
    api.segment_attention(q, k, k, start, max_segment=8)
  with pytest.raises(ValueError, match=r"\(1, 8, 3, 4\).*\(1, 7, 2, 4\)"):
    api.segment_attention(q, k[:, :7], k[:, :7], start, max_segment=8)
  with pytest.raises(ValueError, match="max_segment=0"):
    api.segment_attention(q, q, q, start, max_segment=0)
