"""The recipe's model in eager PyTorch, for timing beside ours: plain modules, library attention, autograd."""

import torch
import torch.nn.functional as F

from pgolf_jax.model.block import EPS
from pgolf_jax.model.params import layer_order
from pgolf_jax.settings import ModelConfig


def _norm(x):
  return F.rms_norm(x, x.shape[-1:], eps=EPS)


class TorchGPT:
  """Loss of whole rows, each one document, with looping on.

  Args:
    params: arrays under the recipe's names, as in `pgolf_jax.model.params`.
  """

  def __init__(self, config: ModelConfig, params: dict, dtype=torch.float32):
    self.config = config
    self.params = {k: torch.tensor(v, dtype=dtype).requires_grad_() for k, v in params.items()}

  def _angles(self, length: int, dtype):
    dims = self.config.rope_dims or self.config.head_dim
    frequency = self.config.rope_base ** (-torch.arange(0, dims, 2) / dims)
    angle = torch.arange(length)[:, None] * frequency
    return angle.cos().to(dtype)[:, None], angle.sin().to(dtype)[:, None]

  @staticmethod
  def _rotate(x, cos, sin):
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], -1)

  def _attention(self, n, layer: int, angles):
    m, p = self.config, self.params
    B, T, _ = n.shape
    heads = lambda w, count: F.linear(n, w).view(B, T, count, m.head_dim)  # noqa: E731
    q = self._rotate(_norm(heads(p["qo_bank"][layer], m.num_heads)), *angles)
    k = self._rotate(_norm(heads(p["kv_bank"][layer], m.num_kv_heads)), *angles)
    v = heads(p["kv_bank"][m.num_layers + layer], m.num_kv_heads)
    q = q * p[f"blocks.{layer}.attn.q_gain"][:, None]
    y = F.scaled_dot_product_attention(
      q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=m.num_heads != m.num_kv_heads
    ).transpose(1, 2)
    if layer >= m.num_layers - m.xsa_last_n:
      grouped = y.reshape(B, T, m.num_kv_heads, -1, m.head_dim)
      direction = F.normalize(v, dim=-1).unsqueeze(3)
      y = grouped - (grouped * direction).sum(-1, keepdim=True) * direction
      y = y.reshape(B, T, m.num_heads, m.head_dim)
    gate = F.linear(n[..., : m.gate_window], p[f"blocks.{layer}.attn.attn_gate_w"])
    y = y * torch.sigmoid(m.sparse_attn_gate_scale * gate)[..., None]
    return p[f"blocks.{layer}.attn_scale"] * F.linear(y.reshape(B, T, -1), p["qo_bank"][m.num_layers + layer])

  def _mlp(self, n, layer: int):
    m, p = self.config, self.params
    hidden = F.leaky_relu(F.linear(n, p["mlp_up_bank"][layer]), m.leaky_relu_sq_slope).square()
    return p[f"blocks.{layer}.mlp_scale"] * F.linear(hidden, p["mlp_down_bank"][layer])

  def loss(self, tokens_BxT1) -> torch.Tensor:
    """Mean negative log-likelihood of the targets, nats."""
    m, p = self.config, self.params
    inputs, targets = tokens_BxT1[:, :-1], tokens_BxT1[:, 1:]
    x = F.embedding(inputs, p["tok_emb.weight"])
    gate = torch.sigmoid(F.linear(x[:, 1:, : m.gate_window], p["smear_gate.weight"]))
    inside = (inputs[:, 1:, None] != m.bos_id).to(x.dtype)
    x = torch.cat([x[:, :1], x[:, 1:] + p["smear_lambda"] * gate * x[:, :-1] * inside], 1)
    x = x0 = _norm(x)
    angles = self._angles(inputs.shape[1], x.dtype)
    encoder, decoder = layer_order(m, True)
    scale = lambda layer: (layer + 1) ** -0.5 if m.ln_scale else 1.0  # noqa: E731

    def mixed(x, layer):
      mix = p[f"blocks.{layer}.resid_mix"]
      return mix[0] * x + mix[1] * x0

    def block(x, layer):
      x = mixed(x, layer)
      x = x + self._attention(_norm(x) * scale(layer), layer, angles)
      return x + self._mlp(_norm(x) * scale(layer), layer)

    skips = []
    for layer in encoder:
      x = block(x, layer)
      skips.append(x)
    lanes = None
    for j, layer in enumerate(decoder):
      if lanes is None and layer >= m.parallel_start_layer > 0:
        lanes = (x, x)
      if skips:
        skip = p["skip_weights"][j] * skips.pop()
        joined = torch.lerp(skip, lanes[0] if lanes else x, torch.sigmoid(p["skip_gates"][j]))
        x, lanes = (x, (joined, lanes[1])) if lanes else (joined, None)
      if lanes is None:
        x = block(x, layer)
        continue
      a = self._attention(_norm(mixed(lanes[0], layer)) * scale(layer), layer, angles)
      b = self._mlp(_norm(lanes[1]) * scale(layer), layer)
      R, P = p["parallel_resid_lambdas"][layer], p["parallel_post_lambdas"][layer]
      lanes = (R[0] * lanes[0] + P[0, 0] * a + P[1, 0] * b, R[1] * lanes[1] + P[0, 1] * a + P[1, 1] * b)
    x = 0.5 * (lanes[0] + lanes[1]) if lanes else x
    z = F.linear(_norm(x), p["tok_emb.weight"])
    logits = m.logit_softcap * torch.tanh(z / m.logit_softcap)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
