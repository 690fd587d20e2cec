"""Which implementation each operation of the step takes on this machine, and why: for the run log."""

import jax
import jax.numpy as jnp

from pgolf_jax.kernels.leaky_relu2_mlp import api as mlp
from pgolf_jax.kernels.polar_express import api as polar
from pgolf_jax.kernels.segment_attention import api as attention
from pgolf_jax.kernels.softcapped_xent import api as xent
from pgolf_jax.settings.config import Settings


def chosen(settings: Settings) -> dict[str, str]:
  """Operation → "implementation (reason)", for a micro-batch of the settings' size and type."""
  m, t = settings.model, settings.train
  N = t.batch_tokens // t.micro_batches

  def array(*shape: int, dtype: str = t.compute_dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

  q, k = array(1, N, m.num_heads, m.head_dim), array(1, N, m.num_kv_heads, m.head_dim)
  x, up, down = array(N, m.model_dim), array(m.mlp_dim, m.model_dim), array(m.model_dim, m.mlp_dim)
  bank = array(2 * m.num_layers, m.model_dim, m.model_dim, dtype=settings.optimizer.muon_dtype)
  found = {
    "segment attention": attention.choose(q, k, k, array(1, N, dtype="int32"), max_segment=t.seq_len),
    "LeakyReLU² MLP": mlp.choose(x, up, down),
    "softcapped cross-entropy": xent.choose(array(N, m.vocab_size)),
    "polar express": polar.choose(bank),
  }
  return {operation: f"{choice.name} ({choice.reason})" for operation, choice in found.items()}
