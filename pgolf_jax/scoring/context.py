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

from pgolf_jax.kernels.chunk_attention import KeysValues, Place, chunk_attention
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


@dataclasses.dataclass(frozen=True)
class Ring:
  """Keys and values of the last `seq_len` tokens, in a ring.

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
    window = min(shape.window, self.seq_len)  # what is further has not been written to yet

    def attend(position, q, k, v):
      place = Place(position, chunk.first, chunk.size)
      return chunk_attention(q, k, v, memory, place, window=window), KeysValues(k, v)

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


def choose_context(settings: Settings, dtype: np.dtype) -> ChunkContext:
  """Returns the method that the settings name."""
  method = {"exact": Window, "cached": Ring}[settings.ttt.method]
  return method(settings.model, settings.ttt.seq_len, np.dtype(dtype))
