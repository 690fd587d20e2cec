"""Every backend of a chunk's attention, forward and gradient, against the formula in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backend_cases import BackendCases, backends_under_test, with_gradient
from hypothesis import strategies as st

from pgolf_jax.kernels import chunk_attention
from pgolf_jax.kernels.chunk_attention import KeysValues, Place, visible


class Cases(BackendCases):
  operation = chunk_attention.OPERATION
  results = ("y", "dq", "dk", "dv")
  differentiated = 3
  static = ("window",)
  shapes = ((2, 15, 4, 2, 12, 16), (2, 24, 3, 1, 16, 33), (3, 20, 2, 2, 8, 47))
  """B, X, H, K, C of each case, and S of its ring."""

  @classmethod
  def draw(cls, seed, shape):
    """A chunk at the begin of a document, before the ring is full, where it wraps, or long after; often a short one."""
    random = np.random.default_rng(seed)
    b, x, h, k, c, s = shape
    normal = lambda *dims: jnp.asarray(random.standard_normal(dims), cls.dtype)  # noqa: E731
    ring = KeysValues(*(normal(3, k, b + 1, s, c) for _ in range(2)))
    size = int(random.integers(1, x + 1))
    first = int(random.choice([0, s - size // 2, random.integers(0, s), random.integers(s, 4 * s)]))
    place = Place(*(jnp.int32(n) for n in (random.integers(3), first, size)))
    arguments = normal(b, x, h, c), normal(b, x, k, c), normal(b, x, k, c), ring, place
    return arguments, normal(b, x, h, c), {"window": s if first > s // 2 else max(first, 1)}

  @classmethod
  def cases(cls):
    return st.builds(cls.draw, st.integers(0, 2**31), st.sampled_from(cls.shapes))


class TestXla(Cases):
  implementation = "xla"
  examples = 8


class TestXlaFloat32(TestXla):
  dtype = jnp.float32
  tolerance = 1e-5


class TestMosaicGpu(Cases):
  """Chunks shorter than a block of queries and longer than one, wide heads, one key head for four."""

  implementation = "mosaic_gpu"
  shapes = ((2, 32, 4, 2, 64, 128), (1, 80, 2, 1, 64, 192), (1, 16, 1, 1, 128, 64), (1, 16, 4, 1, 64, 64))
  examples = 6


def test_every_backend_is_tested():
  assert backends_under_test(Cases) | {"reference"} == set(chunk_attention.OPERATION.backends)


@pytest.mark.parametrize(("first", "seen"), [(0, ""), (5, "01234"), (8, "34567"), (11, "01267"), (16, "34567")])
def test_which_places_of_a_ring_of_eight_a_chunk_of_three_sees(first, seen):
  """Token t is at t mod 8, and the chunk overwrites three places: with its own tokens it sees eight at most."""
  is_seen = visible(jnp.arange(8), Place(0, jnp.int32(first), jnp.int32(3)), 8)
  assert "".join(map(str, np.flatnonzero(is_seen))) == seen


def test_what_is_not_visible_does_not_matter():
  (q, k, v, ring, place), *_ = Cases.draw(1, (1, 4, 2, 2, 4, 8))
  place = place._replace(first=jnp.int32(11), size=jnp.int32(3))
  hidden = ~visible(jnp.arange(8), place, 8)[:, None]
  other = KeysValues(*(jnp.where(hidden, 1e4, x) for x in ring))
  one, two = (
    chunk_attention.chunk_attention(q, k, v, each, place, window=8, implementation="xla") for each in (ring, other)
  )
  np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_documents_first_query_has_no_gradient_and_gives_none(dtype):
  """It sees one key, so that rounding noise is all that there could be; a second chunk's queries see more."""
  (q, k, v, ring, place), dy, _ = Cases.draw(1, (2, 3, 4, 2, 64, 8))
  q, k, v, dy, *ring = (x.astype(dtype) for x in (q, k, v, dy, *ring))

  def gradients(x, first):
    at, ahead = place._replace(first=jnp.int32(first)), [a[:, :x] for a in (q, k, v)]
    attend = lambda q, k, v: chunk_attention.chunk_attention(q, k, v, KeysValues(*ring), at, window=8)  # noqa: E731
    y, pull = jax.vjp(attend, *ahead)
    return y, *(np.asarray(d, np.float32) for d in pull(dy[:, :x]))

  y, dq, dk, dv = gradients(1, 0)
  assert not dq.any() and not dk.any() and dv.any()
  np.testing.assert_array_equal(y, np.repeat(v[:, :1], 2, axis=2))
  np.testing.assert_array_equal(gradients(3, 0)[1].any(axis=(0, 2, 3)), [False, True, True])
  assert all(d.any() for d in gradients(1, 5)[1:])


@pytest.mark.parametrize("width", [64, 128])
def test_scores_are_divided_in_float32(width):
  """In bfloat16 1/√128 itself is a thousandth wrong, for all scores alike."""
  arguments, _, options = Cases.draw(2, (2, 32, 4, 2, width, 64))
  one, two = (
    np.asarray(chunk_attention.OPERATION(*arguments, **options, implementation=name), np.float32)
    for name in ("xla", "reference")
  )
  assert np.linalg.norm(one - two) / np.linalg.norm(two) < 0.0022


def shapes(x=64, s=3072, c=64, dtype=jnp.bfloat16):
  struct = lambda *dims: jax.ShapeDtypeStruct(dims, dtype)  # noqa: E731
  ring = KeysValues(*2 * (struct(17, 4, 24, s, c),))
  place = Place(*3 * (jax.ShapeDtypeStruct((), jnp.int32),))
  return (struct(24, x, 8, c), struct(24, x, 4, c), struct(24, x, 4, c), ring, place), struct(24, x, 8, c)


@pytest.mark.parametrize("x", [16, 64, 96])
def test_lowers_for_hopper_with_its_kernels(hopper_kernels, x):
  both = lambda arguments, cotangents: with_gradient(Cases)(arguments, cotangents, window=3072)  # noqa: E731
  assert hopper_kernels(both, *shapes(x)) == 3


def test_says_why_a_kernel_cannot_be_had(pretend_hopper):
  def choice(**shape):
    return chunk_attention.OPERATION.choose(*shapes(**shape)[0], window=64)

  assert choice().reason.startswith("mosaic_gpu not possible: it needs a Hopper GPU")
  with pretend_hopper():
    assert choice().name == "mosaic_gpu"
    for shape, why in (
      ({"s": 100}, "multiple of 64 tokens"),
      ({"c": 32}, "head width"),
      ({"dtype": jnp.float32}, "bfloat16"),
    ):
      assert choice(**shape).name == "xla" and why in choice(**shape).reason


def test_refuses_what_does_not_fit():
  q, k, v, ring, place = Cases.draw(0, (1, 4, 2, 2, 4, 8))[0]
  for wrong in (
    (q[:, :, :1], k, v, ring, place),
    (q, k[:, :3], v, ring, place),
    (q, k, v, ring._replace(k=ring.k[:, :1]), place),
    (q, k, v, ring, place._replace(first=jnp.float32(1))),
    (q.astype(jnp.float32), k, v, ring, place),
  ):
    with pytest.raises(ValueError):
      chunk_attention.OPERATION(*wrong, window=8)
  for window in (0, 9):
    with pytest.raises(ValueError, match="window"):
      chunk_attention.chunk_attention(q, k, v, ring, place, window=window)
