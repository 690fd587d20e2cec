"""XSA and the gate, left to XLA, which rounds after each."""

import jax
import jax.numpy as jnp

from pgolf_jax.kernels.numerics import gated


def gated_xsa(y_BxTxHxC: jax.Array, v_BxTxKxC: jax.Array, gate_BxTxH: jax.Array | None, *, scale: float) -> jax.Array:
  """Returns what is left of y."""
  y = without_own_value(y_BxTxHxC, v_BxTxKxC)
  return y if gate_BxTxH is None else gated(y, gate_BxTxH, scale)


def without_own_value(y_BxTxHxC: jax.Array, v_BxTxKxC: jax.Array) -> jax.Array:
  """Returns, for XSA, each head's output less its component along its own position's value: y − (y·v / v·v) v."""
  B, T, H, C = y_BxTxHxC.shape
  K = v_BxTxKxC.shape[2]
  return _without_component(y_BxTxHxC.reshape(B, T, K, H // K, C), v_BxTxKxC).reshape(B, T, H, C)


@jax.custom_vjp
def _without_component(y_BxTxKxGxC: jax.Array, v_BxTxKxC: jax.Array) -> jax.Array:
  y, v = y_BxTxKxGxC.astype(jnp.float32), v_BxTxKxC.astype(jnp.float32)[:, :, :, None]
  return (y - _dot(y, v) / _squared_norm(v) * v).astype(y_BxTxKxGxC.dtype)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.sum(a * b, axis=-1, keepdims=True)


def _squared_norm(v: jax.Array) -> jax.Array:
  return jnp.maximum(_dot(v, v), 1e-24)


def _without_component_forward(y, v):
  return _without_component(y, v), (y, v)


def _without_component_backward(residuals, dx_BxTxKxGxC):
  """Keeps y and v alone, and adds up the heads of a value one by one: XLA's sum over so short an axis is slow."""
  y_BxTxKxGxC, v_BxTxKxC = residuals
  v = v_BxTxKxC.astype(jnp.float32)
  norm = _squared_norm(v)
  dv, dy = jnp.zeros_like(v), []
  for g in range(y_BxTxKxGxC.shape[3]):
    y, dx = (x[:, :, :, g].astype(jnp.float32) for x in (y_BxTxKxGxC, dx_BxTxKxGxC))
    of_y, of_dx = _dot(y, v) / norm, _dot(dx, v) / norm
    dy.append(dx - of_dx * v)
    dv -= of_y * dx + of_dx * y - jnp.where(norm > 1e-24, 2 * of_y * of_dx, 0.0) * v
  return jnp.stack(dy, axis=3).astype(y_BxTxKxGxC.dtype), dv.astype(v_BxTxKxC.dtype)


_without_component.defvjp(_without_component_forward, _without_component_backward)
