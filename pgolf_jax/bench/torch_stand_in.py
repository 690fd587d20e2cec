"""A stand-in in PyTorch for the step of the reference's script, whose own attention needs a library that few have."""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention

from pgolf_jax.bench import torch_gpt


class Segments(NamedTuple):
  """Segments that stand end to end, as attention wants them."""

  lengths: tuple[int, ...]
  longest: int
  end_S: torch.Tensor  # int32: 0, then the end of each segment
  position_T: torch.Tensor  # of each token in its segment
  mask: Any  # flex_attention's; None where another attention is used


class StandIn(torch_gpt.TorchGPT):
  """The model as the reference's script computes it on a GPU: one call of attention over all segments, fused kernels.

  The MLP and the cross-entropy are Triton's kernels where CUDA and Triton are there, PyTorch's operations elsewhere.

  Args:
    attention: "varlen", "flex", or "sdpa" with a call for each segment; the first that is possible if not given.
  """

  def __init__(self, config, params, dtype=torch.float32, device: str = "cpu", attention: str | None = None):
    super().__init__(config, params, dtype, device)
    self.operations = (torch_gpt.fused() if device != "cpu" else None) or self.operations
    has_varlen = device != "cpu" and torch_gpt.fused() is not None and self.operations.has_varlen(dtype)
    self.attention = attention or ("varlen" if has_varlen else "sdpa" if device == "cpu" else "flex")
    self._segments = functools.lru_cache(maxsize=8)(self._make_segments)

  def loss(self, tokens_T1, lengths: tuple[int, ...], looping: bool) -> torch.Tensor:
    """See `TorchGPT`. Only what lies after the division into segments is compiled."""
    return self._loss(tokens_T1, self._segments(lengths), looping)

  def compile(self) -> None:
    self._loss = torch.compile(self._loss)

  def _loss(self, tokens_T1, segments: Segments, looping: bool) -> torch.Tensor:
    z, cap = self._z(tokens_T1[:-1], segments, looping), self.config.logit_softcap
    return self.operations.softcapped_xent(z, tokens_T1[1:], cap).mean()

  def _make_segments(self, lengths: tuple[int, ...]) -> Segments:
    sizes, mask = torch.tensor(lengths, device=self.params["tok_emb.weight"].device), None
    end_S = F.pad(sizes.cumsum(0), (1, 0)).int()
    document_T, position_T = torch.repeat_interleave(sizes), super()._positions(lengths)
    if self.attention == "flex":
      sees = lambda b, h, q, k: (q >= k) & (document_T[q] == document_T[k])  # noqa: E731
      mask = flex_attention.create_block_mask(sees, None, None, *2 * (sum(lengths),), device=str(sizes.device))
    return Segments(lengths, max(lengths), end_S, position_T, mask)

  def _positions(self, segments: Segments):
    return segments.position_T

  def _attend(self, q, k, v, segments: Segments):
    if self.attention == "sdpa":
      return torch_gpt.segment_attention(q, k, v, segments.lengths)
    if self.attention == "varlen":
      return self.operations.varlen_attention(q, k, v, segments.end_S, segments.longest)
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    return flex_attention.flex_attention(*heads_first, block_mask=segments.mask, enable_gqa=True)[0].transpose(0, 1)
