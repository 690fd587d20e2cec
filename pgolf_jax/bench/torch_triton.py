"""The stand-in's fused operations on a GPU, in Triton, under the names and signatures that `torch_gpt` has.

The MLP's two products that carry the activation, and the softcapped cross-entropy in one pass over the logits each way.
To torch.compile each is one operation whose inside it does not see.
"""

import importlib.util
import inspect

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from pgolf_jax.bench.torch_gpt import (
  chunk_attention,
  gated_xsa,
  polar_express,
  residual_norm,
  rotary_heads,
  synchronize,
  tensor,
)
from pgolf_jax.bench.torch_gpt import segment_attention as by_segment

__all__ = [
  "chunk_attention",
  "gated_xsa",
  "leaky_relu2_mlp",
  "polar_express",
  "residual_norm",
  "rotary_heads",
  "segment_attention",
  "softcapped_xent",
  "synchronize",
  "tensor",
  "torch",
]

varlen = None
if importlib.util.find_spec("torch.nn.attention.varlen") is not None:  # from PyTorch 2.10 on
  varlen = importlib.import_module("torch.nn.attention.varlen")

_GROUP = 8
"""Tiles of rows that are computed together, so that their operands stay in L2."""
_CONFIGS = [
  triton.Config({"ROWS": rows, "COLUMNS": columns, "INNER": 64}, num_warps=8, num_stages=stages)
  for rows, columns in ((128, 256), (128, 128))
  for stages in (3, 4)
]


@triton.jit
def _tile(a, b, N, F, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr):
  """Returns the sums of one tile of a [N, D] · b [D, F], and the places of its rows and columns."""
  index = tl.program_id(0)
  row_tiles, column_tiles = tl.cdiv(N, ROWS), tl.cdiv(F, COLUMNS)
  first = index // (GROUP * column_tiles) * GROUP
  height = tl.minimum(row_tiles - first, GROUP)
  within = index % (GROUP * column_tiles)
  n = (first + within % height) * ROWS + tl.arange(0, ROWS)
  f = within // height * COLUMNS + tl.arange(0, COLUMNS)
  d = tl.arange(0, INNER)
  sums = tl.zeros((ROWS, COLUMNS), tl.float32)
  for begin in range(0, D, INNER):
    inside = begin + d < D
    left = tl.load(a + n[:, None].to(tl.int64) * D + (begin + d)[None], mask=(n[:, None] < N) & inside[None], other=0.0)
    right = tl.load(b + (begin + d)[:, None] * F + f[None], mask=inside[:, None] & (f[None] < F), other=0.0)
    sums = tl.dot(left, right, sums)
  return sums, n, f


