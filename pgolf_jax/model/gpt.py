"""The GPT of the recipe: one forward pass for training, plain scoring, calibration and test-time training.

Flax NNX holds the structure: a tree of modules whose paths are the recipe's parameter names. The tree is built once
for each config, without values; `bind` merges a run's parameters into it wherever a program is traced, and everything
outside the model sees parameters as one flat dictionary. Letters: see model/__init__.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pgolf_jax.kernels import softcapped_xent as xent
from pgolf_jax.kernels.numerics import rms_norm, scaled, softcap
from pgolf_jax.model import Context, block, packed
from pgolf_jax.model.adapters import Adaptation, Adapter, delta
from pgolf_jax.model.block import Block, LayerUse, Weights, linear
from pgolf_jax.model.params import Params, layer_order
from pgolf_jax.settings import ModelConfig

Collect = Callable[[str, jax.Array], Any]
"""(name of a matrix, its input [B, T, N]) → a statistic: an array or a tree of arrays."""

Lanes = tuple[jax.Array, jax.Array]


class Output(NamedTuple):
  """What a forward pass gives.

  Attributes:
    hidden: [B, T, D], after the final norm.
    collected: matrix name → the statistics of `collect`, added up over the uses of the matrix.
    cache: for each position of the layer list, what `Context.attend` returned beside y.
  """

  hidden: jax.Array
  collected: dict[str, Any]
  cache: tuple[Any, ...]


class _Matrix(nnx.Module):
  def __init__(self):
    self.weight = nnx.Param(None)


class GPT(nnx.Module):
  """The model's structure; `bind` gives one with values."""

  def __init__(self, config: ModelConfig):
    self.config = config
    self.tok_emb = _Matrix()
    for name in ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank", "skip_weights"):
      setattr(self, name, nnx.Param(None))
    self.parallel_post_lambdas = nnx.Param(None)
    self.parallel_resid_lambdas = nnx.Param(None)
    if config.skip_gates:
      self.skip_gates = nnx.Param(None)
    if config.smear_gate:
      self.smear_gate = _Matrix()
      self.smear_lambda = nnx.Param(None)
    if config.asym_logit_rescale:
      self.softcap_pos = nnx.Param(None)
      self.softcap_neg = nnx.Param(None)
    if config.value_residual:
      self.value_shares = nnx.Param(None)
    if config.dense_skips:
      self.dense_skip_weights = nnx.Param(None)
      self.dense_skip_biases = nnx.Param(None)
    self.blocks = nnx.List([Block(config, layer) for layer in range(config.num_layers)])

  def __call__(
    self,
    tokens_BxT: Int[Array, "B T"],
    context: Context,
    adaptation: Adaptation | None = None,
    collect: Collect | None = None,
  ) -> Output:
    """Runs the layers.

    Args:
      context: what the tokens see of those before them, the form of the model and the type of the computation.
      adaptation: low-rank additions, one set for each row.
      collect: makes a statistic of the input of every matrix, under the names of the single matrices
        (`blocks.3.attn.c_q.weight` stands for query, key and value).
    """
    m = self.config
    adapters, scale = adaptation or Adaptation({}, 1.0)
    x = self._embed(tokens_BxT, context)
    angles = block.angles(
      context.first_position + jnp.arange(tokens_BxT.shape[1]), m.rope_dims or m.head_dim, m.rope_base
    )
    x0 = x
    tap = context.tap or (lambda name, value: None)
    tap("embedding", x)
    weights = functools.cache(self._weights)
    collected: dict[str, Any] = {}
    cache: list[Any] = []
    first_value: list[jax.Array] = []

    def observe(name: str, x_BxTxN: jax.Array) -> None:
      statistic = collect(name, x_BxTxN)
      if name in collected:
        statistic = jax.tree.map(jnp.add, collected[name], statistic)
      collected[name] = statistic

    def use(position: int, layer: int) -> LayerUse:
      def attend(q, k, v):
        y, seen = context.attend(position, q, k, v)
        cache.append(seen)
        return y

      def mixed_value(v):
        """Returns (1 − λ)·v + λ·(the values of the first use of a layer); value residuals, arXiv 2410.17897."""
        first_value.append(v)
        return v + scaled(first_value[0] - v, self.value_shares[layer])

      def tap_here(name: str, value: jax.Array) -> None:
        tap(f"{position:02d}.blocks.{layer}.{name}", value)

      asked = observe if collect else None
      return LayerUse(weights(layer), _at(adapters, position), scale, attend, mixed_value, angles, x0, asked, tap_here)

    encoder, decoder = layer_order(m, context.looping)
    skips: list[jax.Array] = []
    outputs: dict[int, jax.Array | Lanes] = {}  # by layer, of its last use
    for position, layer in enumerate(encoder):
      x = self.blocks[layer](x, use(position, layer))
      skips.append(x)
      outputs[layer] = x
    lanes = None
    for j, layer in enumerate(decoder):
      if lanes is None and layer >= m.parallel_start_layer > 0:
        lanes = (x, x)
      if skips:
        skip = skips.pop()
        if lanes is None:
          x = self._join_skip(x, skip, j)
        else:
          lanes = (self._join_skip(lanes[0], skip, j), lanes[1])
      here = use(len(encoder) + j, layer)
      if lanes is None:
        x = self.blocks[layer](x, here)
      else:
        resid, post = self.parallel_resid_lambdas[layer], self.parallel_post_lambdas[layer]
        lanes = self.blocks[layer].parallel(lanes, here, resid, post)
      outputs[layer] = x if lanes is None else lanes
    x = self._one_lane(outputs[layer])
    if m.dense_skips:
      x = self._join_dense_skips(x, [x0, *(self._one_lane(outputs[layer]) for layer in m.dense_sources)])
    hidden = rms_norm(x)
    tap("hidden", hidden)
    if collect:
      observe("tok_emb.weight", hidden)
    return Output(hidden, collected, tuple(cache))

  def logits(self, hidden_BxTxD: Float[Array, "B T D"], adaptation: Adaptation | None = None) -> jax.Array:
    """Returns the head's outputs before the softcap, [B, T, V], in the type of the hidden state."""
    z = linear(hidden_BxTxD, self.tok_emb.weight[...])
    if adaptation:
      z = z + delta(adaptation.adapters["head"], hidden_BxTxD, adaptation.scale)
    return z

  def evaluation_logits(self, hidden_BxTxD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Returns the head's outputs under the evaluation softcaps, in float32."""
    return softcap(self.logits(hidden_BxTxD).astype(jnp.float32), *self.caps(evaluation=True))

  def caps(self, *, evaluation: bool) -> tuple[jax.Array | float, jax.Array | float]:
    """Returns (cap of z > 0, cap of z ≤ 0): the config's symmetric one in training, in evaluation the learnt ones."""
    if evaluation and self.config.asym_logit_rescale:
      return self.softcap_pos[...], self.softcap_neg[...]
    return self.config.logit_softcap, self.config.logit_softcap

  def _embed(self, tokens_BxT: jax.Array, context: Context) -> jax.Array:
    m, before_B, dtype = self.config, context.before_B, context.dtype
    if before_B is not None:
      tokens_BxT = jnp.concatenate([before_B[:, None], tokens_BxT], axis=1)
    x = embed(self.tok_emb.weight[...], tokens_BxT, dtype)
    if m.smear_gate:
      gate = jax.nn.sigmoid(linear(x[:, 1:, : m.gate_window], self.smear_gate.weight[...]))
      # A document's first token takes nothing from the document before it.
      inside = (tokens_BxT[:, 1:, None] != m.bos_id).astype(dtype)
      smear = scaled(gate, self.smear_lambda[...]) * x[:, :-1] * inside
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
      down=self.blocks[layer].mlp_scale[...][:, None] * self.mlp_down_bank[layer],
    )

  def _one_lane(self, lanes: jax.Array | Lanes) -> jax.Array:
    if not isinstance(lanes, tuple):
      return lanes
    return {"attn": lanes[0], "mlp": lanes[1], "mean": 0.5 * (lanes[0] + lanes[1])}[self.config.parallel_final_lane]

  def _join_dense_skips(self, x_BxTxD: jax.Array, sources: list[jax.Array]) -> jax.Array:
    """Returns x + Σₛ (wₛ·norm(x) / √D + bₛ)·hₛ, hₛ the sources: MUDD (arXiv 2502.12170) in a small form."""
    weights = self.dense_skip_weights[...] * self.config.model_dim**-0.5
    gates_BxTxS = linear(rms_norm(x_BxTxD), weights)
    # Repeated in float32, as in `scaled`, so that its gradient is added up there.
    gates_BxTxS += jnp.broadcast_to(self.dense_skip_biases[...], gates_BxTxS.shape).astype(x_BxTxD.dtype)
    return x_BxTxD + sum(gates_BxTxS[..., s, None] * source for s, source in enumerate(sources))

  def _join_skip(self, x: jax.Array, skip: jax.Array, j: int) -> jax.Array:
    skip = scaled(skip, self.skip_weights[j])
    if not self.config.skip_gates:
      return x + skip
    return skip + scaled(x - skip, jax.nn.sigmoid(self.skip_gates[j].astype(x.dtype)))


