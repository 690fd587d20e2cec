"""One physical layer: rotary positions, attention and MLP, in one residual lane or in two.

Letters: see model/__init__.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pgolf_jax.kernels import leaky_relu2_mlp as mlp_kernel
from pgolf_jax.model.adapters import Adapter, deltas
from pgolf_jax.settings import ModelConfig

Angles = tuple[jax.Array, jax.Array]


def angles(position_T: Int[Array, " T"], rope_dims: int, base: float) -> Angles:
  """Returns (cos, sin), each [T, rope_dims/2] in float32, of position · base^(−2i/rope_dims)."""
  frequency = base ** (-jnp.arange(0, rope_dims, 2, dtype=jnp.float32) / rope_dims)
  angle = position_T[:, None].astype(jnp.float32) * frequency
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BxTxHxC: Float[Array, "B T H C"], angles: Angles) -> Float[Array, "B T H C"]:
  """Rotates split-half pairs of the leading dimensions: (a, b) → (a·cos + b·sin, −a·sin + b·cos)."""
  cos, sin = (a[:, None].astype(x_BxTxHxC.dtype) for a in angles)
  half = cos.shape[-1]
  a, b, rest = jnp.split(x_BxTxHxC, (half, 2 * half), axis=-1)
  return jnp.concatenate([a * cos + b * sin, b * cos - a * sin, rest], axis=-1)


EPS = 1.1920929e-07
"""Epsilon of every norm: float32's, also when the input is bfloat16."""


def rms_norm(x: jax.Array) -> jax.Array:
  """Returns x / √(mean(x²) + eps) over the last axis, computed in float32, in the type of x."""
  wide = x.astype(jnp.float32)
  return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + EPS)).astype(x.dtype)


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
  """Returns y = x Wᵀ in the type of x."""
  return jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype))


def scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
  """Returns factor · x in the type of x, for a factor that many rows share.

  The factor is repeated over x in float32 and cast afterwards, so that its gradient, a sum over rows and positions, is
  added up in float32. Cast first, it would be added up in the type of x; in bfloat16 such a sum stops growing.
  """
  return jnp.broadcast_to(factor.astype(jnp.float32), x.shape).astype(x.dtype) * x


class Weights(NamedTuple):
  """A layer's matrices, out of the banks."""

  q: jax.Array  # [D, D]
  k: jax.Array  # [K·C, D]
  v: jax.Array  # [K·C, D]
  o: jax.Array  # [D, D]
  up: jax.Array  # [F, D]
  down: jax.Array  # [D, F]


class LayerUse(NamedTuple):
  """One use of a layer (a looped layer has several): what it is given beside its residual lanes.

  Attributes:
    adapters: by kind, without the axis P.
    attend: (q, k, v) → y over the keys that each query may see.
    x0: [B, T, D], the normed embedding.
    observe: called with the name and the input of every matrix; None where nobody asks.
    tap: called with the name and the value of an activation of this use.
  """

  weights: Weights
  adapters: dict[str, Adapter]
  adapter_scale: float
  attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
  angles: Angles
  x0: jax.Array
  observe: Callable[[str, jax.Array], None] | None
  tap: Callable[[str, jax.Array], None]

  def added(self, x: jax.Array, *kinds: str) -> dict[str, jax.Array]:
    """Returns what the adapters of these kinds, those that there are, make of x."""
    return deltas({kind: self.adapters[kind] for kind in kinds if kind in self.adapters}, x, self.adapter_scale)


