"""One physical layer: attention and MLP, in one residual lane or in two.

Letters: B rows, T positions, D width, H query heads, K key/value heads, C head width, F MLP width, V vocabulary,
L physical layers, P positions of the looped layer list, R adapter rank.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pgolf_jax.kernels.leaky_relu2_mlp import api as mlp_kernel
from pgolf_jax.model import rotary
from pgolf_jax.model.adapters import Adapter, delta
from pgolf_jax.settings.config import ModelConfig

EPS = 1.1920929e-07
"""Epsilon of every norm: float32's, also when the input is bfloat16."""

Collect = Callable[[str, jax.Array], None]
"""Called with a matrix's name and its input while the forward pass is traced."""


def rms_norm(x: jax.Array) -> jax.Array:
  """x / √(mean(x²) + eps) over the last axis, computed in float32, in the type of x."""
  wide = x.astype(jnp.float32)
  return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + EPS)).astype(x.dtype)


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
  """y = x Wᵀ in the type of x."""
  return jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype))


class Weights(NamedTuple):
  """A layer's matrices, out of the banks."""

  q: jax.Array  # [D, D]
  k: jax.Array  # [K·C, D]
  v: jax.Array  # [K·C, D]
  o: jax.Array  # [D, D]
  up: jax.Array  # [F, D]
  down: jax.Array  # [D, F]


class Context(NamedTuple):
  """What every layer of one forward pass is given."""

  attend: Callable[..., jax.Array]  # (q, k, v) → y over the keys that each query may see
  angles: rotary.Angles
  x0: jax.Array  # [B, T, D], the normed embedding
  collect: Collect | None
  adapter_scale: float


class Attention(nnx.Module):
  """Segment-confined attention with grouped heads, partial rotary, XSA and the sparse gate."""

  def __init__(self, config: ModelConfig, layer: int, values: dict[str, jax.Array]):
    self.config = config
    self.layer = layer
    self.q_gain = nnx.Param(values["attn.q_gain"])
    if config.sparse_attn_gate:
      self.attn_gate_w = nnx.Param(values["attn.attn_gate_w"])

  def __call__(
    self, n: Float[Array, "B T D"], w: Weights, context: Context, adapters: dict[str, Adapter]
  ) -> Float[Array, "B T D"]:
    m = self.config
    B, T, _ = n.shape

    def project(kind: str, weight: jax.Array, heads: int) -> jax.Array:
      y = linear(n, weight)
      if kind in adapters:
        y = y + delta(adapters[kind], n, context.adapter_scale)
      return y.reshape(B, T, heads, m.head_dim)

    if context.collect:
      context.collect(f"blocks.{self.layer}.attn.c_q.weight", n)
    q = rotary.rotate(rms_norm(project("q", w.q, m.num_heads)), context.angles)
    k = rotary.rotate(rms_norm(project("k", w.k, m.num_kv_heads)), context.angles)
    v = project("v", w.v, m.num_kv_heads)
    q = q * self.q_gain[...].astype(q.dtype)[:, None]
    y = context.attend(q, k, v)
    if self.layer >= m.num_layers - m.xsa_last_n:
      y = without_own_value(y, v)
    if m.sparse_attn_gate:
      gate = linear(n[..., : m.gate_window], self.attn_gate_w[...])
      y = y * jax.nn.sigmoid(m.sparse_attn_gate_scale * gate)[..., None]
    y = y.reshape(B, T, m.model_dim)
    if context.collect:
      context.collect(f"blocks.{self.layer}.attn.proj.weight", y)
    out = linear(y, w.o)
    return out + delta(adapters["o"], n, context.adapter_scale) if "o" in adapters else out


def without_own_value(y_BxTxHxC: jax.Array, v_BxTxKxC: jax.Array) -> jax.Array:
  """XSA: each head's output less its component along its own position's value, y − (y·v̂)v̂."""
  B, T, H, C = y_BxTxHxC.shape
  K = v_BxTxKxC.shape[2]
  y = y_BxTxHxC.reshape(B, T, K, H // K, C)
  wide = v_BxTxKxC.astype(jnp.float32)
  norm = jnp.sqrt(jnp.maximum(jnp.sum(wide * wide, axis=-1, keepdims=True), 1e-24))
  direction = (wide / norm).astype(y.dtype)[:, :, :, None]
  return (y - (y * direction).sum(axis=-1, keepdims=True) * direction).reshape(B, T, H, C)


class Block(nnx.Module):
  """A physical layer. `values` maps names below `blocks.{layer}.` to arrays."""

  def __init__(self, config: ModelConfig, layer: int, values: dict[str, jax.Array]):
    self.config = config
    self.layer = layer
    self.norm_scale = (layer + 1) ** -0.5 if config.ln_scale else 1.0
    self.attn = Attention(config, layer, values)
    self.attn_scale = nnx.Param(values["attn_scale"])
    self.mlp_scale = nnx.Param(values["mlp_scale"])
    self.resid_mix = nnx.Param(values["resid_mix"])

  def _attend(self, x_in, w: Weights, context: Context, adapters) -> jax.Array:
    out = self.attn(rms_norm(x_in) * self.norm_scale, w, context, adapters)
    return self.attn_scale[...].astype(out.dtype) * out

  def _mlp(self, x, w: Weights, context: Context, adapters) -> jax.Array:
    n = rms_norm(x) * self.norm_scale
    slope = self.config.leaky_relu_sq_slope
    if context.collect:
      context.collect(f"blocks.{self.layer}.mlp.fc.weight", n)
      u = linear(n, w.up)
      context.collect(f"blocks.{self.layer}.mlp.proj.weight", jnp.where(u > 0, u, slope * u) ** 2)
    B, T, D = n.shape
    up, down = w.up.astype(n.dtype), w.down.astype(n.dtype)
    out = mlp_kernel.leaky_relu2_mlp(n.reshape(B * T, D), up, down, slope=slope).reshape(B, T, D)
    if "mlp" in adapters:
      out = out + delta(adapters["mlp"], n, context.adapter_scale)
    return self.mlp_scale[...].astype(out.dtype) * out

  def _mix(self, x, context: Context) -> jax.Array:
    mix = self.resid_mix[...].astype(x.dtype)
    return mix[0] * x + mix[1] * context.x0

  def __call__(self, x, w: Weights, context: Context, adapters: dict[str, Adapter]) -> jax.Array:
    """One lane: attention, then the MLP on its result."""
    x = self._mix(x, context)
    x = x + self._attend(x, w, context, adapters)
    return x + self._mlp(x, w, context, adapters)

  def parallel(
    self, lanes: tuple[jax.Array, jax.Array], w: Weights, context: Context, adapters, resid: jax.Array, post: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Two lanes: attention reads lane 0, the MLP lane 1, and each writes to both.

    Args:
      resid: R [2], what a lane keeps of itself.
      post: P [2, 2], P[from, to] with attention first.
    """
    lane0, lane1 = lanes
    a = self._attend(self._mix(lane0, context), w, context, adapters)
    m = self._mlp(lane1, w, context, adapters)
    resid, post = resid.astype(a.dtype), post.astype(a.dtype)
    return (
      resid[0] * lane0 + post[0, 0] * a + post[1, 0] * m,
      resid[1] * lane1 + post[0, 1] * a + post[1, 1] * m,
    )
