"""Fisher statistics: how much the loss grows with an error in each matrix, for the `rate` quantiser.

For a matrix with input x and gradient g at its output, an error E of its weights raises the loss by about
½ Σ_i d_i (E H Eᵀ)_ii nats, with H = Σ |g|² xxᵀ / Σ |g|² over all positions and uses, and d_i the mean of g_i².
Gradients are those of labels that are drawn from the model's own distribution: their outer products are then the Fisher
information, which is the Hessian of the expected loss. See docs/quantizer.md. Letters: B rows and T positions, V
vocabulary, D width, M outputs and N inputs of a matrix.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from pgolf_jax.kernels.numerics import BySign, softcap_and_tanh
from pgolf_jax.model import packed
from pgolf_jax.model.gpt import bind
from pgolf_jax.model.params import Params
from pgolf_jax.quantize.artifact.tensors import multiplies, unbank
from pgolf_jax.runtime.distributed import AXIS, data_mesh, place, replicated
from pgolf_jax.runtime.log import progress
from pgolf_jax.settings import Settings

_STEP_TOKENS = 8192  # that a device takes at a time
_SMOOTHING = 0.02  # share of the mean that every vocabulary entry's weight has at least
_LEAST_ROW = 1e-4  # share of the mean that every row's weight has at least
_EMBEDDING = "tok_emb.weight"


class Curvature(NamedTuple):
  """Of one matrix: ½ Σ_i row_i (E · hessian · Eᵀ)_ii nats a token are what an error E costs."""

  hessian_NxN: Float[np.ndarray, "N N"]
  row_M: Float[np.ndarray, " M"]


class Statistics(NamedTuple):
  """What `measure` returns.

  Attributes:
    matrices: by matrix name.
    small: of every other parameter, by name: mean over its elements of the second derivative, nats a token.
    loss: of the calibration text's own labels, nats a token.
    tokens: that were read.
  """

  matrices: dict[str, Curvature]
  small: dict[str, float]
  loss: float
  tokens: int


class _Sums(NamedTuple):
  """Over the uses of a matrix."""

  weighted_NxN: Float[Array, "N N"]  # Σ |g|² xxᵀ; of the embedding Σ ggᵀ
  square_M: Float[Array, " M"]  # Σ g²; of the embedding Σ |g|² by token


@jax.custom_vjp
def _recorded(y_BxTxM: jax.Array, x_BxTxN: jax.Array, sums: _Sums) -> jax.Array:
  """Returns y; its "gradient" with respect to `sums` are the sums of this use."""
  del x_BxTxN, sums
  return y_BxTxM


def _record_forward(y_BxTxM, x_BxTxN, sums):
  del sums
  return y_BxTxM, x_BxTxN


def _gram(x: jax.Array) -> jax.Array:
  return jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _record_backward(x_BxTxN, g_BxTxM):
  g = g_BxTxM.astype(jnp.float32).reshape(-1, g_BxTxM.shape[-1])
  x = x_BxTxN.astype(jnp.float32).reshape(-1, x_BxTxN.shape[-1])
  size = jnp.sqrt(jnp.sum(g * g, axis=1, keepdims=True))
  return g_BxTxM, jnp.zeros_like(x_BxTxN), _Sums(_gram(size * x), jnp.sum(g * g, axis=0))


_recorded.defvjp(_record_forward, _record_backward)


@jax.custom_vjp
def _embedded(x_BxTxD: jax.Array, sums: _Sums, tokens_BxT: jax.Array) -> jax.Array:
  """`_recorded` of the embedding's use as input, whose own input is tokens."""
  del sums, tokens_BxT
  return x_BxTxD


def _embed_forward(x_BxTxD, sums, tokens_BxT):
  return x_BxTxD, (tokens_BxT, jnp.zeros_like(sums.square_M))


def _embed_backward(residuals, g_BxTxD):
  tokens_BxT, zero_V = residuals
  g = g_BxTxD.astype(jnp.float32).reshape(-1, g_BxTxD.shape[-1])
  square_V = zero_V.at[tokens_BxT.reshape(-1)].add(jnp.sum(g * g, axis=1))
  return g_BxTxD, _Sums(_gram(g), square_V), None


_embedded.defvjp(_embed_forward, _embed_backward)