@triton.autotune(_CONFIGS, key=["F", "D"])
@triton.jit
def _up_kernel(
  x, up_DxF, u_out, a_out, N, F, D, slope,
  ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
  sums, n, f = _tile(x, up_DxF, N, F, D, ROWS, COLUMNS, INNER, GROUP)
  place, inside = n[:, None].to(tl.int64) * F + f[None], (n[:, None] < N) & (f[None] < F)
  rounded = sums.to(u_out.dtype.element_ty)
  tl.store(u_out + place, rounded, mask=inside)
  u = rounded.to(tl.float32)
  leaky = tl.where(u > 0, u, slope * u)
  tl.store(a_out + place, (leaky * leaky).to(a_out.dtype.element_ty), mask=inside)


@triton.autotune(_CONFIGS, key=["F", "D"])
@triton.jit
def _up_gradient_kernel(
  dy, down_DxF, u_in, du_out, N, F, D, slope,
  ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
  sums, n, f = _tile(dy, down_DxF, N, F, D, ROWS, COLUMNS, INNER, GROUP)
  place, inside = n[:, None].to(tl.int64) * F + f[None], (n[:, None] < N) & (f[None] < F)
  u = tl.load(u_in + place, mask=inside, other=0.0).to(tl.float32)
  slope_of_phi = tl.where(u > 0, 2 * u, 2 * slope * slope * u)
  tl.store(du_out + place, (sums * slope_of_phi).to(du_out.dtype.element_ty), mask=inside)


def _grid(N: int, F: int):
  return lambda sizes: (triton.cdiv(N, sizes["ROWS"]) * triton.cdiv(F, sizes["COLUMNS"]),)


@torch.library.custom_op("pgolf::up", mutates_args=())
def _up(x: torch.Tensor, up: torch.Tensor, slope: float) -> tuple[torch.Tensor, torch.Tensor]:
  (N, D), F_ = x.shape, up.shape[0]
  u, a = (torch.empty((N, F_), dtype=x.dtype, device=x.device) for _ in range(2))
  _up_kernel[_grid(N, F_)](x.contiguous(), up.mT.contiguous(), u, a, N, F_, D, slope, GROUP=_GROUP)
  return u, a


@_up.register_fake
def _(x, up, slope):
  hidden = x.new_empty((x.shape[0], up.shape[0]))
  return hidden, torch.empty_like(hidden)


@torch.library.custom_op("pgolf::up_gradient", mutates_args=())
def _up_gradient(dy: torch.Tensor, down: torch.Tensor, u: torch.Tensor, slope: float) -> torch.Tensor:
  (N, D), F_ = dy.shape, u.shape[1]
  du = torch.empty_like(u)
  _up_gradient_kernel[_grid(N, F_)](dy.contiguous(), down.contiguous(), u, du, N, F_, D, slope, GROUP=_GROUP)
  return du


@_up_gradient.register_fake
def _(dy, down, u, slope):
  return torch.empty_like(u)


class _MLP(torch.autograd.Function):
  @staticmethod
  def forward(ctx, x, up, down, slope):
    u, a = _up(x, up, slope)
    ctx.save_for_backward(x, up, down, u, a)
    ctx.slope = slope
    return F.linear(a, down)

  @staticmethod
  def backward(ctx, dy):
    x, up, down, u, a = ctx.saved_tensors
    du = _up_gradient(dy, down, u, ctx.slope)
    return du @ up, du.mT @ x, dy.mT @ a, None


def leaky_relu2_mlp(x, up, down, slope: float):
  """down · φ(up · x) with φ(u) = leaky_relu(u)²; x [N, D]."""
  return _MLP.apply(x, up, down, slope)


@triton.jit
def _capped(z, cap):
  """Returns the softcapped logits, and the tanh in them."""
  tanh = 2 * tl.sigmoid(2 * z / cap) - 1
  return cap * tanh, tanh


@triton.jit
def _xent_kernel(z_in, target_in, nll_out, lse_out, V, cap, BLOCK: tl.constexpr):
  row, v = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
  logits, _ = _capped(tl.load(z_in + row * V + v, mask=v < V, other=0.0).to(tl.float32), cap)
  # The cap bounds the logits: no running maximum is needed.
  lse = cap + tl.log(tl.sum(tl.where(v < V, tl.exp(logits - cap), 0.0)))
  target = tl.load(target_in + row)
  tl.store(nll_out + row, lse - tl.sum(tl.where(v == target, logits, 0.0)))
  tl.store(lse_out + row, lse)


@triton.jit
def _xent_gradient_kernel(z_in, target_in, lse_in, d_nll_in, dz_out, V, cap, BLOCK: tl.constexpr):
  row, v = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
  logits, tanh = _capped(tl.load(z_in + row * V + v, mask=v < V, other=0.0).to(tl.float32), cap)
  p = tl.exp(logits - tl.load(lse_in + row)) - tl.where(v == tl.load(target_in + row), 1.0, 0.0)
  dz = tl.load(d_nll_in + row) * p * (1 - tanh * tanh)
  tl.store(dz_out + row * V + v, dz.to(dz_out.dtype.element_ty), mask=v < V)


@torch.library.custom_op("pgolf::xent", mutates_args=())
def _xent(z: torch.Tensor, target: torch.Tensor, cap: float) -> tuple[torch.Tensor, torch.Tensor]:
  N, V = z.shape
  nll, lse = (torch.empty((N,), dtype=torch.float32, device=z.device) for _ in range(2))
  _xent_kernel[(N,)](z.contiguous(), target, nll, lse, V, cap, BLOCK=triton.next_power_of_2(V), num_warps=8)
  return nll, lse


@_xent.register_fake
def _(z, target, cap):
  nll = z.new_empty((z.shape[0],), dtype=torch.float32)
  return nll, torch.empty_like(nll)


@torch.library.custom_op("pgolf::xent_gradient", mutates_args=())
def _xent_gradient(
  z: torch.Tensor, target: torch.Tensor, lse: torch.Tensor, d_nll: torch.Tensor, cap: float
) -> torch.Tensor:
  (N, V), z = z.shape, z.contiguous()
  dz, block = torch.empty_like(z), triton.next_power_of_2(V)
  _xent_gradient_kernel[(N,)](z, target, lse, d_nll.contiguous(), dz, V, cap, BLOCK=block, num_warps=8)
  return dz


@_xent_gradient.register_fake
def _(z, target, lse, d_nll, cap):
  return torch.empty_like(z, memory_format=torch.contiguous_format)


class _Xent(torch.autograd.Function):
  @staticmethod
  def forward(ctx, z, target, cap):
    nll, lse = _xent(z, target, cap)
    ctx.save_for_backward(z, target, lse)
    ctx.cap = cap
    return nll

  @staticmethod
  def backward(ctx, d_nll):
    z, target, lse = ctx.saved_tensors
    return _xent_gradient(z, target, lse, d_nll, ctx.cap), None, None


def softcapped_xent(z_NxV, target_N, cap: float):
  """Negative log-probability, in nats, of each target under softmax(cap·tanh(z/cap)), float32."""
  return _Xent.apply(z_NxV, target_N, cap)


def has_varlen(dtype: torch.dtype) -> bool:
  """Whether PyTorch has attention of variable lengths for this type."""
  return varlen is not None and dtype in (torch.bfloat16, torch.float16)


def varlen_attention(q_TxHxC, k_TxKxC, v_TxKxC, end_S, longest: int):
  """`segment_attention` by PyTorch's attention for variable lengths, which needs CUDA and 16-bit numbers.

  Args:
    end_S: int32: 0, then the end of each segment.
    longest: tokens of the longest segment.
  """
  names = inspect.signature(varlen.varlen_attn).parameters
  causal = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
  if "enable_gqa" in names:
    causal["enable_gqa"] = True
  else:
    group = q_TxHxC.shape[1] // k_TxKxC.shape[1]
    k_TxKxC, v_TxKxC = (x.repeat_interleave(group, 1) for x in (k_TxKxC, v_TxKxC))
  return varlen.varlen_attn(q_TxHxC, k_TxKxC, v_TxKxC, end_S, end_S, longest, longest, **causal)


def segment_attention(q_TxHxC, k_TxKxC, v_TxKxC, lengths: tuple[int, ...]):
  """Causal attention within segments of these lengths, in one call where PyTorch has attention of variable lengths."""
  if not has_varlen(q_TxHxC.dtype):
    return by_segment(q_TxHxC, k_TxKxC, v_TxKxC, lengths)
  return varlen_attention(q_TxHxC, k_TxKxC, v_TxKxC, _ends(lengths, str(q_TxHxC.device)), max(lengths))


_ENDS: dict[tuple[tuple[int, ...], str], torch.Tensor] = {}


def _ends(lengths: tuple[int, ...], device: str) -> torch.Tensor:
  """The segments' ends on the device, placed there once."""
  if (lengths, device) not in _ENDS:
    _ENDS[lengths, device] = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(device)
  return _ENDS[lengths, device]
