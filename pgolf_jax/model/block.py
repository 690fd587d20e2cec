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
from pgolf_jax.kernels.gated_xsa import gated_xsa
from pgolf_jax.kernels.numerics import gated, rms_norm, scaled
from pgolf_jax.kernels.residual_norm import residual_norm
from pgolf_jax.kernels.rotary_heads import rotary_heads
from pgolf_jax.model.adapters import Adapter, deltas
from pgolf_jax.settings import ModelConfig

Angles = tuple[jax.Array, jax.Array]


def angles(position_T: Int[Array, " T"], rope_dims: int, base: float) -> Angles:
  """Returns (cos, sin), each [T, rope_dims/2] in float32, of position · base^(−2i/rope_dims)."""
  frequency = base ** (-jnp.arange(0, rope_dims, 2, dtype=jnp.float32) / rope_dims)
  angle = position_T[:, None].astype(jnp.float32) * frequency
  return jnp.cos(angle), jnp.sin(angle)


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
  """Returns y = x Wᵀ in the type of x."""
  return jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype))


@jax.custom_vjp
def linear_with_gate(
  x_BxTxD: Float[Array, "B T D"], weight_MxD: Float[Array, "M D"], gate_HxW: Float[Array, "H W"]
) -> tuple[Float[Array, "B T M"], Float[Array, "B T H"]]:
  """Returns `linear` of x, and of its leading W columns by the gate's weights.

  The gradient adds what the gate gives x to those columns in their place, without a pass over all others.
  """
  return linear(x_BxTxD, weight_MxD), linear(x_BxTxD[..., : gate_HxW.shape[1]], gate_HxW)


def _linear_with_gate_backward(saved, cotangents):
  x, weight, gate = saved
  dx, d_weight = jax.vjp(linear, x, weight)[1](cotangents[0])
  d_leading, d_gate = jax.vjp(linear, x[..., : gate.shape[1]], gate)[1](cotangents[1])
  # Read apart from where they are written, or XLA would copy all of dx.
  leading = jax.lax.optimization_barrier(dx[..., : gate.shape[1]]) + d_leading
  return jax.lax.dynamic_update_slice_in_dim(dx, leading, 0, axis=-1), d_weight, d_gate


linear_with_gate.defvjp(lambda *arguments: (linear_with_gate(*arguments), arguments), _linear_with_gate_backward)


class Weights(NamedTuple):
  """A layer's matrices, out of the banks.

  The factor on the MLP's output is part of `down`: it and its gradient then take no pass over the tokens.
  """

  q: jax.Array  # [D, D]
  k: jax.Array  # [K·C, D]
  v: jax.Array  # [K·C, D]
  o: jax.Array  # [D, D]
  up: jax.Array  # [F, D]
  down: jax.Array  # [D, F], row by row times mlp_scale


class LayerUse(NamedTuple):
  """One use of a layer (a looped layer has several): what it is given beside its residual lanes.

  Attributes:
    adapters: by kind, without the axis P.
    attend: (q, k, v) → y over the keys that each query may see.
    mixed_value: with value residuals, what stands in for the values v that this use makes.
    x0: [B, T, D], the normed embedding.
    observe: called with the name and the input of every matrix; None where nobody asks.
    tap: called with the name and the value of an activation of this use.
  """

  weights: Weights
  adapters: dict[str, Adapter]
  adapter_scale: float
  attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
  mixed_value: Callable[[jax.Array], jax.Array]
  angles: Angles
  x0: jax.Array
  observe: Callable[[str, jax.Array], None] | None
  tap: Callable[[str, jax.Array], None]

  def added(self, x: jax.Array, *kinds: str) -> dict[str, jax.Array]:
    """Returns what the adapters of these kinds, those that there are, make of x."""
    return deltas({kind: self.adapters[kind] for kind in kinds if kind in self.adapters}, x, self.adapter_scale)


