"""Work of test-time training in floating-point operations, to choose shapes by and to measure waste with."""

import dataclasses

from pgolf_jax.model.adapters import widths
from pgolf_jax.model.params import layer_order
from pgolf_jax.settings.config import ModelConfig, TTTConfig


@dataclasses.dataclass(frozen=True)
class Costs:
  """FLOPs of matrix products and attention, two to a multiply-add; element-wise work is left out.

  Attributes:
    token: of one token through all layers, adapters included, without attention's scores.
    pair: of one query and one key, in all layers.
    target: of one target through the head and its adapter.
    cached: whether the window's earlier tokens are kept rather than computed again.
    updates: gradient steps of a learning chunk, each with a pass of its own.
  """

  token: float
  pair: float
  target: float
  cached: bool
  updates: int

  @classmethod
  def of(cls, model: ModelConfig, ttt: TTTConfig) -> "Costs":
    D, K = model.model_dim, model.kv_dim
    positions = sum(map(len, layer_order(model, True)))
    kinds = widths(model, ttt)
    rank = ttt.lora.rank
    layer = 2 * D * D + 2 * K * D + 2 * model.mlp_dim * D
    low = sum(rank * (D + out) for kind, out in kinds.items() if kind != "head")
    return cls(
      token=2.0 * positions * (layer + low),
      pair=2.0 * positions * 2 * D,
      target=2.0 * (model.vocab_size * D + rank * (D + model.vocab_size)),
      cached=ttt.method == "cached",
      updates=ttt.lora.grad_steps,
    )

  def row(self, window: int, width: int, *, learn: bool) -> float:
    """One document's chunk of `width` targets at the end of a window; each update computes inputs' gradients too."""
    tokens = width if self.cached else window
    pairs = width * window if self.cached else window * window / 2
    return (tokens * self.token + pairs * self.pair + width * self.target) * (max(2 * self.updates, 1) if learn else 1)

  def step(self, slots: int, window: int, width: int, *, learn: bool) -> float:
    """A compiled step, on one device."""
    return slots * self.row(window, width, learn=learn)
