"""Attention's heads out of one product: norm, rotary positions and gain of queries and keys; values as they are."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pgolf_jax.kernels.operation import Operation

Heads = tuple[Float[Array, "B T H C"], Float[Array, "B T K C"], Float[Array, "B T K C"], Float[Array, "B T K C"]]


def _check(qkv_BxTxF, gain_H, cos_TxR, sin_TxR, *, kv_heads: int) -> None:
  qkv, gain, cos, sin = qkv_BxTxF, gain_H, cos_TxR, sin_TxR
  if qkv.ndim != 3 or gain.ndim != 1 or kv_heads < 1 or qkv.shape[2] % (gain.shape[0] + 2 * kv_heads):
    raise ValueError(f"qkv [B, T, F] does not hold H + 2·{kv_heads} heads: {qkv.shape=}, gain [H] {gain.shape=}")
  width = head_width(qkv, gain, kv_heads)
  if cos.shape != sin.shape or cos.ndim != 2 or cos.shape[0] != qkv.shape[1] or 2 * cos.shape[1] > width:
    raise ValueError(f"cos and sin must be [{qkv.shape[1]}, R ≤ {width // 2}], not {cos.shape} and {sin.shape}")
  if not jnp.issubdtype(qkv.dtype, jnp.floating) or {gain.dtype, cos.dtype, sin.dtype} != {jnp.dtype(jnp.float32)}:
    raise ValueError(f"gain, cos and sin must be float32, not {gain.dtype}, {cos.dtype} and {sin.dtype}")


OPERATION = Operation("rotary_heads", _check, ("mosaic_gpu", "xla", "reference"))


def rotary_heads(
  qkv_BxTxF: Float[Array, "B T F"],
  gain_H: Float[Array, " H"],
  cos_TxR: Float[Array, "T R"],
  sin_TxR: Float[Array, "T R"],
  *,
  kv_heads: int,
  implementation: str | None = None,
) -> Heads:
  """Returns queries gain · rot(x/√(mean x² + ε)), keys rot(x/√(mean x² + ε)), and values x twice, each of its own head.

  rot turns the pairs (i, i + R) of a head's leading 2R numbers: (a, b) → (a·cos + b·sin, b·cos − a·sin). Sums
  and norms are float32; results have the type of qkv. cos and sin have no gradient. Values are for two readers,
  attention and XSA: what they give back is added up on its way into the gradient of qkv.

  Args:
    qkv_BxTxF: H query heads, then K key heads, then K value heads of C numbers, side by side.
    gain_H: a factor for each query head; its gradient is summed in float32.
    cos_TxR, sin_TxR: of the angle of each position and pair, in float32.
    kv_heads: K.
    implementation: a backend to insist on, or None to take the first that is possible.

  Raises:
    ValueError: shapes or types do not fit together, or the implementation is unknown or not possible.
  """
  gain_H = gain_H.astype(jnp.float32)
  return OPERATION(qkv_BxTxF, gain_H, cos_TxR, sin_TxR, kv_heads=kv_heads, implementation=implementation)


def head_width(qkv_BxTxF: jax.Array, gain_H: jax.Array, kv_heads: int) -> int:
  """Returns C, the numbers of a head."""
  return qkv_BxTxF.shape[2] // (gain_H.shape[0] + 2 * kv_heads)
