"""The curvature of the loss: against gradients at every matrix's output, against the KL divergence, on any devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import MODEL, SETTINGS, random_params

from pgolf_jax.model import packed
from pgolf_jax.model.gpt import bind
from pgolf_jax.quantize import calibrate, fisher
from pgolf_jax.quantize.artifact.tensors import multiplies, rebank, unbank
from pgolf_jax.runtime.distributed import AXIS

ROWS, LENGTH = 11, 24  # no multiple of the 8 devices


@pytest.fixture(scope="module")
def rows():
  rng = np.random.default_rng(0)
  rows_BxT1 = rng.integers(8, MODEL.vocab_size, (ROWS, LENGTH + 1))
  rows_BxT1[:, 0] = rows_BxT1[::2, 9] = MODEL.bos_id
  return rows_BxT1.astype(np.int32)


@pytest.fixture(scope="module")
def statistics(rows):
  return fisher.measure(SETTINGS, random_params(), rows)


def log_probabilities(params, tokens_BxT):
  params, tokens_BxT = jax.tree.map(jnp.asarray, (params, tokens_BxT))
  context = packed(tokens_BxT, bos_id=MODEL.bos_id, seq_len=LENGTH, looping=True, dtype=jnp.float32)
  model = bind(MODEL, params)
  hidden = model(tokens_BxT, context).hidden
  return jax.nn.log_softmax(model.evaluation_logits(hidden))


def drawn(params, rows):
  keys = [jax.random.fold_in(jax.random.key(SETTINGS.seed), n) for n in range(ROWS)]
  log_p = log_probabilities(params, rows[:, :-1])
  return np.stack([jax.random.categorical(key, row) for key, row in zip(keys, log_p, strict=True)])


def test_sums_are_those_of_the_gradients_of_single_rows(rows, statistics):
  params, labels = random_params(), drawn(random_params(), rows)

  @jax.jit
  def gradients(params, row, labels):
    loss = lambda params: -jnp.take_along_axis(log_probabilities(params, row), labels[..., None], -1).sum()  # noqa: E731
    return jax.grad(loss)(params)

  of_rows = [gradients(params, rows[n : n + 1, :-1], labels[n : n + 1]) for n in range(ROWS)]
  tokens = ROWS * LENGTH
  for name, bank, place in (
    ("blocks.1.mlp.proj.weight", "mlp_down_bank", 1),
    ("blocks.0.attn.c_v.weight", "kv_bank", MODEL.num_layers),
    ("tok_emb.weight", "tok_emb.weight", ...),
  ):
    g = np.stack([np.asarray(row[bank][place], np.float64) for row in of_rows])
    gram_NxN, square_M = np.einsum("bmn,bmk->nk", g, g), np.square(g).sum((0, 2)) / tokens
    curvature = statistics.matrices[name]
    np.testing.assert_allclose(curvature.hessian_NxN, gram_NxN / np.trace(gram_NxN), rtol=2e-3, atol=1e-8)
    np.testing.assert_allclose(curvature.row_M, square_M + 0.02 * square_M.mean(), rtol=2e-3)
  scale = np.stack([np.asarray(row["smear_lambda"], np.float64) for row in of_rows])
  assert statistics.small["smear_lambda"] == pytest.approx(np.square(scale).sum() / tokens, rel=2e-3)
  assert statistics.tokens == tokens
  own = np.take_along_axis(np.asarray(log_probabilities(params, rows[:, :-1])), rows[:, 1:, None], -1)
  assert statistics.loss == pytest.approx(-own.mean(), rel=1e-4)


@pytest.mark.parametrize("kind", ["tok_emb", "attn.c_q", "attn.proj", "mlp.fc", "mlp.proj", "resid_mix"])
def test_an_error_costs_what_the_curvature_says(rows, statistics, kind):
  # The KL divergence from the model to one with errors, over several draws.
  params = random_params()
  names = [name for name in unbank(params) if kind in name]
  divergence = jax.jit(
    lambda exact, other: jnp.mean(jnp.sum(jnp.exp(exact) * (exact - log_probabilities(other, rows[:, :-1])), -1))
  )
  exact = log_probabilities(params, rows[:, :-1])
  rng = np.random.default_rng(1)
  measured = predicted = 0.0
  for _ in range(6):
    matrices = {name: np.array(value, np.float32) for name, value in unbank(params).items()}
    for name in names:
      error = 3e-3 * rng.standard_normal(matrices[name].shape)
      matrices[name] = (matrices[name] + error).astype(np.float32)
      if multiplies(name):
        curvature = statistics.matrices[name]
        predicted += 0.5 * float(np.sum(curvature.row_M[:, None] * error * (error @ curvature.hessian_NxN)))
      else:
        predicted += 0.5 * statistics.small[name] * float(np.square(error).sum())
    measured += float(divergence(exact, rebank({n: Held(value) for n, value in matrices.items()})))
  assert measured == pytest.approx(predicted, rel=0.2)


@dataclasses.dataclass(frozen=True)
class Held:
  """A parameter as `rebank` takes it."""

  values: np.ndarray

  @property
  def shape(self):
    return self.values.shape

  def write_to(self, out):
    out[...] = self.values

  def dequantize(self):
    return self.values


def test_sums_do_not_depend_on_the_devices(rows, statistics, monkeypatch):
  one = jax.sharding.Mesh(np.array(jax.devices()[:1]), (AXIS,))
  monkeypatch.setattr(calibrate, "data_mesh", lambda: one)
  alone = fisher.measure(SETTINGS, random_params(), rows)
  for name, curvature in statistics.matrices.items():
    np.testing.assert_allclose(alone.matrices[name].hessian_NxN, curvature.hessian_NxN, rtol=2e-3, atol=1e-8)
    np.testing.assert_allclose(alone.matrices[name].row_M, curvature.row_M, rtol=2e-3)
  assert alone.loss == pytest.approx(statistics.loss, rel=1e-6)
