"""The recipe's model and its training step in PyTorch, and the operations that have kernels as PyTorch writes them.

It is timed beside JAX, and is a second, independent writing of the recipe for the tests of the model. Letters: as in
`pgolf_jax.model`; there are no rows, all documents stand end to end.
"""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pgolf_jax.bench.harness import Peak, Way
from pgolf_jax.kernels.numerics import EPS
from pgolf_jax.kernels.polar_express.reference import COEFFICIENTS
from pgolf_jax.model.params import SOFTCAPS, layer_order
from pgolf_jax.runtime.distributed import world_size
from pgolf_jax.settings import ModelConfig, Settings
from pgolf_jax.training.optimizer import group


def fused() -> ModuleType | None:
  """Returns `torch_triton`, whose operations have the names and signatures of those here, where it can run."""
  if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
    return None
  return importlib.import_module("pgolf_jax.bench.torch_triton")


def platforms() -> tuple[str, ...]:
  """JAX's names of the platforms on which this PyTorch computes."""
  return ("cpu", "gpu") if torch.cuda.is_available() else ("cpu",)


def device(platform: str) -> str:
  """PyTorch's name of one of JAX's platforms."""
  return "cuda" if platform == "gpu" else "cpu"


def synchronize(platform: str) -> None:
  """Waits for the device."""
  if platform == "gpu":
    torch.cuda.synchronize()


def count_memory(platform: str) -> Callable[[], Peak | None]:
  """Starts counting the memory of PyTorch's pool on a GPU; returns a function that reads the count."""
  if platform != "gpu":
    return lambda: None
  torch.cuda.reset_peak_memory_stats()
  return lambda: Peak(torch.cuda.max_memory_allocated(), is_bound=False)


def tensor(array, platform: str) -> torch.Tensor:
  """An array of JAX's or NumPy's on a platform's device; integers become 64 bits wide."""
  if array.dtype.kind in "iu":
    return torch.tensor(np.asarray(array, np.int64), device=device(platform))
  return torch.tensor(np.asarray(array, np.float32), dtype=getattr(torch, str(array.dtype)), device=device(platform))


def polar_express(u, steps: int = 5):
  """Orthogonalises each matrix of a stack [B, m, n], in the type of u."""
  tall = u.shape[-2] > u.shape[-1]
  x = u.mT if tall else u
  x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
  for a, b, c in COEFFICIENTS[:steps]:
    gram = x @ x.mT
    x = a * x + (b * gram + c * (gram @ gram)) @ x
  return x.mT if tall else x


def segment_attention(q_TxHxC, k_TxKxC, v_TxKxC, lengths: tuple[int, ...]):
  """Causal attention within each of the segments that stand end to end, of these lengths."""

  def attend(*qkv):  # [segments, tokens, heads, C]
    q, k, v = (x.transpose(1, 2) for x in qkv)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

  qkv = q_TxHxC, k_TxKxC, v_TxKxC
  if len(set(lengths)) == 1:
    return attend(*(x.unflatten(0, (-1, lengths[0])) for x in qkv)).flatten(0, 1)
  segments = zip(*(x.split(lengths) for x in qkv), strict=True)
  return torch.cat([attend(*(x[None] for x in segment))[0] for segment in segments])


def chunk_attention(q, k, v, ring_k, ring_v):
  """Causal attention [B, X, H, C] of a chunk over itself and a full ring, whose first X places it will overwrite."""
  X, S = q.shape[1], ring_k.shape[3]
  k, v = (torch.cat([x[0].permute(1, 0, 2, 3), y.transpose(1, 2)], 2) for x, y in ((ring_k, k), (ring_v, v)))
  is_seen = torch.cat([torch.arange(S) >= X, torch.ones(X, dtype=torch.bool)]).repeat(X, 1)
  is_seen = is_seen.tril(S).to(q.device)
  y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=is_seen, enable_gqa=True)
  return y.transpose(1, 2)


def leaky_relu2_mlp(x, up, down, slope: float):
  """down · φ(up · x) with φ(u) = leaky_relu(u)²."""
  return F.linear(F.leaky_relu(F.linear(x, up), slope).square(), down)


def softcapped_xent(z_NxV, target_N, cap: float):
  """Negative log-probability, in nats, of each target under softmax(cap·tanh(z/cap))."""
  return F.cross_entropy(cap * torch.tanh(z_NxV.float() / cap), target_N, reduction="none")


