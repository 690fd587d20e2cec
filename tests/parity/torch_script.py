"""A PyTorch training script of the kind that people dump from, written from the recipe; it is never run, only imported.

As such scripts do, it wants FlashAttention and Triton, reads its settings from the environment, and has the names
`GPT`, `Hyperparameters` and `Optimizers`; it has no training loop, no quantiser, no hints and no test-time training.
"""

import dataclasses
import os

import flash_attn_interface
import torch
import triton
import triton.language as tl
from torch import nn

from pgolf_jax.bench.torch_gpt import TorchGPT, _norm, _rotate, leaky_relu2_mlp, polar_express
from pgolf_jax.model.params import BANKS, SOFTCAPS, shapes
from pgolf_jax.settings import ModelConfig

BOS_ID = None


@triton.jit
def softcapped_loss_kernel(logits, targets, V, BLOCK: tl.constexpr):
  """Is never launched."""


def read(name: str, default):
  return type(default)(float(os.environ.get(name, default)))


class Hyperparameters:
  vocab_size = read("VOCAB_SIZE", 8192)
  num_layers = read("NUM_LAYERS", 11)
  model_dim = read("MODEL_DIM", 512)
  num_heads = read("NUM_HEADS", 8)
  num_kv_heads = read("NUM_KV_HEADS", 4)
  mlp_mult = read("MLP_MULT", 4.0)
  num_loops = read("NUM_LOOPS", 2)
  loop_start = read("LOOP_START", 3)
  loop_end = read("LOOP_END", 5)
  parallel_start_layer = read("PARALLEL_START_LAYER", 8)
  parallel_final_lane = os.environ.get("PARALLEL_FINAL_LANE", "mean")
  xsa_last_n = read("XSA_LAST_N", 11)
  rope_dims = read("ROPE_DIMS", 16)
  rope_base = read("ROPE_BASE", 1e4)
  qk_gain_init = read("QK_GAIN_INIT", 5.0)
  leaky_relu_sq_slope = read("LEAKY_RELU_SQ_SLOPE", 0.5)
  ln_scale = read("LN_SCALE", True)
  gate_window = read("GATE_WINDOW", 12)
  smear_gate_enabled = read("SMEAR_GATE_ENABLED", False)
  skip_gates_enabled = read("SKIP_GATES_ENABLED", True)
  sparse_attn_gate_enabled = read("SPARSE_ATTN_GATE_ENABLED", False)
  sparse_attn_gate_scale = read("SPARSE_ATTN_GATE_SCALE", 1.0)
  logit_softcap = read("LOGIT_SOFTCAP", 30.0)
  tied_embed_init_std = read("TIED_EMBED_INIT_STD", 0.005)
  rope_yarn = read("ROPE_YARN", False)
  fused_ce_enabled = read("FUSED_CE_ENABLED", True)
  matrix_lr = read("MATRIX_LR", 0.026)
  muon_wd = read("MUON_WD", 0.095)
  muon_momentum = read("MUON_MOMENTUM", 0.97)
  muon_momentum_warmup_start = read("MUON_MOMENTUM_WARMUP_START", 0.92)
  muon_backend_steps = read("MUON_BACKEND_STEPS", 5)
  muon_row_normalize = read("MUON_ROW_NORMALIZE", True)
  tied_embed_lr = read("TIED_EMBED_LR", 0.03)
  embed_wd = read("EMBED_WD", 0.085)
  scalar_lr = read("SCALAR_LR", 0.02)
  adam_wd = read("ADAM_WD", 0.02)
  beta1 = read("BETA1", 0.9)
  beta2 = read("BETA2", 0.95)
  adam_eps = read("ADAM_EPS", 1e-8)
  grad_clip_norm = read("GRAD_CLIP_NORM", 0.3)


