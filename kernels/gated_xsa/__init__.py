"""What becomes of attention's output: XSA takes each position's own value out of it, and a gate scales each head."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pgolf_jax.kernels.operation import Operation


def _check(y_BxTxHxC, v_BxTxKxC, gate_BxTxH, *, scale: float) -> None:
  y, v, gate = y_BxTxHxC, v_BxTxKxC, gate_BxTxH
  if y.ndim != 4 or v.ndim != 4 or y.shape[:2] != v.shape[:2] or y.shape[3] != v.shape[3] or y.shape[2] % v.shape[2]:
    raise ValueError(f"y [B, T, H, C] and v [B, T, K, C] do not fit, or H is no multiple of K: {y.shape=}, {v.shape=}")
  if gate is not None and gate.shape != y.shape[:3]:
    raise ValueError(f"the gate must be {y.shape[:3]}, not {gate.shape}")
  dtypes = [x.dtype for x in (y, v, gate) if x is not None]
  if len(set(dtypes)) > 1 or not jnp.issubdtype(y.dtype, jnp.floating):
    raise ValueError(f"y, v and gate must have one floating type, not {', '.join(map(str, dtypes))}")


OPERATION = Operation("gated_xsa", _check, ("mosaic_gpu", "xla", "reference"))


def gated_xsa(
  y_BxTxHxC: Float[Array, "B T H C"],
  v_BxTxKxC: Float[Array, "B T K C"],
  gate_BxTxH: Float[Array, "B T H"] | None,
  *,
  scale: float,
  implementation: str | None = None,
) -> Float[Array, "B T H C"]:
  """Returns σ(scale · gate) · (y − (y·v / v·v) v), of each head with its own position's value; without a gate no σ.

  Each value serves H/K consecutive heads. Sums are float32; the result has the type of y.

  Args:
    gate_BxTxH: what the sigmoid is taken of, once scaled; or None.
    implementation: a backend to insist on, or None to take the first that is possible.

  Raises:
    ValueError: shapes or types do not fit together, or the implementation is unknown or not possible.
  """
  return OPERATION(y_BxTxHxC, v_BxTxKxC, gate_BxTxH, scale=scale, implementation=implementation)
