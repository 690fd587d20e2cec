"""The same operations as plain PyTorch writes them, on the same kind of device as JAX's."""

from collections.abc import Callable

import jax
import numpy as np

from pgolf_jax.bench import _kernel_cases as sizes


def functions(platform: str) -> dict[str, Callable] | None:
  """By operation, a function of that operation's arguments as tensors, or None: no PyTorch for this platform."""
  try:
    import torch
    import torch.nn.functional as nn
  except ImportError:
    return None
  if platform not in ("cpu", "gpu") or (platform == "gpu" and not torch.cuda.is_available()):
    return None

  def segment_attention(q, k, v, start):
    begins = torch.unique(start[0]).tolist()
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    parts = [
      nn.scaled_dot_product_attention(*(a[:, :, i:j] for a in (q, k, v)), is_causal=True, enable_gqa=True)
      for i, j in zip(begins, [*begins[1:], q.shape[2]], strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)

  def leaky_relu2_mlp(x, up, down):
    return nn.linear(nn.leaky_relu(nn.linear(x, up), sizes.SLOPE).square(), down)

  def softcapped_xent(z, y):
    cap = sizes.CAPS["cap_pos"]
    return nn.cross_entropy(cap * torch.tanh(z.float() / cap), y.long(), reduction="none")

  def linear_softcapped_xent(x, weight, y):
    return softcapped_xent(nn.linear(x, weight), y)

  from pgolf_jax.bench._torch_gpt import polar_express

  return {
    f.__name__: f for f in (segment_attention, leaky_relu2_mlp, softcapped_xent, linear_softcapped_xent, polar_express)
  }


def timed_call(f: Callable, case: sizes.Case, platform: str, with_gradient: bool) -> tuple[Callable, Callable]:
  """A call of f on the case's arguments, and a function that waits for what was called."""
  import torch

  device = "cuda" if platform == "gpu" else "cpu"

  def tensor(i: int, a: jax.Array):
    wide = np.asarray(a if a.dtype.kind in "iu" else a.astype("float32"))
    t = torch.from_numpy(wide.copy()).to(device)
    t = t if a.dtype.kind in "iu" else t.to(getattr(torch, str(a.dtype)))
    return t.requires_grad_(with_gradient and i in case.differentiated)

  tensors = [tensor(i, a) for i, a in enumerate(case.arguments)]

  def call():
    result = f(*tensors)
    if with_gradient:
      torch.autograd.grad(result.sum(), [tensors[i] for i in case.differentiated])

  return call, torch.cuda.synchronize if platform == "gpu" else lambda: None
