"""Segment-confined attention for TPUs: JAX's splash attention with segment ids, over windows of the row.

Splash attention skips blocks by a static mask alone. A query sees at most `max_segment` keys, so the row is cut into
chunks of that length and each chunk's queries are given the keys of their own chunk and of the one before: the work
grows with T · max_segment, and the static mask, worked out when the program is traced, stays small. Which of these
keys belong to the query's segment is then decided by segment ids.
"""

import functools

import jax
import jax.numpy as jnp

try:
  from jax.experimental.pallas.ops.tpu import splash_attention as splash
except ImportError:  # a later JAX may move it: the operation then runs without it
  splash = None

_LANES = 128
_BLOCKS = (512, 256, 128)
"""Rows of a block of queries and of a block of keys; the largest that divides a chunk is taken."""
_NOBODY = -1
"""Segment id of keys before the row; queries have their segment's first position for an id."""


def obstacle(q_BxTxHxC) -> str | None:
  """Why queries of this shape and type cannot take this backend, or None."""
  if splash is None:
    return f"JAX {jax.__version__} has no splash attention where it is looked for"
  if q_BxTxHxC.dtype not in (jnp.bfloat16, jnp.float32):
    return f"it needs bfloat16 or float32, not {q_BxTxHxC.dtype}"
  if q_BxTxHxC.shape[3] not in (64, 128, 256):
    return f"it needs a head width of 64, 128 or 256, not {q_BxTxHxC.shape[3]}"
  return None


def segment_attention(
  q_BxTxHxC: jax.Array,
  k_BxTxKxC: jax.Array,
  v_BxTxKxC: jax.Array,
  start_BxT: jax.Array,
  *,
  max_segment: int,
  interpret: bool = False,
) -> jax.Array:
  """The operation of api.py. Rows of any length: they are padded to whole chunks.

  Args:
    interpret: run in Pallas' interpreter, on any device.
  """
  B, T, H, C = q_BxTxHxC.shape
  size = -(-min(max_segment, T) // _LANES) * _LANES
  padding = -T % size
  q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q_BxTxHxC * C**-0.5, k_BxTxKxC, v_BxTxKxC))
  # Padded positions are segments of one token each.
  own = jnp.broadcast_to(jnp.arange(T, T + padding, dtype=start_BxT.dtype), (B, padding))
  id_BxT = jnp.concatenate([start_BxT, own], axis=1).astype(jnp.int32)

  chunks = (T + padding) // size
  q, k, v = (x.reshape(B, chunks, size, -1, C) for x in (q, k, v))
  query_id = key_id = id_BxT.reshape(B, chunks, size)
  if chunks > 1:
    k, v = _with_chunk_before(k, 0), _with_chunk_before(v, 0)
    key_id = _with_chunk_before(key_id, _NOBODY)

  def attend(q, k, v, query_id, key_id):
    kernel = _kernel(H, size, k.shape[0], interpret)
    y = kernel(*(x.swapaxes(0, 1) for x in (q, k, v)), splash.SegmentIds(query_id, key_id))
    return y.swapaxes(0, 1)

  join = lambda x: x.reshape(B * chunks, *x.shape[2:])  # noqa: E731
  y = jax.vmap(attend)(*map(join, (q, k, v, query_id, key_id)))
  return y.reshape(B, T + padding, H, C)[:, :T]


def _with_chunk_before(x_BxNxS: jax.Array, first: int) -> jax.Array:
  """[B, N, S, …] → [B, N, 2S, …]: each chunk behind the one before it; before the first stands `first`."""
  before = jnp.pad(x_BxNxS[:, :-1], ((0, 0), (1, 0), *[(0, 0)] * (x_BxNxS.ndim - 2)), constant_values=first)
  return jnp.concatenate([before, x_BxNxS], axis=2)


@functools.lru_cache(maxsize=32)
def _kernel(heads: int, queries: int, keys: int, interpret: bool):
  """Splash attention of a chunk's queries, the last of `keys` positions, each over itself and `queries` − 1 before."""
  mask = splash.LocalMask((queries, keys), window_size=(queries - 1, 0), offset=keys - queries)
  block = next(size for size in _BLOCKS if queries % size == 0)
  names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
  with jax.ensure_compile_time_eval():  # the mask's blocks are constants, kept from one trace to the next
    return splash.make_splash_mha(
      splash.MultiHeadMask([mask] * heads),
      block_sizes=splash.BlockSizes(**dict.fromkeys(names, block)),
      head_shards=1,
      q_seq_shards=1,
      interpret=interpret,
    )