class Layers(TorchGPT):
  """The recipe's layers over someone else's parameters, with FlashAttention."""

  def __init__(self, config: ModelConfig, params: dict[str, nn.Parameter]):
    self.config, self.dtype, self.params = config, torch.bfloat16, params

  def _angles(self, lengths):
    return super()._angles((sum(lengths),))  # positions count from the beginning of the row

  def _attention(self, p, n, layer, angles, lengths):
    m = self.config
    n = n.bfloat16()
    q, k, v = (
      (n @ weight.T).unflatten(-1, (heads, m.head_dim))
      for weight, heads in (
        (p["qo_bank"][layer], m.num_heads),
        (p["kv_bank"][layer], m.num_kv_heads),
        (p["kv_bank"][m.num_layers + layer], m.num_kv_heads),
      )
    )
    q = _rotate(_norm(q), *angles) * p[f"blocks.{layer}.attn.q_gain"][:, None]
    ends = torch.tensor([0, *lengths, 0, 0]).cumsum(0).int()  # with empty segments at the end
    longest = max(lengths)
    y = flash_attn_interface.flash_attn_varlen_func(
      q, _rotate(_norm(k), *angles), v, ends, ends, longest, longest, causal=True
    )
    if layer >= m.num_layers - m.xsa_last_n:
      v = v.repeat_interleave(m.num_heads // m.num_kv_heads, 1)
      direction = v / v.norm(dim=-1, keepdim=True)
      y = y - (y * direction).sum(-1, keepdim=True) * direction
    if m.sparse_attn_gate:
      gate = n[:, : m.gate_window] @ p[f"blocks.{layer}.attn.attn_gate_w"].T
      y = y * torch.sigmoid(m.sparse_attn_gate_scale * gate)[..., None]
    return p[f"blocks.{layer}.attn_scale"] * (y.flatten(1) @ p["qo_bank"][m.num_layers + layer].T)

  def _mlp(self, p, n, layer):
    y = leaky_relu2_mlp(n, p["mlp_up_bank"][layer], p["mlp_down_bank"][layer], self.config.leaky_relu_sq_slope)
    return p[f"blocks.{layer}.mlp_scale"] * y


class GPT(nn.Module):
  def __init__(self, h):
    super().__init__()
    fields = {field.name: (field.metadata.get("env") or "").lower() for field in dataclasses.fields(ModelConfig)}
    given = {name: getattr(h, env) for name, env in fields.items() if hasattr(h, env)}
    self.config = ModelConfig(**given, asym_logit_rescale=os.environ.get("ASYM_LOGIT_RESCALE") == "1")
    self.fused_ce_enabled = h.fused_ce_enabled
    self.looping_active = False
    for name, shape in shapes(self.config).items():
      *path, last = name.split(".")
      place = self
      for part in path:
        if part not in place._modules:
          place.add_module(part, nn.Module())
        place = place._modules[part]
      place.register_parameter(last, nn.Parameter(self.first_value(name, shape)))
    self.layers = [Layers(self.config, dict(self.named_parameters()))]  # in a list, for it is no module

  def first_value(self, name: str, shape: tuple[int, ...]):
    if name in SOFTCAPS:
      return torch.tensor(self.config.logit_softcap)
    return torch.randn(shape) * shape[-1] ** -0.5 if len(shape) > 1 else torch.ones(shape)

  def forward(self, input_ids, target_ids, cu_seqlens=None, max_seqlen=0):
    if self.fused_ce_enabled:
      return softcapped_loss_kernel[(1,)](input_ids, target_ids, self.config.vocab_size, BLOCK=64)
    tokens = torch.cat([input_ids[0], target_ids[0, -1:]])
    return self.layers[0].loss(tokens, self.lengths(cu_seqlens), self.looping_active)

  def forward_logits(self, input_ids, cu_seqlens=None, max_seqlen=0):
    return self.layers[0].evaluation_logits(input_ids[0], self.lengths(cu_seqlens), self.looping_active)[None]

  @staticmethod
  def lengths(cu_seqlens):
    assert BOS_ID == 1
    return tuple(n for n in cu_seqlens.diff().tolist() if n)


class Muon(torch.optim.Optimizer):
  def __init__(self, params, h):
    super().__init__(params, {"lr": h.matrix_lr, "base_lr": h.matrix_lr, "momentum": h.muon_momentum})
    self.h = h

  @torch.no_grad()
  @torch.compile
  def step(self):
    (group,) = self.param_groups
    for p in group["params"]:
      grad = p.grad.bfloat16()
      moment = self.state[p].setdefault("moment", torch.zeros_like(grad))
      moment.mul_(group["momentum"]).add_(grad)
      u = grad + group["momentum"] * moment
      if self.h.muon_row_normalize:
        u = u / u.norm(dim=-1, keepdim=True).clamp_min(1e-7)
      u = polar_express(u, self.h.muon_backend_steps) * max(1, p.shape[-2] / p.shape[-1]) ** 0.5
      p.mul_(1 - group["lr"] * self.h.muon_wd).sub_(group["lr"] * u)


class Optimizers:
  def __init__(self, h, model):
    named = dict(model.named_parameters())
    scalars = [p for name, p in named.items() if name not in (*BANKS, *SOFTCAPS, "tok_emb.weight")]
    adam = {"betas": (h.beta1, h.beta2), "eps": h.adam_eps}
    self.optimizer_muon = Muon([named[name] for name in BANKS], h)
    self.optimizers = [
      torch.optim.AdamW([{"params": params, "lr": lr, "base_lr": lr}], weight_decay=decay, **adam)
      for params, lr, decay in (
        ([named["tok_emb.weight"]], h.tied_embed_lr, h.embed_wd),
        (scalars, h.scalar_lr, h.adam_wd),
      )
    ] + [self.optimizer_muon]
    self.stream = torch.cuda.Stream()

  def __iter__(self):
    return iter(self.optimizers)

  def step(self):
    with torch.cuda.stream(self.stream):
      for optimizer in self.optimizers:
        optimizer.step()


if __name__ == "__main__":
  raise SystemExit("Training needs eight GPUs.")
