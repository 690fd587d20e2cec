"""How a chunk sees what came before it in its document, by one of two methods.

`Window` computes the chunk's window afresh: exact, and the gradient runs through all of it. `Ring` goes on from the
keys and values of earlier chunks as they were computed then: nothing but the chunk is computed, and the gradient runs
through the chunk alone. It is another algorithm, as legal, and many times cheaper.

Letters: B rows of a device that take part, W tokens of a window, X targets of a chunk (its width), S tokens of the
ring; the rest as in model/__init__.py.
"""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pgolf_jax.kernels.numerics import wide_product
from pgolf_jax.model import Context, segments
from pgolf_jax.model.adapters import Adaptation
from pgolf_jax.model.flops import positions
from pgolf_jax.model.gpt import bind
from pgolf_jax.model.params import Params
from pgolf_jax.scoring.buckets import Shape
from pgolf_jax.settings import ModelConfig, Settings


class Rows(NamedTuple):
  """The documents of a batch, one a row; a row without a document has no targets."""

  start: jax.Array  # [B] position of the bos in the stream
  targets: jax.Array  # [B]
  learns: jax.Array  # [B] bool
  moving: jax.Array  # [B] chunks from which some document of the row's batch learns


class Chunk(NamedTuple):
  """Chunk k of the document in each row."""

  stream_N: jax.Array
  rows: Rows
  k: jax.Array
  size: jax.Array  # targets of a chunk

  @property
  def first(self) -> jax.Array:
    """The chunk's first target, counted from the document's first."""
    return self.k * self.size

  def valid(self, width: int) -> Bool[Array, "B X"]:
    """Returns which targets are the chunk's; rows end at their document's end."""
    within_X = jnp.arange(width)
    return (within_X < self.size) & (self.first + within_X < self.rows.targets[:, None])

  def targets(self, width: int) -> Int[Array, "B X"]:
    """Returns the targets; 0 beyond the chunk's end."""
    return jnp.where(self.valid(width), self.tokens_from(self.first + 1, width), 0)

  def tokens_from(self, first: jax.Array, count: int) -> Int[Array, "B count"]:
    """Returns tokens of each row from the stream, from a place counted from the document's bos, [B] or one for all."""
    return self.stream_N[(self.rows.start + first)[:, None] + jnp.arange(count)]

  @property
  def teaches_B(self) -> Bool[Array, "B"]:
    """Whether the row learns from the chunk; a document's last chunk teaches nothing."""
    return self.rows.learns & (self.rows.targets > self.first + self.size)

  @property
  def moves_B(self) -> Bool[Array, "B"]:
    """Whether the row's adapters take the chunk's steps: as long as any document of its batch learns."""
    return self.k < self.rows.moving


class ChunkContext(Protocol):
  """A method by which chunks see their past. Memories are trees of arrays [P, …, B, …, …], or empty."""

  def memory_shapes(self, rows: int):
    """Returns the shapes of a memory of this many rows."""

  def hidden(
    self, params: Params, adaptation: Adaptation, memory, chunk: Chunk, shape: Shape
  ) -> tuple[Float[Array, "B X D"], object]:
    """Returns the hidden states before the chunk's targets, and what `remember` needs."""

  def remember(self, memory, fresh, chunk: Chunk):
    """Returns the memory after the chunk."""


