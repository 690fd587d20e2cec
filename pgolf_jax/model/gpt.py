"""The GPT of the recipe: one forward pass for training, plain scoring, calibration and test-time training.

Letters: see block.py.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pgolf_jax.kernels.segment_attention.api import segment_attention, segment_starts
from pgolf_jax.kernels.softcapped_xent import api as xent
from pgolf_jax.model import rotary
from pgolf_jax.model.adapters import Adapter, Adapters, delta
from pgolf_jax.model.block import Block, Collect, Context, Weights, linear, rms_norm
from pgolf_jax.model.params import Params, layer_order
from pgolf_jax.settings.config import ModelConfig


class _Matrix(nnx.Module):
  def __init__(self, weight: jax.Array):
    self.weight = nnx.Param(weight)


class GPT(nnx.Module):
  """Module tree whose paths are the recipe's parameter names.

  Args:
    config: the model's sizes and switches.
    params: flat parameters, see params.py; kept as they are, cast where they are used.
  """

  def __init__(self, config: ModelConfig, params: Params):
    self.config = config
    self.tok_emb = _Matrix(params["tok_emb.weight"])
    if config.smear_gate:
      self.smear_gate = _Matrix(params["smear_gate.weight"])
    for name, value in params.items():
      if "." not in name:
        setattr(self, name, nnx.Param(value))
    self.blocks = nnx.List(
      [
        Block(config, i, {name.removeprefix(f"blocks.{i}."): v for name, v in params.items() if f"blocks.{i}." in name})
        for i in range(config.num_layers)
      ]
    )

  def params(self) -> Params:
    """The flat parameters, under the recipe's names."""
    flat = nnx.to_flat_state(nnx.state(self, nnx.Param))
    return {".".join(map(str, path)): leaf[...] for path, leaf in flat}

  def __call__(
    self,
    tokens_BxT: Int[Array, "B T"],
    start_BxT: Int[Array, "B T"],
    *,
    looping: bool,
    max_segment: int,
    adapters: Adapters | None = None,
    adapter_scale: float = 1.0,
    collect: Collect | None = None,
    attend: Callable[..., jax.Array] | None = None,
    offset: Int[Array, ""] | int = 0,
    before_B: Int[Array, "B"] | None = None,
    dtype=jnp.bfloat16,
  ) -> Float[Array, "B T D"]:
    """Hidden state after the final norm.

    Args:
      start_BxT: first position that each token may attend to; see `kernels.segment_attention`.
      looping: whether the looped layers run `num_loops` more times.
      max_segment: static bound on a segment's length, in tokens.
      adapters: low-rank additions, one set per row; see adapters.py.
      collect: receives the input of every matrix while tracing, under the names of the single matrices
        (`blocks.3.attn.c_q.weight` stands for query, key and value).
      attend: `(position in the layer list, q, k, v) → y` in place of attention within the row, for rows that go on
        from keys and values kept elsewhere; `start_BxT` is then its affair.
      offset: rotary position of each row's first token.
      before_B: the token before each row, which the smear gate reads; None where rows begin a text.
      dtype: of the computation; parameters are cast where they are used.
    """
    m = self.config
    x = self._embed(tokens_BxT, before_B, dtype)
    angles = rotary.angles(offset + jnp.arange(tokens_BxT.shape[1]), m.rope_dims or m.head_dim, m.rope_base)
    within_row = partial(segment_attention, start_BxT=start_BxT, max_segment=max_segment)
    context = Context(within_row, angles, x, collect, adapter_scale)

    def at(position: int) -> Context:
      return context._replace(attend=partial(attend, position)) if attend else context

    encoder, decoder = layer_order(m, looping)
    adapters = adapters or {}
    skips: list[jax.Array] = []
    position = 0
    for layer in encoder:
      x = self.blocks[layer](x, self._weights(layer), at(position), _at(adapters, position))
      skips.append(x)
      position += 1
    lanes = None
    for j, layer in enumerate(decoder):
      w, own, here = self._weights(layer), _at(adapters, position), at(position)
      position += 1
      if lanes is None and layer >= m.parallel_start_layer > 0:
        lanes = (x, x)
      if skips:
        skip = skips.pop()
        if lanes is None:
          x = self._join_skip(x, skip, j)
        else:
          lanes = (self._join_skip(lanes[0], skip, j), lanes[1])
      if lanes is None:
        x = self.blocks[layer](x, w, here, own)
      else:
        resid, post = self.parallel_resid_lambdas[layer], self.parallel_post_lambdas[layer]
        lanes = self.blocks[layer].parallel(lanes, w, here, own, resid, post)
    if lanes is not None:
      x = {"attn": lanes[0], "mlp": lanes[1], "mean": 0.5 * (lanes[0] + lanes[1])}[m.parallel_final_lane]
    hidden = rms_norm(x)
    if collect:
      collect("tok_emb.weight", hidden)
    return hidden

  def logits(self, hidden_BxTxD: Float[Array, "B T D"], adapters: Adapters | None = None, adapter_scale: float = 1.0):
    """Head before the softcap, [B, T, V], in the type of the hidden state."""
    z = linear(hidden_BxTxD, self.tok_emb.weight[...])
    if adapters:
      z = z + delta(adapters["head"], hidden_BxTxD, adapter_scale)
    return z

  def _embed(self, tokens_BxT, before_B, dtype) -> jax.Array:
    m = self.config
    if before_B is not None:
      tokens_BxT = jnp.concatenate([before_B[:, None], tokens_BxT], axis=1)
    x = self.tok_emb.weight[...].astype(dtype)[tokens_BxT]
    if m.smear_gate:
      gate = jax.nn.sigmoid(linear(x[:, 1:, : m.gate_window], self.smear_gate.weight[...]))
      # A document's first token takes nothing from the document before it.
      inside = (tokens_BxT[:, 1:, None] != m.bos_id).astype(dtype)
      smear = self.smear_lambda[...].astype(dtype) * gate * x[:, :-1] * inside
      x = jnp.concatenate([x[:, :1], x[:, 1:] + smear], axis=1)
    return rms_norm(x if before_B is None else x[:, 1:])

  def _weights(self, layer: int) -> Weights:
    L = self.config.num_layers
    return Weights(
      q=self.qo_bank[layer],
      k=self.kv_bank[layer],
      v=self.kv_bank[L + layer],
      o=self.qo_bank[L + layer],
      up=self.mlp_up_bank[layer],
      down=self.mlp_down_bank[layer],
    )

  def _join_skip(self, x, skip, j: int) -> jax.Array:
    skip = self.skip_weights[j].astype(x.dtype) * skip
    if not self.config.skip_gates:
      return x + skip
    return skip + jax.nn.sigmoid(self.skip_gates[j].astype(x.dtype)) * (x - skip)