def plus(y: jax.Array, added: dict[str, jax.Array], kind: str) -> jax.Array:
  """Returns y plus what the adapter of this kind, if there is one, adds."""
  return y + added[kind] if kind in added else y


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
    if use.observe:
      use.observe(f"blocks.{self.layer}.attn.c_q.weight", n)
    # One product reads n once, and its gradient is one product too.
    qkv_weight, gate = jnp.concatenate([w.q, w.k, w.v]), None
    if m.sparse_attn_gate:
      qkv, gate = linear_with_gate(n, qkv_weight, self.attn_gate_w[...])
    else:
      qkv = linear(n, qkv_weight)
    if use.adapters:
      parts = zip("qkv", jnp.split(qkv, (len(w.q), len(w.q) + len(w.k)), axis=-1), strict=True)
      qkv = jnp.concatenate([plus(part, added, kind) for kind, part in parts], axis=-1)
    q, k, v, v_of_xsa = rotary_heads(qkv, self.q_gain[...], *use.angles, kv_heads=m.num_kv_heads)
    if m.value_residual:
      v = v_of_xsa = use.mixed_value(v)
    y = use.attend(q, k, v)
    for name, value in (("q", q), ("k", k), ("v", v), ("attend", y)):
      use.tap(name, value)
    if self.layer >= m.num_layers - m.xsa_last_n:
      y = gated_xsa(y, v_of_xsa, gate, scale=m.sparse_attn_gate_scale)
    elif gate is not None:
      y = gated(y, gate, m.sparse_attn_gate_scale)
    y = y.reshape(B, T, m.model_dim)
    if use.observe:
      use.observe(f"blocks.{self.layer}.attn.proj.weight", y)
    return plus(linear(y, w.o), added, "o")


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

  @jax.named_scope("layer")
  def __call__(self, x: Float[Array, "B T D"], use: LayerUse) -> Float[Array, "B T D"]:
    """Runs one lane: attention, then the MLP on its result."""
    x, n = self._mixed(x, use)
    a = self._attend(n, use)
    x, n = residual_norm(x, a, self.attn_scale[...], scale=self.norm_scale)
    x = x + self._mlp(n, use)
    use.tap("x", x)
    return x

  @jax.named_scope("layer")
  def parallel(
    self, lanes: tuple[jax.Array, jax.Array], use: LayerUse, resid: jax.Array, post: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Runs two lanes: attention reads lane 0, the MLP lane 1, and each writes to both.

    Args:
      resid: [2], the factor on each lane itself.
      post: [2, 2], the factor on each output for each lane: post[output, lane], attention's output first.
    """
    lane0, lane1 = lanes
    _, n = self._mixed(lane0, use)
    a = scaled(self._attend(n, use), self.attn_scale[...])
    m = self._mlp(rms_norm(lane1) * self.norm_scale, use)
    after0 = scaled(lane0, resid[0]) + scaled(a, post[0, 0]) + scaled(m, post[1, 0])
    after1 = scaled(lane1, resid[1]) + scaled(a, post[0, 1]) + scaled(m, post[1, 1])
    use.tap("lane0", after0)
    use.tap("lane1", after1)
    return after0, after1

  def _mixed(self, x: jax.Array, use: LayerUse) -> tuple[jax.Array, jax.Array]:
    """Returns the lane mixed with the normed embedding, and its norm."""
    mix = self.resid_mix[...]
    return residual_norm(x, use.x0, mix[1], mix[0], scale=self.norm_scale)

  def _attend(self, n: jax.Array, use: LayerUse) -> jax.Array:
    out = self.attn(n, use)
    use.tap("attn", out)
    return out

  def _mlp(self, n: jax.Array, use: LayerUse) -> jax.Array:
    w, slope = use.weights, self.config.leaky_relu_sq_slope
    if use.observe:
      use.observe(f"blocks.{self.layer}.mlp.fc.weight", n)
      u = linear(n, w.up)
      use.observe(f"blocks.{self.layer}.mlp.proj.weight", jnp.where(u > 0, u, slope * u) ** 2)
    B, T, D = n.shape
    up, down = w.up.astype(n.dtype), w.down.astype(n.dtype)
    out = mlp_kernel.leaky_relu2_mlp(n.reshape(B * T, D), up, down, slope=slope).reshape(B, T, D)
    scale = self.mlp_scale[...]
    out = plus(out, {kind: scaled(added, scale) for kind, added in use.added(n, "mlp").items()}, "mlp")
    use.tap("mlp", out / scale)  # as the recipe's MLP gives it
    return out
