"""The backend that each accelerated operation of a training step takes on this machine, for the run log."""

import jax
import jax.numpy as jnp

from pgolf_jax.kernels import leaky_relu2_mlp as mlp
from pgolf_jax.kernels import polar_express as polar
from pgolf_jax.kernels import segment_attention as attention
from pgolf_jax.kernels import softcapped_xent as xent
from pgolf_jax.kernels.softcapped_xent import linear
from pgolf_jax.settings import Settings


def chosen(settings: Settings) -> dict[str, str]:
  """Returns, by operation, "backend (reason)" for a micro-batch of the settings' size and type.

  Shapes are those of one micro-batch in one row. The cross-entropy's are those of a block of its linear form.
  """
  m, t = settings.model, settings.train
  N = t.batch_tokens // t.micro_batches

  def array(*shape: int, dtype: str = t.compute_dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

  q, k, start = (
    array(1, N, m.num_heads, m.head_dim),
    array(1, N, m.num_kv_heads, m.head_dim),
    array(1, N, dtype="int32"),
  )
  x, up, down = array(N, m.model_dim), array(m.mlp_dim, m.model_dim), array(m.model_dim, m.mlp_dim)
  block = linear.block_size(N, m.vocab_size)
  z, target = array(block, m.vocab_size), array(block, dtype="int32")
  caps = {"cap_pos": m.logit_softcap, "cap_neg": m.logit_softcap}
  bank = array(2 * m.num_layers, m.model_dim, m.model_dim, dtype=settings.optimizer.muon_dtype)
  choices = {
    "segment attention": attention.OPERATION.choose(q, k, k, start, max_segment=t.seq_len),
    "LeakyReLU² MLP": mlp.OPERATION.choose(x, up, down, slope=m.leaky_relu_sq_slope),
    "softcapped cross-entropy": xent.OPERATION.choose(z, target, None, **caps),
    "polar express": polar.OPERATION.choose(bank, steps=settings.optimizer.muon_steps),
  }
  return {operation: f"{choice.name} ({choice.reason})" for operation, choice in choices.items()}
