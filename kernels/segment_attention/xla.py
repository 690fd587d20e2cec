"""Segment-confined attention in blocks, in plain JAX, for every platform.

A block of queries visits only the blocks of keys between its earliest segment start and itself, with the running
maximum and sum of flash attention (https://arxiv.org/abs/2205.14135), so that time grows with the segments' lengths
and memory with T. The gradient computes the probabilities again from the stored log-sum-exp.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pgolf_jax.kernels.numerics import wide_product
from pgolf_jax.kernels.segment_attention import padded_starts, without_lone_queries

_MASKED = -1e30  # finite, so that a block with no visible key leaves the running maximum defined


class _Blocks(NamedTuple):
  """Arrays cut into N blocks of S positions. The block and B lead; heads stand before positions."""

  q: jax.Array  # [N, B, K, G, S, C]
  k: jax.Array  # [N, B, K, S, C]
  v: jax.Array  # [N, B, K, S, C]
  start: jax.Array  # [N, B, S]


def _cut(x_BxTxHxC: jax.Array, size: int, kv_heads: int | None = None) -> jax.Array:
  B, T, H, C = x_BxTxHxC.shape
  x = x_BxTxHxC.reshape(B, T // size, size, H, C).transpose(1, 0, 3, 2, 4)
  return x if kv_heads is None else x.reshape(T // size, B, kv_heads, H // kv_heads, size, C)


def _join(x: jax.Array) -> jax.Array:
  """Undoes `_cut`: [N, B, K, (G,) S, C] → [B, N·S, K·G, C]."""
  N, B, *_, S, C = x.shape
  x = x.reshape(N, B, -1, S, C)
  return x.transpose(1, 0, 3, 2, 4).reshape(B, N * S, x.shape[2], C)


def _visible(start_BxS: jax.Array, query_block, key_block) -> jax.Array:
  """Returns [B, 1, 1, S, S]: whether each query of one block sees each key of the other."""
  S = start_BxS.shape[-1]
  within = jnp.arange(S)
  key = key_block * S + within
  query = query_block * S + within
  return ((key[None, None] >= start_BxS[:, :, None]) & (key[None] <= query[:, None])[None])[:, None, None]


def _first_key_block(start_BxS: jax.Array) -> jax.Array:
  return jnp.min(start_BxS) // start_BxS.shape[-1]


def _forward(blocks: _Blocks, scale: float) -> tuple[jax.Array, jax.Array]:
  """Returns y [N, B, K, G, S, C] and the log-sum-exp of the scaled scores [N, B, K, G, S]."""

  def query_block(i):
    q, start = blocks.q[i], blocks.start[i]

    def key_block(j, carry):
      largest, total, y = carry
      s = jnp.where(_visible(start, i, j), wide_product("bkgsc,bktc->bkgst", q, blocks.k[j]) * scale, _MASKED)
      new_largest = jnp.maximum(largest, s.max(axis=-1))
      p = jnp.where(s > _MASKED, jnp.exp(s - new_largest[..., None]), 0.0)
      fade = jnp.exp(largest - new_largest)
      total = total * fade + p.sum(axis=-1)
      y = y * fade[..., None] + wide_product("bkgst,bktc->bkgsc", p.astype(q.dtype), blocks.v[j])
      return new_largest, total, y

    rows = q.shape[:-1]
    init = (jnp.full(rows, _MASKED), jnp.zeros(rows), jnp.zeros(q.shape, jnp.float32))
    largest, total, y = lax.fori_loop(_first_key_block(start), i + 1, key_block, init)
    return (y / total[..., None]).astype(q.dtype), largest + jnp.log(total)

  return lax.map(query_block, jnp.arange(blocks.q.shape[0]))


def _backward(blocks: _Blocks, y, lse, dy, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the gradients of q, k and v, cut into the same blocks; those of k and v in float32."""
  delta = (y.astype(jnp.float32) * dy.astype(jnp.float32)).sum(axis=-1)
  B, K, G, S, C = blocks.q.shape[1:]
  # A key's queries lie on one axis of G·S: XLA's CPU backend of jax 0.12 multiplies no bfloat16 with two such axes.

  def query_block(carry, i):
    start = blocks.start[i]
    q_BxKxQxC, dy_BxKxQxC = (x.reshape(B, K, G * S, C) for x in (blocks.q[i], dy[i]))

    def key_block(j, carry):
      # Keys stand before queries, so that dk and dv are products of scores as they lie in memory; only dq, which is
      # smaller, is transposed, at the end.
      dq_t, dk, dv = carry
      k, v = blocks.k[j], blocks.v[j]
      s, dp = (
        wide_product("bktc,bkqc->bktq", *pair).reshape(B, K, S, G, S) for pair in ((k, q_BxKxQxC), (v, dy_BxKxQxC))
      )
      visible = _visible(start, i, j)[:, :, 0].swapaxes(2, 3)[:, :, :, None]
      p = jnp.where(visible, jnp.exp(s * scale - lse[i][:, :, None]), 0.0)
      ds = p * (dp - delta[i][:, :, None]) * scale
      p, ds = (x.astype(q_BxKxQxC.dtype).reshape(B, K, S, G * S) for x in (p, ds))
      dq_t = dq_t + wide_product("bkct,bktq->bkcq", k.swapaxes(2, 3), ds)
      dk_j, dv_j = (wide_product("bktq,bkqc->bktc", *pair) for pair in ((ds, q_BxKxQxC), (p, dy_BxKxQxC)))
      return dq_t, dk.at[j].add(dk_j), dv.at[j].add(dv_j)

    init = (jnp.zeros((B, K, C, G * S), jnp.float32), *carry)
    dq_t, *carry = lax.fori_loop(_first_key_block(start), i + 1, key_block, init)
    return tuple(carry), dq_t.swapaxes(2, 3).reshape(B, K, G, S, C).astype(blocks.q.dtype)

  zeros = jnp.zeros(blocks.k.shape, jnp.float32)
  (dk, dv), dq = lax.scan(query_block, (zeros, zeros), jnp.arange(blocks.q.shape[0]))
  return dq, dk, dv


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, start, size):
  return _attend_forward(q, k, v, start, size)[0]