def embed(table_VxD: jax.Array, tokens_BxT: jax.Array, dtype) -> Float[Array, "B T D"]:
  """Returns each token's row of the table, in `dtype`.

  Rows are read in the table's own type, float32 in training, and cast afterwards: a frequent token's gradient is a sum
  over thousands of positions, and in bfloat16 a sum stops growing once a term is less than half of its last digit (4000
  ones add up to 256).
  """
  return table_VxD[tokens_BxT].astype(dtype)


def _at(adapters: dict[str, Adapter], position: int) -> dict[str, Adapter]:
  return {k: Adapter(a.A[position], a.B[position]) for k, a in adapters.items() if k != "head"}


@functools.cache
def _structure(config: ModelConfig) -> tuple[nnx.GraphDef[GPT], dict[str, tuple]]:
  """The module tree without values, and parameter name → path in it."""
  graph, state = nnx.split(GPT(config))
  return graph, {".".join(map(str, path)): path for path, _ in nnx.to_flat_state(state)}


def parameter_names(config: ModelConfig) -> frozenset[str]:
  """Returns the names of the parameters that the model reads."""
  return frozenset(_structure(config)[1])


def bind(config: ModelConfig, params: Params) -> GPT:
  """Returns the model with these flat parameters (params.py), which keep their types; to be called while tracing."""
  graph, paths = _structure(config)
  return nnx.merge(graph, nnx.from_flat_state({path: params[name] for name, path in paths.items()}))