def _at(adapters: Adapters, position: int) -> dict[str, Adapter]:
  return {k: Adapter(a.A[position], a.B[position]) for k, a in adapters.items() if k != "head"}


def eval_caps(config: ModelConfig, params: Params) -> tuple[jax.Array | float, jax.Array | float]:
  """(cap for z > 0, cap for z ≤ 0) of evaluation logits."""
  if config.asym_logit_rescale:
    return params["softcap_pos"], params["softcap_neg"]
  return config.logit_softcap, config.logit_softcap


def packed_nll(
  config: ModelConfig,
  params: Params,
  tokens_BxT1: Int[Array, "B T1"],
  *,
  looping: bool,
  seq_len: int,
  evaluation: bool = False,
  dtype=jnp.bfloat16,
) -> Float[Array, "B T"]:
  """Negative log-likelihood, in nats, of every target of packed rows.

  Args:
    tokens_BxT1: rows of n + 1 tokens: inputs are the first n, targets the last n.
    seq_len: segments begin at 0, at every bos, and each `seq_len` tokens after a document's start.
    evaluation: use the evaluation softcaps rather than the symmetric one of training.
  """
  inputs, targets = tokens_BxT1[:, :-1], tokens_BxT1[:, 1:]
  model = GPT(config, params)
  start = segment_starts(inputs, bos_id=config.bos_id, seq_len=seq_len)
  hidden = model(inputs, start, looping=looping, max_segment=seq_len, dtype=dtype)
  cap_pos, cap_neg = eval_caps(config, params) if evaluation else (config.logit_softcap, config.logit_softcap)
  B, T, D = hidden.shape
  nll = xent.linear_softcapped_xent(
    hidden.reshape(B * T, D),
    params["tok_emb.weight"].astype(dtype),
    targets.reshape(-1),
    cap_pos=cap_pos,
    cap_neg=cap_neg,
  )
  return nll.reshape(B, T)
