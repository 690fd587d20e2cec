"""Cached evaluation: a chunk goes on from the keys and values of earlier chunks as they were computed.

Nothing of the window but the chunk itself is computed again, and the gradient runs through the chunk alone. Earlier
keys and values come from adapters as they were then: another algorithm than the exact one, as legal, and many times
cheaper. A window's tokens are the last `seq_len` up to the end of the chunk; they are kept in a ring.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pgolf_jax.model.adapters import Adaptation, Adapters
from pgolf_jax.model.context import Context
from pgolf_jax.model.gpt import bind
from pgolf_jax.model.params import Params, layer_order
from pgolf_jax.scoring.window import Rows
from pgolf_jax.settings.config import ModelConfig


class Memory(NamedTuple):
  """Keys (after rotation) and values of the last S tokens, for each position of the layer list and each row.

  Token t of a document is at t mod S; what is there from the batch before is never read.
  """

  k: jax.Array  # [P, B, S, K, C]
  v: jax.Array


class Kept(NamedTuple):
  """A chunk's own keys and values."""

  k: jax.Array  # [P, B, X, K, C]
  v: jax.Array


def memory_shape(config: ModelConfig, rows: int, seq_len: int) -> tuple[int, ...]:
  positions = sum(map(len, layer_order(config, True)))
  return positions, rows, seq_len, config.num_kv_heads, config.head_dim


def forward(
  config: ModelConfig,
  params: Params,
  memory: Memory,
  stream_N: jax.Array,
  rows: Rows,
  chunk: jax.Array,
  size: jax.Array,
  adapters: Adapters,
  scale: float,
  dtype,
  *,
  width: int,
  window: int,
) -> tuple[jax.Array, Kept]:
  """Hidden states [B, X, D] of chunk number `chunk`, and its keys and values.

  Args:
    window: earlier tokens beyond this many from the ring's beginning are not there yet; a static bound.
  """
  first = chunk * size
  within = jnp.arange(width)
  at = rows.start[:, None] + first + within
  tokens = jnp.where(first + within < rows.targets[:, None], stream_N[at], 0)
  before = stream_N[jnp.maximum(rows.start + first - 1, 0)]
  seq_len = memory.k.shape[2]
  place = jnp.arange(min(window, seq_len))
  # Those that the chunk will overwrite have left its window.
  visible = (place < first) & ((place - first) % seq_len >= size)

  def attend(position, q, k, v):
    earlier = (x[position, :, : len(place)] for x in memory)
    return attention(q, k, v, *earlier, visible), Kept(k, v)

  context = Context(attend, looping=True, dtype=dtype, first_position=first, before_B=before)
  output = bind(config, params)(tokens, context, Adaptation(adapters, scale))
  return output.hidden, jax.tree.map(lambda *x: jnp.stack(x), *output.cache)


def attention(q_BxXxHxC, k_BxXxKxC, v_BxXxKxC, kept_k_BxSxKxC, kept_v_BxSxKxC, visible_S) -> jax.Array:
  """Causal attention of a chunk over itself and over the visible ones of the kept keys; softmax in float32."""
  B, X, H, C = q_BxXxHxC.shape
  K = k_BxXxKxC.shape[2]
  q = q_BxXxHxC.reshape(B, X, K, H // K, C)

  def scores(keys):
    return jnp.einsum("bxkgc,bskc->bkgxs", q, keys, preferred_element_type=jnp.float32) * C**-0.5

  causal = jnp.arange(X)[:, None] >= jnp.arange(X)
  s = jnp.concatenate(
    [jnp.where(visible_S, scores(kept_k_BxSxKxC), -jnp.inf), jnp.where(causal, scores(k_BxXxKxC), -jnp.inf)], axis=-1
  )
  p = jax.nn.softmax(s, axis=-1).astype(q.dtype)
  S = visible_S.shape[0]
  # A place never written holds whatever the last batch left; its weight is exactly zero.
  y = jnp.einsum("bkgxs,bskc->bxkgc", p[..., :S], kept_v_BxSxKxC) + jnp.einsum(
    "bkgxs,bskc->bxkgc", p[..., S:], v_BxXxKxC
  )
  return y.reshape(B, X, H, C)


def write(memory: Memory, kept: Kept, chunk: jax.Array, size: jax.Array) -> Memory:
  """The ring with a chunk's keys and values in it."""
  seq_len = memory.k.shape[2]
  within = jnp.arange(kept.k.shape[2])
  place = jnp.where(within < size, (chunk * size + within) % seq_len, seq_len)
  return Memory(*(m.at[:, :, place].set(x.astype(m.dtype), mode="drop") for m, x in zip(memory, kept, strict=True)))