@dataclasses.dataclass(frozen=True)
class Window:
  """Windows of at most `seq_len` tokens that end at the chunk's end, computed afresh; nothing is remembered."""

  model: ModelConfig
  seq_len: int
  dtype: np.dtype

  def memory_shapes(self, rows: int):
    """Returns an empty tree."""
    del rows
    return ()

  def hidden(self, params, adaptation, memory, chunk, shape):
    """See `ChunkContext`."""
    del memory
    end_B = jnp.minimum(chunk.first + chunk.size, chunk.rows.targets)
    start_B = jnp.maximum(end_B - self.seq_len, 0)
    length_B = jnp.where(end_B > chunk.first, end_B - start_B, 0)
    within_window = jnp.arange(shape.window) < length_B[:, None]
    tokens_BxW = jnp.where(within_window, chunk.tokens_from(start_B, shape.window), 0)
    hidden_BxWxD = self.forward(params, adaptation, tokens_BxW)
    at_BxX = jnp.clip(chunk.first + jnp.arange(shape.width) - start_B[:, None], 0, shape.window - 1)
    return jnp.take_along_axis(hidden_BxWxD, at_BxX[..., None], axis=1), ()

  def forward(self, params: Params, adaptation: Adaptation, tokens_BxW: Int[Array, "B W"]) -> Float[Array, "B W D"]:
    """Returns the hidden states of rows that begin a document."""
    start = jnp.zeros_like(tokens_BxW)
    context = segments(start, max_segment=tokens_BxW.shape[1], looping=True, dtype=self.dtype)
    return bind(self.model, params)(tokens_BxW, context, adaptation).hidden

  def remember(self, memory, fresh, chunk):
    """See `ChunkContext`."""
    del fresh, chunk
    return memory


class KeysValues(NamedTuple):
  """Keys (after rotation) and values of a chunk, [B, X, K, C], or of the ring, [P, K, B, S, C]."""

  k: jax.Array
  v: jax.Array


@dataclasses.dataclass(frozen=True)
class Ring:
  """Keys and values of the last `seq_len` tokens: token t of a document is at t mod `seq_len`.

  What the batch before has left in the ring is never read.
  """

  model: ModelConfig
  seq_len: int
  dtype: np.dtype

  def memory_shapes(self, rows: int) -> KeysValues:
    """Returns the ring's shapes."""
    m = self.model
    shape = (positions(m, looping=True), m.num_kv_heads, rows, self.seq_len, m.head_dim)
    return KeysValues(*2 * (jax.ShapeDtypeStruct(shape, self.dtype),))

  def hidden(self, params, adaptation, memory, chunk, shape):
    """See `ChunkContext`."""
    in_document = chunk.first + jnp.arange(shape.width) < chunk.rows.targets[:, None]
    tokens_BxX = jnp.where(in_document, chunk.tokens_from(chunk.first, shape.width), 0)
    before_B = chunk.stream_N[jnp.maximum(chunk.rows.start + chunk.first - 1, 0)]
    # Places beyond the shape's window have not been written to yet: a static bound.
    place_S = jnp.arange(min(shape.window, self.seq_len))
    # Tokens that the chunk will overwrite have left its window.
    visible_S = (place_S < chunk.first) & ((place_S - chunk.first) % self.seq_len >= chunk.size)

    def attend(position, q, k, v):
      earlier = KeysValues(*(x[position, :, : shape.slots, : len(place_S)] for x in memory))
      return attention(q, KeysValues(k, v), earlier, visible_S), KeysValues(k, v)

    context = Context(attend, looping=True, dtype=self.dtype, first_position=chunk.first, before_B=before_B)
    output = bind(self.model, params)(tokens_BxX, context, adaptation)
    return output.hidden, jax.tree.map(lambda *x: jnp.stack(x), *output.cache)

  def remember(self, memory, fresh, chunk):
    """See `ChunkContext`."""
    rows, within_X = fresh.k.shape[1], jnp.arange(fresh.k.shape[2])
    place_X = jnp.where(within_X < chunk.size, (chunk.first + within_X) % self.seq_len, self.seq_len)

    def put(old, new_PxBxXxKxC):
      new = new_PxBxXxKxC.transpose(0, 3, 1, 2, 4).astype(old.dtype)
      return old.at[:, :, :rows, place_X].set(new, mode="drop")

    return jax.tree.map(put, memory, fresh)