def _norm(x):
  return F.rms_norm(x, x.shape[-1:], eps=EPS)


def residual_norm(x, added, add, keep, scale: float):
  """The sum keep · x + add · added, and its norm times scale."""
  y = keep.to(x.dtype) * x + add.to(x.dtype) * added
  return y, _norm(y) * scale


def _rotate(x, cos, sin):
  half = cos.shape[-1]
  a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
  return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], -1)


def rotary_heads(qkv, gain, cos, sin, kv_heads: int):
  """Queries, keys, and values twice, [B, T, heads, C], out of [B, T, F]."""
  sizes = gain.shape[0], kv_heads, kv_heads
  q, k, v = qkv.unflatten(-1, (sum(sizes), -1)).split(sizes, dim=2)
  cos, sin = (x[:, None].to(qkv.dtype) for x in (cos, sin))
  return _rotate(_norm(q), cos, sin) * gain[:, None].to(qkv.dtype), _rotate(_norm(k), cos, sin), v, v


def _without_own_value(y, v):
  """What is left of each head's output [..., H, C] without its component along its position's value [..., K, C]."""
  grouped = y.unflatten(-2, (v.shape[-2], -1))
  direction = F.normalize(v, dim=-1).unsqueeze(-2)
  return (grouped - (grouped * direction).sum(-1, keepdim=True) * direction).flatten(-3, -2)


def _gated(y, gate, scale: float):
  return y * torch.sigmoid(scale * gate)[..., None]


def gated_xsa(y, v, gate, scale: float):
  """XSA and the gate: [B, T, H, C] of y, [B, T, K, C] of v and [B, T, H] of the gate."""
  return _gated(_without_own_value(y, v), gate, scale)


def not_written(settings: Settings) -> list[str]:
  """Returns the names of settings beyond the recipe that are on and that the model and the step here do not know."""
  model, optimizer = settings.model, settings.optimizer
  beyond = {
    "model.value_residual": model.value_residual,
    "model.dense_skips": model.dense_skips,
    "optimizer.muon_column_normalize": optimizer.muon_column_normalize,
    "optimizer.muon_heads": optimizer.muon_heads,
  }
  return [name for name, value in beyond.items() if value]


