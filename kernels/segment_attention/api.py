"""Segment-confined causal attention with grouped heads: one function over all implementations.

A backend that cannot keep segments apart is not offered here: there is no fallback that attends across documents.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pgolf_jax.kernels import target
from pgolf_jax.kernels.segment_attention import reference, xla

_NAME = "segment_attention"


def choose(
  q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, start_BxT, *, max_segment: int, implementation: str | None = None
) -> target.Choice:
  """The implementation that `segment_attention` takes for arguments of these shapes and types, and why.

  Args:
    q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, start_BxT: arrays or `jax.ShapeDtypeStruct`s.
    max_segment: tokens of the longest segment.
    implementation: a name to insist on, or None to pick.

  Raises:
    ValueError: shapes or types do not fit together, or the implementation is unknown or not possible.
  """
  _check(q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, start_BxT, max_segment)
  obstacles = {
    "mosaic_gpu": lambda: target.mosaic_gpu_obstacle(_NAME, q_BxTxHxC),
    "mosaic_tpu": lambda: target.mosaic_tpu_obstacle(_NAME, q_BxTxHxC),
    "xla": lambda: None,
    "reference": lambda: None,
  }
  return target.choose(_NAME, implementation, obstacles)


def segment_attention(
  q_BxTxHxC: Float[Array, "B T H C"],
  k_BxTxKxC: Float[Array, "B T K C"],
  v_BxTxKxC: Float[Array, "B T K C"],
  start_BxT: Int[Array, "B T"],
  *,
  max_segment: int,
  implementation: str | None = None,
) -> Float[Array, "B T H C"]:
  """y_t = softmax over start[t] ≤ j ≤ t of (q_t · k_j / √C), times v_j.

  Each key/value head serves H/K consecutive query heads. Scores, softmax and sums are float32.

  Args:
    start_BxT: where each query's segment begins, the first key that it may see. Segments are stretches of a row:
      start[j] = start[t] for every start[t] ≤ j ≤ t, and 0 ≤ t − start[t] < max_segment.
    max_segment: static bound on the length of a segment, in tokens.
    implementation: see `choose`.

  Raises:
    ValueError: shapes or types do not fit together, or the implementation is not possible.
  """
  name, _ = choose(q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, start_BxT, max_segment=max_segment, implementation=implementation)
  if name == "reference":
    return reference.segment_attention(q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, start_BxT)
  if name == "mosaic_gpu":
    return target.backend(_NAME, name).segment_attention(q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, start_BxT)
  backend = xla if name == "xla" else target.backend(_NAME, name)
  return backend.segment_attention(q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, start_BxT, max_segment=max_segment)


def segment_starts(tokens_BxT: Int[Array, "B T"], *, bos_id: int, seq_len: int) -> Int[Array, "B T"]:
  """First position of each token's segment: segments begin at 0, at every bos, and each `seq_len` tokens after."""
  position_T = jnp.arange(tokens_BxT.shape[1], dtype=jnp.int32)
  document_BxT = jax.lax.cummax(jnp.where(tokens_BxT == bos_id, position_T, 0), axis=1)
  return position_T - (position_T - document_BxT) % seq_len


def _check(q, k, v, start, max_segment) -> None:
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