def nll(
  model: GPT,
  tokens_BxT: Int[Array, "B T"],
  target_BxT: Int[Array, "B T"],
  context: Context,
  *,
  evaluation: bool = False,
) -> Float[Array, "B T"]:
  """Returns the negative log-likelihood of every target, in nats.

  Args:
    evaluation: use the evaluation softcaps rather than the symmetric one of training.
  """
  hidden_BxTxD = model(tokens_BxT, context).hidden
  cap_pos, cap_neg = model.caps(evaluation=evaluation)
  nll_N = xent.linear_softcapped_xent(
    hidden_BxTxD.reshape(-1, hidden_BxTxD.shape[-1]),
    model.tok_emb.weight[...].astype(context.dtype),
    target_BxT.reshape(-1),
    cap_pos=cap_pos,
    cap_neg=cap_neg,
  )
  return nll_N.reshape(target_BxT.shape)


def packed_nll(
  model: GPT, tokens_BxT1: Int[Array, "B T1"], *, seq_len: int, looping: bool, dtype, evaluation: bool = False
) -> Float[Array, "B T"]:
  """Returns the negative log-likelihood, in nats, of every target of rows of documents end to end.

  Args:
    tokens_BxT1: rows of T + 1 tokens: inputs are the first T, targets the last T.
    seq_len: longest segment; see `context.packed`.
    looping, dtype: see `Context`.
    evaluation: use the evaluation softcaps rather than the symmetric one of training.
  """
  inputs, targets = tokens_BxT1[:, :-1], tokens_BxT1[:, 1:]
  context = packed(inputs, bos_id=model.config.bos_id, seq_len=seq_len, looping=looping, dtype=dtype)
  return nll(model, inputs, targets, context, evaluation=evaluation)
