"""The recipe's model and its training step in PyTorch, for timing beside ours: library attention, autograd, AdamW."""

import torch
import torch.nn.functional as F

from pgolf_jax.kernels.polar_express.reference import COEFFICIENTS
from pgolf_jax.model.block import EPS
from pgolf_jax.model.params import layer_order
from pgolf_jax.settings.config import ModelConfig, Settings
from pgolf_jax.training.optimizer import group


def _norm(x):
  return F.rms_norm(x, x.shape[-1:], eps=EPS)


def polar_express(u, steps: int = 5):
  """The orthogonalisation of each matrix of a stack [B, m, n], in the type of u."""
  tall = u.shape[-2] > u.shape[-1]
  x = u.mT if tall else u
  x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
  for a, b, c in COEFFICIENTS[:steps]:
    gram = x @ x.mT
    x = a * x + (b * gram + c * (gram @ gram)) @ x
  return x.mT if tall else x


def obstacle(model: ModelConfig) -> str | None:
  """Why `TorchGPT` is not this model, or None."""
  wanted = {"smear_gate": True, "skip_gates": True, "sparse_attn_gate": True, "parallel_final_lane": "mean"}
  other = [f"model.{name}={getattr(model, name)}" for name, value in wanted.items() if getattr(model, name) != value]
  return f"it is written for the record's switches, not {', '.join(other)}" if other else None