def _block(q, k, v, start, size: int) -> _Blocks:
  B, T = start.shape
  K = k.shape[2]
  return _Blocks(_cut(q, size, K), _cut(k, size), _cut(v, size), start.reshape(B, T // size, size).swapaxes(0, 1))


def _attend_forward(q, k, v, start, size):
  y, lse = _forward(_block(q, k, v, start, size), q.shape[-1] ** -0.5)
  return _join(y), (q, k, v, start, y, lse)


def _attend_backward(size, residuals, dy):
  q, k, v, start, y, lse = residuals
  dy = _cut(dy, size, k.shape[2])
  dq, dk, dv = _backward(_block(q, k, v, start, size), y, lse, dy, q.shape[-1] ** -0.5)
  return _join(dq), _join(dk).astype(k.dtype), _join(dv).astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def segment_attention(q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, start_BxT, *, max_segment: int) -> jax.Array:
  """Computes the operation. Rows of any length are padded to whole blocks."""
  T, q_BxTxHxC = q_BxTxHxC.shape[1], without_lone_queries(q_BxTxHxC, start_BxT)
  # Larger blocks waste work at segment starts, smaller ones have a higher cost for each block.
  size = min(256, max(16, 1 << (min(max_segment, T) - 1).bit_length()))
  padding = -T % size
  if padding:
    q_BxTxHxC, k_BxTxKxC, v_BxTxKxC = (
      jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q_BxTxHxC, k_BxTxKxC, v_BxTxKxC)
    )
    start_BxT = padded_starts(start_BxT, size)
  return _attend(q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, start_BxT, size)[:, :T]