class TorchGPT:
  """The model on documents that stand end to end.

  Args:
    params: arrays under the recipe's names, as in `pgolf_jax.model.params`; held in float32.
    dtype: of the computation.
    device: PyTorch's name of a device.
  """

  operations = sys.modules[__name__]  # where the MLP and the cross-entropy come from

  def __init__(self, config: ModelConfig, params: dict, dtype=torch.float32, device: str = "cpu"):
    self.config, self.dtype = config, dtype
    self.params = {k: torch.tensor(np.asarray(v), device=device).requires_grad_() for k, v in params.items()}

  def loss(self, tokens_T1, lengths: tuple[int, ...], looping: bool) -> torch.Tensor:
    """Mean negative log-likelihood of the targets, nats: tokens from the second on, each from those before."""
    cap = self.config.logit_softcap
    return softcapped_xent(self._z(tokens_T1[:-1], lengths, looping), tokens_T1[1:], cap).mean()

  def compile(self) -> None:
    """Makes the loss run through torch.compile."""
    self.loss = torch.compile(self.loss)

  def evaluation_logits(self, tokens_T, lengths: tuple[int, ...], looping: bool) -> torch.Tensor:
    """Logits [T, V] under the softcaps of evaluation, float32."""
    z = self._z(tokens_T, lengths, looping).float()
    cap = torch.where(z > 0, *(self.params.get(name, self.config.logit_softcap) for name in SOFTCAPS))
    return cap * torch.tanh(z / cap)

  def _positions(self, lengths: tuple[int, ...]):
    return torch.cat([torch.arange(n, device=self.params["tok_emb.weight"].device) for n in lengths])

  def _angles(self, lengths: tuple[int, ...]):
    position_T = self._positions(lengths)
    dims = self.config.rope_dims or self.config.head_dim
    frequency = self.config.rope_base ** (-torch.arange(0, dims, 2, device=position_T.device) / dims)
    angle = position_T[:, None] * frequency
    return angle.cos().to(self.dtype)[:, None], angle.sin().to(self.dtype)[:, None]

  def _embed(self, p: dict, tokens_T):
    m = self.config
    # Looked up in float32, for the gradients of a token's many uses are added up in the type of the lookup.
    x = F.embedding(tokens_T, self.params["tok_emb.weight"]).to(self.dtype)
    if m.smear_gate:
      gate = torch.sigmoid(F.linear(x[1:, : m.gate_window], p["smear_gate.weight"]))
      inside = (tokens_T[1:, None] != m.bos_id).to(x.dtype)
      x = torch.cat([x[:1], x[1:] + p["smear_lambda"] * gate * x[:-1] * inside])
    return _norm(x)

  def _attention(self, p: dict, n, layer: int, angles, lengths):
    m = self.config

    def heads(kind: str, weight, count: int):
      return self._adapted(kind, F.linear(n, weight), n).unflatten(-1, (count, m.head_dim))

    q = _rotate(_norm(heads("q", p["qo_bank"][layer], m.num_heads)), *angles)
    k = _rotate(_norm(heads("k", p["kv_bank"][layer], m.num_kv_heads)), *angles)
    v = heads("v", p["kv_bank"][m.num_layers + layer], m.num_kv_heads)
    y = self._attend(q * p[f"blocks.{layer}.attn.q_gain"][:, None], k, v, lengths)
    if layer >= m.num_layers - m.xsa_last_n:
      y = _without_own_value(y, v)
    if m.sparse_attn_gate:
      gate = F.linear(n[:, : m.gate_window], p[f"blocks.{layer}.attn.attn_gate_w"])
      y = _gated(y, gate, m.sparse_attn_gate_scale)
    out = self._adapted("o", F.linear(y.flatten(1), p["qo_bank"][m.num_layers + layer]), n)
    return p[f"blocks.{layer}.attn_scale"] * out

  def _attend(self, q, k, v, lengths):
    return segment_attention(q, k, v, lengths)

  def _adapted(self, kind: str, y, n):
    """What a matrix makes of n; a model with adapters adds theirs."""
    return y

  def _mlp(self, p: dict, n, layer: int):
    matrices = p["mlp_up_bank"][layer], p["mlp_down_bank"][layer]
    y = self.operations.leaky_relu2_mlp(n, *matrices, self.config.leaky_relu_sq_slope)
    return p[f"blocks.{layer}.mlp_scale"] * self._adapted("mlp", y, n)

  def _head(self, hidden, p: dict):
    return F.linear(hidden, p["tok_emb.weight"])

  def _z(self, tokens_T, lengths: tuple[int, ...], looping: bool) -> torch.Tensor:
    """The head's output before any softcap, [T, V], in the type of the computation."""
    m = self.config
    p = {name: value.to(self.dtype) for name, value in self.params.items()}
    x = x0 = self._embed(p, tokens_T)
    angles = self._angles(lengths)
    encoder, decoder = layer_order(m, looping)
    scale = lambda layer: (layer + 1) ** -0.5 if m.ln_scale else 1.0  # noqa: E731

    def attention(x, layer):
      mix = p[f"blocks.{layer}.resid_mix"]
      mixed = mix[0] * x + mix[1] * x0
      return mixed, self._attention(p, _norm(mixed) * scale(layer), layer, angles, lengths)

    def mlp(x, layer):
      return self._mlp(p, _norm(x) * scale(layer), layer)

    def block(x, layer):
      x = sum(attention(x, layer))
      return x + mlp(x, layer)

    skips = []
    for layer in encoder:
      x = block(x, layer)
      skips.append(x)
    lanes = None
    for j, layer in enumerate(decoder):
      if lanes is None and layer >= m.parallel_start_layer > 0:
        lanes = (x, x)
      if skips:
        skip, joined = p["skip_weights"][j] * skips.pop(), lanes[0] if lanes else x
        joined = torch.lerp(skip, joined, torch.sigmoid(p["skip_gates"][j])) if m.skip_gates else joined + skip
        x, lanes = (x, (joined, lanes[1])) if lanes else (joined, None)
      if lanes is None:
        x = block(x, layer)
        continue
      a, b = attention(lanes[0], layer)[1], mlp(lanes[1], layer)
      R, P = p["parallel_resid_lambdas"][layer], p["parallel_post_lambdas"][layer]
      lanes = (R[0] * lanes[0] + P[0, 0] * a + P[1, 0] * b, R[1] * lanes[1] + P[0, 1] * a + P[1, 1] * b)
    if lanes:
      x = {"attn": lanes[0], "mlp": lanes[1], "mean": 0.5 * (lanes[0] + lanes[1])}[m.parallel_final_lane]
    return self._head(_norm(x), p)