class TorchGPT:
  """Loss of rows that are one document each.

  Args:
    params: arrays under the recipe's names, as in `pgolf_jax.model.params`; kept in float32.
    dtype: of the computation.
  """

  def __init__(self, config: ModelConfig, params: dict, dtype=torch.float32, device: str = "cpu"):
    self.config, self.dtype = config, dtype
    self.params = {k: torch.tensor(v, device=device).requires_grad_() for k, v in params.items()}

  def _angles(self, length: int):
    dims = self.config.rope_dims or self.config.head_dim
    device = self.params["tok_emb.weight"].device
    frequency = self.config.rope_base ** (-torch.arange(0, dims, 2, device=device) / dims)
    angle = torch.arange(length, device=device)[:, None] * frequency
    return angle.cos().to(self.dtype)[:, None], angle.sin().to(self.dtype)[:, None]

  @staticmethod
  def _rotate(x, cos, sin):
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], -1)

  def _attention(self, p, n, layer: int, angles):
    m = self.config
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

  def _mlp(self, p, n, layer: int):
    m = self.config
    hidden = F.leaky_relu(F.linear(n, p["mlp_up_bank"][layer]), m.leaky_relu_sq_slope).square()
    return p[f"blocks.{layer}.mlp_scale"] * F.linear(hidden, p["mlp_down_bank"][layer])

  def loss(self, tokens_BxT1, looping: bool) -> torch.Tensor:
    """Mean negative log-likelihood of the targets, nats."""
    m = self.config
    p = {name: value.to(self.dtype) for name, value in self.params.items()}
    inputs, targets = tokens_BxT1[:, :-1], tokens_BxT1[:, 1:]
    x = F.embedding(inputs, p["tok_emb.weight"])
    gate = torch.sigmoid(F.linear(x[:, 1:, : m.gate_window], p["smear_gate.weight"]))
    inside = (inputs[:, 1:, None] != m.bos_id).to(x.dtype)
    x = torch.cat([x[:, :1], x[:, 1:] + p["smear_lambda"] * gate * x[:, :-1] * inside], 1)
    x = x0 = _norm(x)
    angles = self._angles(inputs.shape[1])
    encoder, decoder = layer_order(m, looping)
    scale = lambda layer: (layer + 1) ** -0.5 if m.ln_scale else 1.0  # noqa: E731

    def mixed(x, layer):
      mix = p[f"blocks.{layer}.resid_mix"]
      return mix[0] * x + mix[1] * x0

    def block(x, layer):
      x = mixed(x, layer)
      x = x + self._attention(p, _norm(x) * scale(layer), layer, angles)
      return x + self._mlp(p, _norm(x) * scale(layer), layer)

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
      a = self._attention(p, _norm(mixed(lanes[0], layer)) * scale(layer), layer, angles)
      b = self._mlp(p, _norm(lanes[1]) * scale(layer), layer)
      R, P = p["parallel_resid_lambdas"][layer], p["parallel_post_lambdas"][layer]
      lanes = (R[0] * lanes[0] + P[0, 0] * a + P[1, 0] * b, R[1] * lanes[1] + P[0, 1] * a + P[1, 1] * b)
    x = 0.5 * (lanes[0] + lanes[1]) if lanes else x
    z = F.linear(_norm(x), p["tok_emb.weight"])
    logits = m.logit_softcap * torch.tanh(z / m.logit_softcap)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class TorchStep:
  """A step of training on one device: gradients by accumulation, clipping, Muon and AdamW, moving average.

  Args:
    ranks: groups of micro-batches whose mean gradients are clipped each on its own.
    loss: `model.loss`, compiled or as it is.
  """

  def __init__(self, settings: Settings, model: TorchGPT, ranks: int, loss):
    self.settings, self.model, self.ranks, self.loss = settings, model, ranks, loss
    o = settings.optimizer
    names = {kind: [n for n in model.params if group(n) == kind] for kind in ("bank", "embedding", "scalar")}
    self.banks = names["bank"]
    self.trained = [*names["bank"], *names["embedding"], *names["scalar"]]
    muon_dtype = getattr(torch, o.muon_dtype)
    self.momentum = {n: torch.zeros_like(model.params[n], dtype=muon_dtype) for n in self.banks}
    self.average = {n: p.detach().clone() for n, p in model.params.items()}
    groups = [
      {"params": [model.params[n] for n in names[kind]], "lr": lr, "base": lr, "weight_decay": decay}
      for kind, lr, decay in (("embedding", o.embed_lr, o.embed_wd), ("scalar", o.scalar_lr, o.adam_wd))
    ]
    self.adam = torch.optim.AdamW(groups, betas=(o.beta1, o.beta2), eps=o.adam_eps)

  def __call__(self, rows_MxBxT1, looping: bool, lr_scale: float, momentum: float) -> torch.Tensor:
    """One step on M micro-batches; returns the mean loss, nats."""
    params, limit = self.model.params, self.settings.optimizer.grad_clip_norm
    total, losses = None, []
    for rows in rows_MxBxT1.chunk(self.ranks):
      for value in params.values():
        value.grad = torch.zeros_like(value)
      for row in rows:
        loss = self.loss(row, looping) / len(rows)
        loss.backward()
        losses.append(loss.detach())
      if limit > 0:
        torch.nn.utils.clip_grad_norm_(params.values(), limit)
      grads = [params[n].grad / self.ranks for n in self.trained]
      total = grads if total is None else [t + g for t, g in zip(total, grads, strict=True)]
    for name, grad in zip(self.trained, total, strict=True):
      params[name].grad = grad
    with torch.no_grad():
      self._update(lr_scale, momentum)
    return torch.stack(losses).sum() / self.ranks

  def _update(self, lr_scale: float, momentum: float) -> None:
    o, params = self.settings.optimizer, self.model.params
    for name in self.banks:
      kept = self.momentum[name]
      grad = params[name].grad.to(kept.dtype)
      params[name].grad = None
      u = grad.add(kept.mul_(momentum).add_(grad), alpha=momentum)
      if o.muon_row_normalize:
        u = u / u.norm(dim=-1, keepdim=True).clamp_min(1e-7)
      u = polar_express(u, o.muon_steps) * max(1.0, u.shape[-2] / u.shape[-1]) ** 0.5
      rate = o.matrix_lr * lr_scale
      params[name].mul_(1 - rate * o.muon_wd).sub_(rate * u.to(torch.float32))
    for g in self.adam.param_groups:
      g["lr"] = g["base"] * lr_scale
    self.adam.step()
    for name, value in params.items():
      self.average[name].lerp_(value, 1 - self.settings.train.ema_decay)
