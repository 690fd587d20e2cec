"""Work of the train step by formula: matrix products and attention, two operations to a multiply-add."""

from pgolf_jax.model import params as parameters
from pgolf_jax.model.params import BANKS, layer_order
from pgolf_jax.settings.config import ModelConfig, Settings


def forward(model: ModelConfig, tokens: int, seq_len: int, *, looping: bool) -> float:
  """A forward pass: every use of a matrix, the head, and attention's two products over (seq_len + 1)/2 keys a query.

  Segments that end early need less attention than this.
  """
  D = model.model_dim
  positions = sum(map(len, layer_order(model, looping)))
  layer = 2 * D * D + 2 * D * model.kv_dim + 2 * D * model.mlp_dim + D * (seq_len + 1)
  return 2.0 * tokens * (positions * layer + model.vocab_size * D)


def orthogonalisation(settings: Settings, devices: int) -> float:
  """A device's share of the polar-express steps: X Xᵀ, A², and (bA + cA²)X of each matrix."""
  total = 0.0
  for name, shape in parameters.shapes(settings.model).items():
    if name in BANKS:
      stack, m, n = shape
      short, long = min(m, n), max(m, n)
      each = 2.0 * (2 * short * short * long + short**3)
      total += -(-stack // devices) * each * settings.optimizer.muon_steps
  return total


def train_step(settings: Settings, devices: int, seq_len: int, looping: bool) -> float:
  """One device's share of a step; the gradient costs twice the forward pass."""
  tokens = settings.train.batch_tokens // devices
  return 3 * forward(settings.model, tokens, seq_len, looping=looping) + orthogonalisation(settings, devices)
