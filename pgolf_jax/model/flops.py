"""Floating-point operations of the model by formula: matrix products and attention, two to a multiply-add.

Element-wise work is left out. A gradient costs twice its forward pass, or as much again where only the inputs of the
matrices need one.
"""

from pgolf_jax.model import params as parameters
from pgolf_jax.model.params import BANKS, layer_order
from pgolf_jax.settings import ModelConfig, Settings


def positions(model: ModelConfig, *, looping: bool) -> int:
  """Number of layers that a token passes through."""
  return sum(map(len, layer_order(model, looping)))


def token(model: ModelConfig, *, looping: bool) -> float:
  """The matrices of all layers, applied to one token."""
  D = model.model_dim
  return 2.0 * positions(model, looping=looping) * (2 * D * D + 2 * D * model.kv_dim + 2 * D * model.mlp_dim)


def pair(model: ModelConfig, *, looping: bool) -> float:
  """One query and one key in all layers: their score, and the value's share of the output."""
  return 4.0 * positions(model, looping=looping) * model.model_dim


def head(model: ModelConfig) -> float:
  """The logits of one target."""
  return 2.0 * model.vocab_size * model.model_dim


def adapter(model: ModelConfig, rank: int, width: int) -> float:
  """One low-rank adapter of this output width, applied to one token."""
  return 2.0 * rank * (model.model_dim + width)


def causal_pairs(tokens: int) -> float:
  """Pairs of a query and a key that it sees, in a segment of this many tokens."""
  return tokens * (tokens + 1) / 2


def forward(model: ModelConfig, tokens: float, seq_len: float, *, looping: bool) -> float:
  """A forward pass over segments of `seq_len` tokens; those that end early need less attention than this."""
  keys = (seq_len + 1) / 2  # that a query sees on average
  return tokens * (token(model, looping=looping) + head(model) + keys * pair(model, looping=looping))


def forward_and_gradient(model: ModelConfig, tokens: float, seq_len: float, *, looping: bool) -> float:
  """A forward pass, as `forward` counts it, and its gradient."""
  return 3 * forward(model, tokens, seq_len, looping=looping)


def orthogonalisation(settings: Settings, devices: int) -> float:
  """One device's share of the polar-express steps: X Xᵀ, A², and (bA + cA²)X of each matrix."""
  total = 0.0
  for name, shape in parameters.shapes(settings.model).items():
    if name in BANKS:
      stack, m, n = shape
      short, long = min(m, n), max(m, n)
      each = 2.0 * (2 * short * short * long + short**3)
      total += -(-stack // devices) * each * min(settings.optimizer.muon_steps, 5)  # there are coefficients for no more
  return total


def train_step(settings: Settings, devices: int, seq_len: float, *, looping: bool) -> float:
  """One device's share of a training step."""
  tokens = settings.train.batch_tokens // devices
  passes = forward_and_gradient(settings.model, tokens, seq_len, looping=looping)
  return passes + orthogonalisation(settings, devices)