def measure(
  settings: Settings, params: Params, rows_BxT1: Int[np.ndarray, "B T1"], *, step_tokens: int = _STEP_TOKENS
) -> Statistics:
  """Returns the statistics over rows of training text, with looping and attention within documents.

  The labels of a row depend on the seed and the row's number alone, not on how rows are spread over devices.

  Args:
    params: fp32 parameters under their bank names.
    rows_BxT1: T inputs and the label after the last of them.
    step_tokens: tokens that a device takes at a time.
  """
  model_config = settings.model
  count, length = rows_BxT1.shape[0], rows_BxT1.shape[1] - 1
  mesh = data_mesh()
  step_rows = mesh.size * max(1, min(step_tokens // length, math.ceil(count / mesh.size)))
  shapes = {name: value.shape for name, value in unbank(params).items() if multiplies(name)}
  dtype = jnp.dtype(settings.train.compute_dtype)

  def device_sums(params, tokens_BxT1, number_B):
    tokens_BxT, label_BxT = tokens_BxT1[:, :-1], tokens_BxT1[:, 1:]
    is_row_Bx1 = (number_B >= 0)[:, None]
    context = packed(tokens_BxT, bos_id=model_config.bos_id, seq_len=length, looping=True, dtype=dtype)
    keys_B = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(settings.seed), n))(number_B)

    def loss(params, sums: dict[str, _Sums]):
      def watch(name: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return _embedded(y, sums[name], x) if name == _EMBEDDING else _recorded(y, x, sums[name])

      model = bind(model_config, params)
      hidden_BxTxD = model(tokens_BxT, context, watch=watch).hidden
      caps = BySign(*model.caps(evaluation=True))
      logits_BxTxV, tanh_BxTxV = softcap_and_tanh(model.logits(hidden_BxTxD).astype(jnp.float32), caps)
      log_p_BxTxV = jax.nn.log_softmax(logits_BxTxV)
      drawn_BxT = jax.vmap(jax.random.categorical)(keys_B, jax.lax.stop_gradient(log_p_BxTxV))
      nll = lambda y_BxT: -jnp.take_along_axis(log_p_BxTxV, y_BxT[..., None], -1)[..., 0]  # noqa: E731
      p_BxTxV = jnp.exp(log_p_BxTxV)
      # Of the softmax, times the square of the softcap's slope: the second derivative by each logit.
      bend_BxTxV = p_BxTxV * (1 - p_BxTxV) * jnp.square(1 - jnp.square(tanh_BxTxV)) * is_row_Bx1[..., None]
      weight_BxT = jnp.sqrt(bend_BxTxV.sum(-1))
      head = (weight_BxT[..., None] * hidden_BxTxD.astype(jnp.float32)).reshape(-1, model_config.model_dim)
      kept = jax.lax.stop_gradient((_Sums(_gram(head), bend_BxTxV.sum((0, 1))), jnp.sum(nll(label_BxT) * is_row_Bx1)))
      return jnp.sum(nll(drawn_BxT) * is_row_Bx1), kept

    nothing = {n: _Sums(jnp.zeros((s[1], s[1])), jnp.zeros(s[0])) for n, s in shapes.items()}
    (slope, sums), (head, own_loss) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, nothing)
    # Scores of drawn labels are independent and have mean 0: the square of their sum is the sum of their squares.
    small = {name: jnp.sum(jnp.square(slope[name].astype(jnp.float32))) for name in slope if name not in _MATRICES}
    return jax.lax.psum((sums, head, small, own_loss), AXIS)

  summed = jax.shard_map(device_sums, mesh=mesh, in_specs=(P(), P(AXIS), P(AXIS)), out_specs=P(), check_vma=False)
  step = jax.jit(lambda total, *arguments: jax.tree.map(jnp.add, total, summed(*arguments)), donate_argnames=("total",))
  params = jax.device_put(dict(params), replicated(mesh))
  example = (jax.ShapeDtypeStruct((step_rows, length + 1), jnp.int32), jax.ShapeDtypeStruct((step_rows,), jnp.int32))
  total = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(summed, params, *example))
  with progress("measuring the curvature", total=count, unit="rows") as bar:
    for first in range(0, count, step_rows):
      taken = rows_BxT1[first : first + step_rows]
      tokens_BxT1 = np.zeros((step_rows, length + 1), np.int32)
      tokens_BxT1[: len(taken)] = taken
      number_B = np.where(np.arange(step_rows) < len(taken), first + np.arange(step_rows), -1).astype(np.int32)
      total = step(total, params, place(mesh, tokens_BxT1, P(AXIS)), place(mesh, number_B, P(AXIS)))
      jax.block_until_ready(total)
      bar.advance(len(taken))
  sums, head, small, loss = jax.tree.map(lambda x: np.asarray(x, np.float64) / (count * length), total)
  matrices = {n: _embedding(head, s) if n == _EMBEDDING else _curvature(s) for n, s in sums.items()}
  elements = {name: small[name] / max(1, params[name].size) for name in small}
  return Statistics(matrices, {n: float(v) for n, v in elements.items()}, float(loss), count * length)


_MATRICES = frozenset({"qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank", _EMBEDDING})


def _curvature(sums: _Sums) -> Curvature:
  square_M = sums.square_M
  hessian_NxN = sums.weighted_NxN / max(square_M.sum(), 1e-300)
  return Curvature(hessian_NxN, np.maximum(square_M, _LEAST_ROW * square_M.mean()))


def _embedding(head: _Sums, use: _Sums) -> Curvature:
  """The tied embedding's: of its use as head and of its use as input, with row weights that count both."""
  head_size, use_size = np.trace(head.weighted_NxN), np.trace(use.weighted_NxN)

  def share(square_V: np.ndarray) -> np.ndarray:
    smooth_V = square_V + _SMOOTHING * square_V.mean()
    return smooth_V / max(smooth_V.sum(), 1e-300)

  row_V = (head_size * share(head.square_M) + use_size * share(use.square_M)) / max(head_size + use_size, 1e-300)
  return Curvature(head.weighted_NxN + use.weighted_NxN, row_V)
