"""Parameters: one flat dictionary under the recipe's names; their shapes and initial values, and the layer order.

Everything outside the model (optimizer, checkpoint, quantiser, artifact, golden cases) sees parameters in this form.
Letters: see model/__init__.py.
"""

import functools
import hashlib
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from pgolf_jax.errors import UserError
from pgolf_jax.settings import ModelConfig

Params = dict[str, jax.Array]

BANKS = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")
"""The stacked matrices, each [stack, m, n], that Muon updates."""

SOFTCAPS = ("softcap_pos", "softcap_neg")
"""The caps of evaluation, which no optimizer changes."""


@functools.cache
def layer_order(config: ModelConfig, looping: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns (encoder, decoder): physical layers in the order in which they run. Recipe section 2."""
  return config.layer_order(looping)


@functools.cache
def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Returns name → shape, in the order of the recipe."""
  m = config
  L, D, H = m.num_layers, m.model_dim, m.num_heads
  skips = min(map(len, layer_order(m, True)))
  by_name: dict[str, tuple[int, ...]] = {
    "tok_emb.weight": (m.vocab_size, D),
    "qo_bank": (2 * L, D, D),
    "kv_bank": (2 * L, m.kv_dim, D),
    "mlp_up_bank": (L, m.mlp_dim, D),
    "mlp_down_bank": (L, D, m.mlp_dim),
    "skip_weights": (skips, D),
    "parallel_post_lambdas": (L, 2, 2),
    "parallel_resid_lambdas": (L, 2),
  }
  if m.skip_gates:
    by_name["skip_gates"] = (skips, D)
  if m.smear_gate:
    by_name["smear_gate.weight"] = (1, m.gate_window)
    by_name["smear_lambda"] = (1,)
  if m.asym_logit_rescale:
    by_name["softcap_pos"] = by_name["softcap_neg"] = ()
  for i in range(L):
    by_name[f"blocks.{i}.attn_scale"] = by_name[f"blocks.{i}.mlp_scale"] = (D,)
    by_name[f"blocks.{i}.resid_mix"] = (2, D)
    by_name[f"blocks.{i}.attn.q_gain"] = (H,)
    if m.sparse_attn_gate:
      by_name[f"blocks.{i}.attn.attn_gate_w"] = (H, m.gate_window)
  # At the end, so that the others' first values stay as they are.
  if m.value_residual:
    by_name["value_shares"] = (L,)
  if m.dense_skips:
    by_name["dense_skip_weights"], by_name["dense_skip_biases"] = (m.dense_skips + 1, D), (m.dense_skips + 1,)
  return by_name


def count(config: ModelConfig) -> int:
  """Returns the number of parameters."""
  return sum(math.prod(shape) for shape in shapes(config).values())


def without_path(config: ModelConfig) -> frozenset[str]:
  """Returns the parameters that nothing reads, the lanes' where there is one lane: they get no gradient."""
  has_lanes = any(layer >= config.parallel_start_layer > 0 for layer in layer_order(config, True)[1])
  return frozenset() if has_lanes else frozenset(name for name in shapes(config) if name.startswith("parallel_"))


def init(config: ModelConfig, key: jax.Array) -> Params:
  """Returns initial parameters in float32, the same for the same key.

  Query, key, value and MLP-up matrices are orthogonal, output matrices zero. Recipe section 2.
  """
  return {
    name: _initial(name, shape, config, jax.random.fold_in(key, index))
    for index, (name, shape) in enumerate(shapes(config).items())
  }


def _initial(name: str, shape: tuple[int, ...], config: ModelConfig, key: jax.Array) -> jax.Array:
  orthogonal = jax.nn.initializers.orthogonal()
  L = config.num_layers
  match name.split(".")[-1]:
    case "weight" if name == "tok_emb.weight":
      return config.tied_embed_init_std * jax.random.normal(key, shape)
    case "qo_bank":
      queries = [orthogonal(k, shape[1:]) for k in jax.random.split(key, L)]
      return jnp.concatenate([jnp.stack(queries), jnp.zeros((L, *shape[1:]))])
    case "kv_bank" | "mlp_up_bank":
      return jnp.stack([orthogonal(k, shape[1:]) for k in jax.random.split(key, shape[0])])
    case "attn_scale" | "mlp_scale" | "skip_weights" | "parallel_post_lambdas":
      return jnp.ones(shape)
    case "parallel_resid_lambdas":
      return jnp.full(shape, 1.1)
    case "resid_mix":
      return jnp.stack([jnp.ones(shape[1]), jnp.zeros(shape[1])])
    case "q_gain":
      return jnp.full(shape, config.qk_gain_init)
    case "value_shares":
      return jnp.full(shape, 0.5)
    case "attn_gate_w":
      return config.sparse_attn_gate_init_std * jax.random.normal(key, shape)
    case "softcap_pos" | "softcap_neg":
      return jnp.full(shape, config.logit_softcap)
    case _:  # mlp_down_bank, skip_gates, smear_gate.weight, smear_lambda, dense_skip_weights, dense_skip_biases
      return jnp.zeros(shape)


def check(config: ModelConfig, params: dict[str, jax.Array | np.ndarray], where: str = "parameters") -> None:
  """Raises UserError if a name is missing or unknown, or a shape is not the config's."""
  wanted = shapes(config)
  if missing := sorted(wanted.keys() - params.keys()):
    raise UserError(f"{where}: {missing[0]} is missing ({len(missing)} in all); does the config belong to them?")
  if unknown := sorted(params.keys() - wanted.keys()):
    raise UserError(f"{where}: {unknown[0]} is not a parameter of this config ({len(unknown)} such in all).")
  for name, shape in wanted.items():
    if tuple(params[name].shape) != shape:
      raise UserError(f"{where}: {name} has the shape {tuple(params[name].shape)}, but the config gives {shape}.")


def content_hash(params: Mapping[str, np.ndarray]) -> str:
  """Returns the SHA-256 of names and float32 values."""
  sha256 = hashlib.sha256()
  for name in sorted(params):
    sha256.update(name.encode() + np.asarray(params[name], np.float32).tobytes())
  return sha256.hexdigest()