class Attention(nnx.Module):
  """Segment-confined attention with grouped heads, partial rotary, XSA and the sparse gate."""

  def __init__(self, config: ModelConfig, layer: int):
    self.config = config
    self.layer = layer
    self.q_gain = nnx.Param(None)
    if config.sparse_attn_gate:
      self.attn_gate_w = nnx.Param(None)

  def __call__(self, n: Float[Array, "B T D"], use: LayerUse) -> Float[Array, "B T D"]:
    m, w = self.config, use.weights
    B, T, _ = n.shape

    added = use.added(n, "q", "k", "v", "o")

    def heads(kind: str, y: jax.Array) -> jax.Array:
      return (y + added.get(kind, 0)).reshape(B, T, -1, m.head_dim)

    if use.observe:
      use.observe(f"blocks.{self.layer}.attn.c_q.weight", n)
    # One product reads n once, and its gradient is one product too.
    qkv = linear(n, jnp.concatenate([w.q, w.k, w.v]))
    q, k, v = jnp.split(qkv, (len(w.q), len(w.q) + len(w.k)), axis=-1)
    q = rotate(rms_norm(heads("q", q)), use.angles)
    k = rotate(rms_norm(heads("k", k)), use.angles)
    v = heads("v", v)
    q = scaled(q, self.q_gain[...][:, None])
    y = use.attend(q, k, v)
    for name, value in (("q", q), ("k", k), ("v", v), ("attend", y)):
      use.tap(name, value)
    if self.layer >= m.num_layers - m.xsa_last_n:
      y = without_own_value(y, v)
    if m.sparse_attn_gate:
      gate = linear(n[..., : m.gate_window], self.attn_gate_w[...])
      y = y * jax.nn.sigmoid(m.sparse_attn_gate_scale * gate)[..., None]
    y = y.reshape(B, T, m.model_dim)
    if use.observe:
      use.observe(f"blocks.{self.layer}.attn.proj.weight", y)
    return linear(y, w.o) + added.get("o", 0)


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


class Block(nnx.Module):
  """A physical layer."""

  def __init__(self, config: ModelConfig, layer: int):
    self.config = config
    self.layer = layer
    self.norm_scale = (layer + 1) ** -0.5 if config.ln_scale else 1.0
    self.attn = Attention(config, layer)
    self.attn_scale = nnx.Param(None)
    self.mlp_scale = nnx.Param(None)
    self.resid_mix = nnx.Param(None)

  def __call__(self, x: Float[Array, "B T D"], use: LayerUse) -> Float[Array, "B T D"]:
    """Runs one lane: attention, then the MLP on its result."""
    x = self._mix(x, use)
    x = x + self._attend(x, use)
    x = x + self._mlp(x, use)
    use.tap("x", x)
    return x

  def parallel(
    self, lanes: tuple[jax.Array, jax.Array], use: LayerUse, resid: jax.Array, post: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Runs two lanes: attention reads lane 0, the MLP lane 1, and each writes to both.

    Args:
      resid: [2], the factor on each lane itself.
      post: [2, 2], the factor on each output for each lane: post[output, lane], attention's output first.
    """
    lane0, lane1 = lanes
    a = self._attend(self._mix(lane0, use), use)
    m = self._mlp(lane1, use)
    after0 = scaled(lane0, resid[0]) + scaled(a, post[0, 0]) + scaled(m, post[1, 0])
    after1 = scaled(lane1, resid[1]) + scaled(a, post[0, 1]) + scaled(m, post[1, 1])
    use.tap("lane0", after0)
    use.tap("lane1", after1)
    return after0, after1

  def _attend(self, x: jax.Array, use: LayerUse) -> jax.Array:
    out = self.attn(rms_norm(x) * self.norm_scale, use)
    use.tap("attn", out)
    return scaled(out, self.attn_scale[...])

  def _mlp(self, x: jax.Array, use: LayerUse) -> jax.Array:
    n = rms_norm(x) * self.norm_scale
    w, slope = use.weights, self.config.leaky_relu_sq_slope
    if use.observe:
      use.observe(f"blocks.{self.layer}.mlp.fc.weight", n)
      u = linear(n, w.up)
      use.observe(f"blocks.{self.layer}.mlp.proj.weight", jnp.where(u > 0, u, slope * u) ** 2)
    B, T, D = n.shape
    up, down = w.up.astype(n.dtype), w.down.astype(n.dtype)
    out = mlp_kernel.leaky_relu2_mlp(n.reshape(B * T, D), up, down, slope=slope).reshape(B, T, D)
    out = out + use.added(n, "mlp").get("mlp", 0)
    use.tap("mlp", out)
    return scaled(out, self.mlp_scale[...])

  def _mix(self, x: jax.Array, use: LayerUse) -> jax.Array:
    mix = self.resid_mix[...]
    return scaled(x, mix[0]) + scaled(use.x0, mix[1])