@jax.custom_vjp
def attention(
  q_BxXxHxC: jax.Array, chunk: KeysValues, earlier: KeysValues, visible_S: Bool[Array, "S"]
) -> Float[Array, "B X H C"]:
  """Causal attention of a chunk over itself and over the visible ones of earlier keys; softmax in float32.

  Nothing is learnt through earlier keys: their gradient is taken to be zero.

  Args:
    chunk: keys and values of the chunk, [B, X, K, C].
    earlier: of the ring, [K, B, S, C].
  """
  return _attention_forward(q_BxXxHxC, chunk, earlier, visible_S)[0]


def _by_head(x_BxXxHxC: jax.Array, K: int) -> jax.Array:
  """Returns [K, B, X·G, C]: the G query heads of a key head stand beside one another, so that products are plain."""
  B, X, H, C = x_BxXxHxC.shape
  return x_BxXxHxC.reshape(B, X, K, H // K, C).transpose(2, 0, 1, 3, 4).reshape(K, B, X * H // K, C)


def _by_token(x_KxBxQxC: jax.Array, X: int) -> jax.Array:
  """Inverse of `_by_head`."""
  K, B, Q, C = x_KxBxQxC.shape
  return x_KxBxQxC.reshape(K, B, X, Q // X, C).transpose(1, 2, 0, 3, 4).reshape(B, X, K * Q // X, C)


def _attention_forward(q_BxXxHxC, chunk, earlier, visible_S):
  X, K, C = q_BxXxHxC.shape[1], chunk.k.shape[2], q_BxXxHxC.shape[3]
  q, k, v = (_by_head(x, K) for x in (q_BxXxHxC * C**-0.5, *chunk))
  causal_QxX = jnp.arange(q.shape[2])[:, None] // (q.shape[2] // X) >= jnp.arange(X)
  scores = [
    jnp.where(visible, wide_product("kbqc,kbsc->kbqs", q, keys), -jnp.inf)
    for visible, keys in ((visible_S, earlier.k), (causal_QxX, k))
  ]
  largest = jnp.maximum(*(s.max(axis=-1, keepdims=True) for s in scores))
  # A place never written holds whatever the last batch left; its weight is exactly zero.
  p = [jnp.exp(s - largest) for s in scores]
  total = sum(x.sum(axis=-1, keepdims=True) for x in p)
  p = [x.astype(q.dtype) for x in p]
  y = sum(wide_product("kbqs,kbsc->kbqc", x, values) for x, values in zip(p, (earlier.v, v), strict=True)) / total
  return _by_token(y, X).astype(q.dtype), (q, KeysValues(k, v), earlier, p, total, y)


def _attention_backward(residuals, dy_BxXxHxC):
  q, chunk, earlier, p, total, y = residuals
  K, X, C = *chunk.k.shape[::2], q.shape[3]
  dy = _by_head(dy_BxXxHxC, K) / total
  delta, dy = jnp.sum(dy * y, axis=-1, keepdims=True), dy.astype(q.dtype)
  ds = [
    (x * (wide_product("kbqc,kbsc->kbqs", dy, values) - delta)).astype(q.dtype)
    for x, values in zip(p, (earlier.v, chunk.v), strict=True)
  ]
  dq = sum(wide_product("kbqs,kbsc->kbqc", x, keys) for x, keys in zip(ds, (earlier.k, chunk.k), strict=True))
  dk, dv = (wide_product("kbqs,kbqc->kbsc", *pair) for pair in ((ds[1], q), (p[1], dy)))
  dq, dk, dv = (_by_token(x, X).astype(q.dtype) for x in (dq * C**-0.5, dk, dv))
  return dq, KeysValues(dk, dv), None, None


attention.defvjp(_attention_forward, _attention_backward)


def choose_context(settings: Settings, dtype: np.dtype) -> ChunkContext:
  """Returns the method that the settings name."""
  method = {"exact": Window, "cached": Ring}[settings.ttt.method]
  return method(settings.model, settings.ttt.seq_len, np.dtype(dtype))
