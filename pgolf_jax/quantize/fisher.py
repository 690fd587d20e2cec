"""Fisher statistics: how much the loss grows with an error in each matrix, for the `rate` quantiser.

An error E of a matrix raises the loss by about ½ Σ_i d_i (E H Eᵀ)_ii nats a token. Both factors come from the gradients
G of single rows of training text: H is Σ GᵀG over its trace, d_i the sum of the squares of row i of G, a token. The
labels are drawn from the model's own distribution. Outer products of gradients are then, in the mean, the second
derivatives of the expected loss, and those of labels at different positions cancel. A row's gradient adds up all uses
of a matrix, so that what one error does at several positions counts together. See docs/quantizer.md. Letters: B rows
and T positions, M outputs and N inputs of a matrix, L matrices of a bank.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pgolf_jax.model import packed
from pgolf_jax.model.gpt import bind
from pgolf_jax.model.params import Params
from pgolf_jax.quantize.artifact.tensors import BANKS, names_in
from pgolf_jax.quantize.calibrate import NO_ROW, sum_over_rows
from pgolf_jax.settings import Settings

_STEP_ROWS = 16  # that a device takes between two signs of progress
_SMOOTHING = 0.02  # share of the mean that is added to every row's weight
_TINY = 1e-300  # in the place of a trace of 0
_EMBEDDING = "tok_emb.weight"


class Curvature(NamedTuple):
  """Of one matrix: ½ Σ_i row_i (E · hessian · Eᵀ)_ii nats a token are what an error E costs. Its trace is 1."""

  hessian_NxN: Float[np.ndarray, "N N"]
  row_M: Float[np.ndarray, " M"]


class Statistics(NamedTuple):
  """What `measure` returns.

  Attributes:
    matrices: by matrix name.
    small: of every other parameter, by name: mean over its elements of the second derivative, nats a token.
    loss: of the calibration text, nats a token.
    tokens: that were read.
  """

  matrices: dict[str, Curvature]
  small: dict[str, float]
  loss: float
  tokens: int


class _Sums(NamedTuple):
  """Over rows, of one bank of matrices (axis L) or of the embedding alone."""

  gram_LxNxN: Float[Array, "L N N"]  # Σ GᵀG
  square_LxM: Float[Array, "L M"]  # Σ over a row of G²


def measure(settings: Settings, params: Mapping[str, np.ndarray], rows_BxT1: Int[np.ndarray, "B T1"]) -> Statistics:
  """Returns the statistics over rows of training text, with looping and attention within documents.

  Sums are in fp32, over all devices. The labels of a row depend on the seed and the row's number alone, so that the
  sums do not depend on how rows are spread.

  Args:
    params: fp32 parameters under their bank names.
    rows_BxT1: T inputs and the label after the last of them.
  """
  count, length = rows_BxT1.shape[0], rows_BxT1.shape[1] - 1

  def device_sums(params: Params, tokens_BxT1: jax.Array, number_B: jax.Array):
    def add(total, row):
      tokens_T1, number = row
      return jax.tree.map(jnp.add, total, _of_row(settings, params, tokens_T1, number)), None

    shapes = jax.eval_shape(functools.partial(_of_row, settings), params, tokens_BxT1[0], number_B[0])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, (tokens_BxT1, number_B))[0]

  total = sum_over_rows(device_sums, params, rows_BxT1, device_rows=_STEP_ROWS, doing="measuring the curvature")
  banks, small, loss = jax.tree.map(lambda x: np.asarray(x, np.float64) / (count * length), total)
  matrices = {}
  for bank, (gram_LxNxN, square_LxM) in banks.items():
    for name, gram_NxN, square_M in zip(_names(bank, len(gram_LxNxN)), gram_LxNxN, square_LxM, strict=True):
      matrices[name] = Curvature(gram_NxN / max(np.trace(gram_NxN), _TINY), square_M + _SMOOTHING * square_M.mean())
  of_element = {name: float(value) / max(1, params[name].size) for name, value in small.items()}
  return Statistics(matrices, of_element, float(loss), count * length)


def _of_row(settings: Settings, params: Params, tokens_T1: jax.Array, number: jax.Array):
  """(sums by bank, Σ of squared gradients by other parameter, loss of the text) of one row; 0 of `NO_ROW`."""
  m = settings.model
  input_1xT, label_T = tokens_T1[None, :-1], tokens_T1[1:]
  is_row = (number != NO_ROW).astype(jnp.float32)

  def loss(params):
    context = packed(
      input_1xT, bos_id=m.bos_id, seq_len=len(label_T), looping=True, dtype=jnp.dtype(settings.train.compute_dtype)
    )
    model = bind(m, params)
    log_p_TxV = jax.nn.log_softmax(model.evaluation_logits(model(input_1xT, context).hidden)[0])
    key = jax.random.fold_in(jax.random.key(settings.seed), number)
    drawn_T = jax.random.categorical(key, jax.lax.stop_gradient(log_p_TxV))
    nll = lambda y_T: -is_row * jnp.sum(jnp.take_along_axis(log_p_TxV, y_T[:, None], -1))  # noqa: E731
    return nll(drawn_T), nll(label_T)

  gradient, text_loss = jax.grad(loss, has_aux=True)(params)
  matrices = {name: gradient[name] for name in (*BANKS, _EMBEDDING)}
  matrices[_EMBEDDING] = matrices[_EMBEDDING][None]
  banks = {name: _Sums(_gram(g), jnp.sum(g * g, axis=2)) for name, g in matrices.items()}
  return banks, {name: jnp.sum(g * g) for name, g in gradient.items() if name not in matrices}, text_loss


def _gram(g_LxMxN: Float[Array, "L M N"]) -> Float[Array, "L N N"]:
  return jnp.einsum("lmn,lmk->lnk", g_LxMxN, g_LxMxN, precision=jax.lax.Precision.HIGHEST)


def _names(bank: str, size: int) -> list[str]:
  """The matrices of a bank in its order."""
  return [bank] if bank == _EMBEDDING else names_in(bank, size // len(BANKS[bank]))
