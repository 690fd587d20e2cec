"""Segment-confined causal attention with grouped heads.

Every backend keeps segments apart, or its `obstacle` refuses the call: none attends across documents.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pgolf_jax.kernels.operation import Operation


def _check(q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, start_BxT, *, max_segment: int) -> None:
  q, k, v, start = q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, start_BxT
  if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
    raise ValueError(f"q [B, T, H, C], k and v [B, T, K, C] do not fit: {q.shape=}, {k.shape=}, {v.shape=}")
  if q.shape[2] % k.shape[2]:
    raise ValueError(f"the {q.shape[2]} query heads must be a multiple of the {k.shape[2]} key/value heads")
  if start.shape != q.shape[:2] or not jnp.issubdtype(start.dtype, jnp.integer):
    raise ValueError(f"start must be integers of shape {q.shape[:2]}, not {start.dtype} {start.shape}")
  if not (jnp.issubdtype(q.dtype, jnp.floating) and q.dtype == k.dtype == v.dtype):
    raise ValueError(f"q, k and v must have one floating type, not {q.dtype}, {k.dtype} and {v.dtype}")
  if max_segment < 1:
    raise ValueError(f"{max_segment=} must be positive")


OPERATION = Operation("segment_attention", _check)


def segment_attention(
  q_BxTxHxC: Float[Array, "B T H C"],
  k_BxTxKxC: Float[Array, "B T K C"],
  v_BxTxKxC: Float[Array, "B T K C"],
  start_BxT: Int[Array, "B T"],
  *,
  max_segment: int,
  implementation: str | None = None,
) -> Float[Array, "B T H C"]:
  """Returns y_t = Σ_j p_tj v_j with p_t the softmax of q_t · k_j / √C over start[t] ≤ j ≤ t.

  Each key/value head serves H/K consecutive query heads. Scores, softmax and sums are float32. A query that sees one
  key has a gradient of exactly zero, and gives that key none.

  Args:
    start_BxT: where each query's segment begins, the first key that it may see. Segments are stretches of a row:
      start[j] = start[t] for every start[t] ≤ j ≤ t, and 0 ≤ t − start[t] < max_segment.
    max_segment: static bound on the length of a segment, in tokens.
    implementation: a backend to insist on, or None to take the first that is possible.

  Raises:
    ValueError: shapes or types do not fit together, or the implementation is unknown or not possible.
  """
  arguments = q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, start_BxT
  return OPERATION(*arguments, max_segment=max_segment, implementation=implementation)


def without_lone_queries(q_BxTxHxC: jax.Array, start_BxT: jax.Array) -> jax.Array:
  """Returns queries of which those that see one key are zero.

  Such a query does not matter, and its gradient and that key's from it are zero: so they are exactly that, where Adam
  would take full steps of the rounding noise.
  """
  is_alone_BxT = start_BxT == jnp.arange(start_BxT.shape[1])
  return jnp.where(is_alone_BxT[..., None, None], 0, q_BxTxHxC)


def padded_starts(start_BxT: jax.Array, multiple: int) -> jax.Array:
  """Returns starts of a row padded to a multiple, int32. A padded query sees itself: its softmax has a finite sum."""
  B, T = start_BxT.shape
  itself = jnp.broadcast_to(jnp.arange(T, T + -T % multiple, dtype=jnp.int32), (B, -T % multiple))
  return jnp.concatenate([start_BxT.astype(jnp.int32), itself], axis=1)


def segment_starts(tokens_BxT: Int[Array, "B T"], *, bos_id: int, seq_len: int) -> Int[Array, "B T"]:
  """Returns the first position of each token's segment.

  Segments begin at 0, at every bos, and each `seq_len` tokens after a document's begin.
  """
  position_T = jnp.arange(tokens_BxT.shape[1], dtype=jnp.int32)
  document_BxT = jax.lax.cummax(jnp.where(tokens_BxT == bos_id, position_T, 0), axis=1)
  return position_T - (position_T - document_BxT) % seq_len
