"""The step over several devices against the same arithmetic written out on one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pgolf_jax.model import params as parameters
from pgolf_jax.model.gpt import bind
from pgolf_jax.model.loss import packed_nll
from pgolf_jax.runtime.mesh import data_mesh
from pgolf_jax.settings.config import ModelConfig, OptimizerConfig, Settings, TrainConfig
from pgolf_jax.training import optimizer as optimizers
from pgolf_jax.training.step import init_state, make_step, place_rows

MODEL = ModelConfig(
  vocab_size=64, num_layers=3, model_dim=32, num_heads=2, num_kv_heads=1, mlp_mult=2.0, num_loops=1, loop_start=1,
  loop_end=1, parallel_start_layer=2, rope_dims=8, tied_embed_init_std=0.3,
)  # fmt: skip
ROWS, TOKENS = 8, 24


def settings(**optimizer) -> Settings:
  return Settings(
    model=MODEL,
    optimizer=OptimizerConfig(**{"muon_dtype": "float32", "grad_clip_norm": 0.05, **optimizer}),
    train=TrainConfig(batch_tokens=ROWS * TOKENS, micro_batches=ROWS, compute_dtype="float32"),
  )


@pytest.fixture(scope="module")
def params():
  params = parameters.init(MODEL, jax.random.key(3))
  noise = lambda p, k: p + 0.05 * jax.random.normal(k, p.shape)  # noqa: E731
  keys = jax.random.split(jax.random.key(4), len(params))
  return {name: noise(p, k) for (name, p), k in zip(params.items(), keys, strict=True)}


@pytest.fixture(scope="module")
def rows():
  rows = np.random.default_rng(5).integers(2, MODEL.vocab_size, (ROWS, TOKENS + 1)).astype(np.uint16)
  rows[:, ::7] = 1
  return rows


def take_step(settings, devices, params, rows, world=0):
  settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, world_size=world))
  mesh = data_mesh(jax.devices()[:devices])
  step = make_step(settings, mesh, params, seq_len=12, looping=True)
  state = init_state(settings, mesh, params)
  return step(state, place_rows(mesh, rows), np.float32(0.7), np.float32(0.9))


def by_hand(settings, params, rows, ranks):
  """One optimizer step from the mean of each rank's own clipped gradient."""
  opt = optimizers.make(settings.optimizer)

  @jax.jit
  def clipped(rank_rows):
    loss = lambda p: packed_nll(  # noqa: E731
      bind(MODEL, p), rank_rows.astype(jnp.int32), looping=True, seq_len=12, dtype=jnp.float32
    ).mean()
    grads = jax.grad(loss)(params)
    norm = optax.tree.norm(grads)
    return jax.tree.map(lambda g: g * jnp.minimum(1.0, settings.optimizer.grad_clip_norm / (norm + 1e-6)), grads), norm

  found = [clipped(rank_rows) for rank_rows in np.split(rows, ranks)]
  grads = jax.tree.map(lambda *g: sum(g) / ranks, *[g for g, _ in found])
  updates, _ = opt.update(grads, opt.init(params), params, lr_scale=0.7, momentum=0.9)
  return optax.apply_updates(params, updates), [float(n) for _, n in found]


def assert_same_step(ours, wanted, before, limit=1e-4):
  for name in wanted:
    step = np.linalg.norm(wanted[name] - before[name])
    assert np.linalg.norm(ours[name] - wanted[name]) <= limit * step, name


@pytest.mark.parametrize("devices, world", [(8, 8), (2, 8), (1, 8), (1, 1), (2, 2)])
def test_clipping_by_rank_equals_clipping_each_rank_by_hand(params, rows, devices, world):
  wanted, norms = by_hand(settings(), params, rows, world)
  assert min(norms) > 2 * settings().optimizer.grad_clip_norm, "the clip must bite for this test to tell anything"
  state, metrics = take_step(settings(), devices, params, rows, world)
  assert_same_step(state.params, wanted, params)
  np.testing.assert_allclose(np.asarray(metrics.grad_norm), norms, rtol=1e-4)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_global_clipping_is_the_same_on_any_number_of_devices(params, rows, devices):
  wanted, _ = by_hand(settings(), params, rows, 1)
  state, metrics = take_step(settings(clip_scope="global"), devices, params, rows)
  assert_same_step(state.params, wanted, params)
  assert np.asarray(metrics.loss).shape == (1,)


def test_the_average_follows_the_parameters(params, rows):
  state, _ = take_step(settings(), 1, params, rows, 1)
  decay = Settings().train.ema_decay
  for name, average in state.average.items():
    np.testing.assert_allclose(average, decay * params[name] + (1 - decay) * state.params[name], rtol=2e-6, atol=1e-7)


def test_the_softcaps_stay(params, rows):
  state, _ = take_step(settings(), 1, params, rows, 1)
  assert all(np.array_equal(state.params[name], params[name]) for name in parameters.SOFTCAPS)


def test_banks_travel_by_reduce_scatter_and_all_gather(params, rows):
  mesh = data_mesh()
  s = settings()
  step = make_step(s, mesh, params, seq_len=12, looping=True)
  text = step.lower(init_state(s, mesh, params), place_rows(mesh, rows), np.float32(1), np.float32(0.9)).as_text()
  assert text.count("stablehlo.reduce_scatter") == 4 and text.count("stablehlo.all_gather") == 4
