"""Attention of a chunk of each document over a ring of earlier keys and over itself."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pgolf_jax.kernels.operation import Operation
from pgolf_jax.kernels.segment_attention import without_lone_queries


class KeysValues(NamedTuple):
  """Keys (after rotation) and values, of a chunk or of a ring.

  A ring holds the last S tokens of each row's document, token t at t mod S, for P positions of a layer list.
  """

  k: jax.Array  # [B, X, K, C], or [P, K, B, S, C]
  v: jax.Array


class Place(NamedTuple):
  """Where a chunk stands: three integers, which may be traced."""

  position: jax.Array | int  # of the layer list
  first: jax.Array | int  # the chunk's first token, counted from its document's
  size: jax.Array | int  # tokens of the chunk, at most X


def _check(q_BxXxHxC, k_BxXxKxC, v_BxXxKxC, ring: KeysValues, place: Place, *, window: int) -> None:
  q, k, v = q_BxXxHxC, k_BxXxKxC, v_BxXxKxC
  if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
    raise ValueError(f"q [B, X, H, C], k and v [B, X, K, C] do not fit: {q.shape=}, {k.shape=}, {v.shape=}")
  if q.shape[2] % k.shape[2]:
    raise ValueError(f"the {q.shape[2]} query heads must be a multiple of the {k.shape[2]} key/value heads")
  for x in ring:
    if x.ndim != 5 or x.shape[1] != k.shape[2] or x.shape[2] < q.shape[0] or x.shape[4] != q.shape[3]:
      raise ValueError(f"a ring must be [P, K, B or more, S, C], not {x.shape}, for {q.shape=} and {k.shape=}")
  dtypes = {x.dtype for x in (q, k, v, *ring)}
  if len(dtypes) > 1 or not jnp.issubdtype(q.dtype, jnp.floating):
    raise ValueError(f"all must have one floating type, not {', '.join(map(str, dtypes))}")
  if any(jnp.ndim(x) or not jnp.issubdtype(jnp.result_type(x), jnp.integer) for x in place):
    raise ValueError(f"a place is three integers, not {place}")
  if not 1 <= window <= ring.k.shape[3]:
    raise ValueError(f"{window=} must be from 1 to the {ring.k.shape[3]} tokens of the ring")


OPERATION = Operation("chunk_attention", _check, ("mosaic_gpu", "xla", "reference"))


def chunk_attention(
  q_BxXxHxC: Float[Array, "B X H C"],
  k_BxXxKxC: Float[Array, "B X K C"],
  v_BxXxKxC: Float[Array, "B X K C"],
  ring: KeysValues,
  place: Place,
  *,
  window: int,
  implementation: str | None = None,
) -> Float[Array, "B X H C"]:
  """Returns the softmax average of values over the chunk's keys up to each query's own, and over visible earlier ones.

  Visible are the tokens before the chunk that it will not overwrite; elsewhere the ring may hold anything finite. The
  ring has no gradient: nothing is learnt through it. Scores, which are divided by √C, softmax and sums are float32.

  Args:
    ring: may have more rows than the chunk, whose rows are the first.
    window: static bound: nothing is visible at this place of the ring or after it.
    implementation: a backend to insist on, or None to take the first that is possible.

  Raises:
    ValueError: shapes or types do not fit together, or the implementation is unknown or not possible.
  """
  # A document's first query alone sees one key.
  start_1xX = jnp.full((1, q_BxXxHxC.shape[1]), jnp.where(place.first == 0, 0, -1))
  arguments = without_lone_queries(q_BxXxHxC, start_1xX), k_BxXxKxC, v_BxXxKxC, ring, place
  return OPERATION(*arguments, window=window, implementation=implementation)


def visible(key: jax.Array, place: Place, ring_length: int) -> jax.Array:
  """Returns which of these places of a ring, integers of any shape, hold tokens that the chunk sees."""
  overwritten = jax.lax.rem(place.first, ring_length)
  end = overwritten + place.size
  return (key < place.first) & ((key < overwritten) | (key >= end)) & (key >= end - ring_length)
