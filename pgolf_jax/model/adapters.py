"""Low-rank adapters: small matrices, one set for each row, that test-time training moves instead of the weights.

An adapter adds scale · B·(A·x) to what a matrix makes of x. Adapters are an argument of the one forward pass. Letters:
see model/__init__.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pgolf_jax.model.params import layer_order
from pgolf_jax.settings import ModelConfig, TTTConfig


class Adapter(NamedTuple):
  """One pair of matrices for each row, or for each position of the looped layer list and row."""

  A: jax.Array  # [(P,) B, R, in]
  B: jax.Array  # [(P,) B, R, out]


Adapters = dict[str, Adapter]
"""Kind → adapter: any of q, k, v, o, mlp (stacked over P positions), and head (without P)."""


class Adaptation(NamedTuple):
  """The adapters of a forward pass, and the factor on what they add."""

  adapters: Adapters
  scale: float


def deltas(adapters: Adapters, x_BxTxD: Float[Array, "B T D"], scale: float) -> dict[str, jax.Array]:
  """Returns scale · B·(A·x) by kind, [B, T, out], in the type of x. One product reads x for all kinds."""
  if not adapters:
    return {}
  A = jnp.concatenate([adapter.A for adapter in adapters.values()], axis=-2)
  low = jnp.split(jnp.einsum("btd,brd->btr", x_BxTxD, A.astype(x_BxTxD.dtype)), len(adapters), axis=-1)
  pairs = zip(adapters.items(), low, strict=True)
  return {kind: jnp.einsum("btr,bro->bto", y, adapter.B.astype(y.dtype)) * scale for (kind, adapter), y in pairs}


def delta(adapter: Adapter, x_BxTxD: Float[Array, "B T D"], scale: float) -> Float[Array, "B T out"]:
  """Returns what one adapter adds."""
  return deltas({"": adapter}, x_BxTxD, scale)[""]


def widths(model: ModelConfig, ttt: TTTConfig) -> dict[str, int]:
  """Returns kind → output width, for each kind of adapter that the settings turn on."""
  D = model.model_dim
  kinds = {
    "q": (ttt.lora.adapts_q, D),
    "k": (ttt.lora.k, model.kv_dim),
    "v": (ttt.lora.adapts_v, model.kv_dim),
    "o": (ttt.lora.o, D),
    "mlp": (ttt.lora.mlp, D),
    "head": (True, model.vocab_size),
  }
  return {kind: width for kind, (on, width) in kinds.items() if on}


def init(model: ModelConfig, ttt: TTTConfig, *, batch: int, rank: int, key: jax.Array) -> Adapters:
  """Returns new adapters in float32: A uniform in ±1/√D, B zero."""
  D = model.model_dim
  positions = sum(map(len, layer_order(model, True)))
  adapters = {}
  for index, (kind, width) in enumerate(widths(model, ttt).items()):
    lead = (batch,) if kind == "head" else (positions, batch)
    A = jax.random.uniform(jax.random.fold_in(key, index), (*lead, rank, D), minval=-1.0, maxval=1.0) * D**-0.5
    adapters[kind] = Adapter(A, jnp.zeros((*lead, rank, width)))
  return adapters