class TorchStep:
  """A step of training on one device: gradients by accumulation, clipping, Muon and AdamW, moving average.

  Args:
    ranks: groups of micro-batches; the mean gradient of each group is clipped on its own.
    loss: mean loss of the tokens [T+1] of a micro-batch, by `model`.
  """

  def __init__(self, settings: Settings, model: TorchGPT, ranks: int, loss: Callable[[torch.Tensor], torch.Tensor]):
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
    self.orthogonalise = polar_express
    self.adam = torch.optim.AdamW(groups, betas=(o.beta1, o.beta2), eps=o.adam_eps)

  def __call__(self, tokens_MxT1, lr_scale: float, momentum: float) -> torch.Tensor:
    """Takes one step on M micro-batches; returns the mean loss, nats."""
    params, limit = self.model.params, self.settings.optimizer.grad_clip_norm
    total, losses = None, []
    for rows in tokens_MxT1.chunk(self.ranks):
      for value in params.values():
        value.grad = torch.zeros_like(value)
      for row in rows:
        loss = self.loss(row) / len(rows)
        loss.backward()
        losses.append(loss.detach())
      if limit > 0:
        torch.nn.utils.clip_grad_norm_(params.values(), limit)
      grads = [params[n].grad / self.ranks for n in self.trained]
      total = grads if total is None else [t + g for t, g in zip(total, grads, strict=True)]
    for name, grad in zip(self.trained, total, strict=True):
      params[name].grad = grad
    with torch.no_grad():
      self.update(lr_scale, momentum)
    return torch.stack(losses).sum() / self.ranks

  def update(self, lr_scale: float, momentum: float) -> None:
    """Does what follows the gradients, which lie in the parameters."""
    o, params = self.settings.optimizer, self.model.params
    for name in self.banks:
      moment = self.momentum[name]
      grad = params[name].grad.to(moment.dtype)
      params[name].grad = None
      u = grad.add(moment.mul_(momentum).add_(grad), alpha=momentum)
      if o.muon_row_normalize:
        u = u / u.norm(dim=-1, keepdim=True).clamp_min(1e-7)
      u = self.orthogonalise(u, o.muon_steps) * max(1.0, u.shape[-2] / u.shape[-1]) ** 0.5
      rate = o.matrix_lr * lr_scale
      params[name].mul_(1 - rate * o.muon_wd).sub_(rate * u.to(torch.float32))
    for g in self.adam.param_groups:
      g["lr"] = g["base"] * lr_scale
    self.adam.step()
    for name, value in params.items():
      self.average[name].lerp_(value, 1 - self.settings.train.ema_decay)


def way(case, *, compiled: bool, kind: type[TorchGPT] = TorchGPT) -> Way:
  """A `Case` of `pgolf bench step` in PyTorch, on the same kind of device.

  Args:
    compiled: run the loss through torch.compile.
    kind: the model, or the `StandIn`.
  """
  platform = case.device.platform
  return Way(
    case.labels("PyTorch"),
    functools.partial(start, case, compiled=compiled, kind=kind),
    case.work,
    wait=lambda _: synchronize(platform),
    count_memory=functools.partial(count_memory, platform),
  )


def start(case, *, compiled: bool, kind: type[TorchGPT] = TorchGPT) -> Callable[[], Any]:
  """Places a case's arguments; returns a function that does its pass once."""
  settings, platform = case.settings, case.device.platform
  model = kind(settings.model, case.params, getattr(torch, settings.train.compute_dtype), device(platform))
  if compiled:
    model.compile()
  tokens_MxT1 = tensor(case.tokens_MxT1, platform)
  loss = functools.partial(model.loss, lengths=case.segments, looping=case.looping)
  if case.passes == "step":
    ranks = world_size(settings, case.mesh) if settings.optimizer.clip_scope == "rank" else 1
    return functools.partial(TorchStep(settings, model, ranks, loss), tokens_MxT1, case.lr_scale, case.momentum)

  def forward():
    with torch.no_grad():
      return loss(tokens_MxT1[0])

  def gradient():
    return torch.autograd.grad(loss(tokens_MxT1[0]), list(model.params.values()), allow_unused=True)

  return forward if case.passes == "forward" else gradient
