"""Segment-confined attention for TPUs: JAX's splash attention with segment ids, over windows of the row.

Splash attention skips blocks by a static mask alone. A query sees at most `max_segment` keys, so the row is cut into
chunks of that length, and each chunk's queries get the keys of their own chunk and of the one before. The work grows
with T · max_segment, and the static mask, which is computed when the program is traced, stays small. Segment ids then
say which of these keys belong to the query's segment.
"""

import functools

import jax
import jax.numpy as jnp

from pgolf_jax.kernels.segment_attention import without_lone_queries

try:
  from jax.experimental.pallas.ops.tpu import splash_attention as splash
except ImportError:  # a later JAX may move it: `obstacle` then refuses, and the operation takes another backend
  splash = None

_LANES = 128
_BLOCKS = (512, 256, 128)
"""Possible rows in a block of queries and in a block of keys; the largest that divides a chunk is taken."""
_NOBODY = -1
"""Segment id of keys before the row. The id of every other position is the first position of its segment."""


def obstacle(q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, start_BxT, *, max_segment: int) -> str | None:
  """Returns why this backend cannot compute the operation for these shapes and types, or None."""
  if splash is None:
    return f"JAX {jax.__version__} has no jax.experimental.pallas.ops.tpu.splash_attention"
  if q_BxTxHxC.dtype not in (jnp.bfloat16, jnp.float32):
    return f"it needs bfloat16 or float32, not {q_BxTxHxC.dtype}"
  if q_BxTxHxC.shape[3] not in (64, 128, 256):
    return f"it needs a head width of 64, 128 or 256, not {q_BxTxHxC.shape[3]}"
  return None


def segment_attention(
  q_BxTxHxC: jax.Array, k_BxTxKxC: jax.Array, v_BxTxKxC: jax.Array, start_BxT: jax.Array, *, max_segment: int
) -> jax.Array:
  """Computes the operation. Rows of any length are padded to whole chunks."""
  B, T, H, C = q_BxTxHxC.shape
  size = -(-min(max_segment, T) // _LANES) * _LANES
  padding = -T % size
  q = without_lone_queries(q_BxTxHxC, start_BxT) * C**-0.5
  q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k_BxTxKxC, v_BxTxKxC))
  # Padded positions are segments of one token each.
  itself = jnp.broadcast_to(jnp.arange(T, T + padding, dtype=start_BxT.dtype), (B, padding))
  id_BxT = jnp.concatenate([start_BxT, itself], axis=1).astype(jnp.int32)

  chunks = (T + padding) // size
  q, k, v = (x.reshape(B, chunks, size, -1, C) for x in (q, k, v))
  query_id = key_id = id_BxT.reshape(B, chunks, size)
  if chunks > 1:
    k, v = _with_chunk_before(k, 0), _with_chunk_before(v, 0)
    key_id = _with_chunk_before(key_id, _NOBODY)

  def attend(q, k, v, query_id, key_id):
    kernel = _kernel(H, size, k.shape[0])
    y = kernel(*(x.swapaxes(0, 1) for x in (q, k, v)), splash.SegmentIds(query_id, key_id))
    return y.swapaxes(0, 1)

  by_chunk = (x.reshape(B * chunks, *x.shape[2:]) for x in (q, k, v, query_id, key_id))
  y = jax.vmap(attend)(*by_chunk)
  return y.reshape(B, T + padding, H, C)[:, :T]


def _with_chunk_before(x_BxNxS: jax.Array, first: int) -> jax.Array:
  """Puts each chunk behind the one before it, [B, N, S, …] → [B, N, 2S, …], and the first behind `first`."""
  before = jnp.pad(x_BxNxS[:, :-1], ((0, 0), (1, 0), *[(0, 0)] * (x_BxNxS.ndim - 2)), constant_values=first)
  return jnp.concatenate([before, x_BxNxS], axis=2)


@functools.lru_cache(maxsize=32)
def _kernel(heads: int, queries: int, keys: int, interpret: bool = False):
  """Returns splash attention for a chunk's queries, which are the last of `keys` positions.

  Each query sees itself and the `queries` − 1 positions before it.

  Args:
    interpret: run in Pallas' interpreter, on any device, for tests.
  """
  mask = splash.LocalMask((queries, keys), window_size=(queries - 1, 0), offset=keys - queries)
  block = next(size for size in _BLOCKS if queries % size == 0)
  names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
  with jax.ensure_compile_time_eval():  # the mask's blocks are constants that later traces use again
    return splash.make_splash_mha(
      splash.MultiHeadMask([mask] * heads),
      block_sizes=splash.BlockSizes(**dict.fromkeys(names, block)),
      head_shards=1,
      q_seq_shards=1,
      interpret=interpret,
    )
