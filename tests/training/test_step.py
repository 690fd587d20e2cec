"""The step over several devices against the same arithmetic written out on one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pgolf_jax.model import params as parameters
from pgolf_jax.model.gpt import bind, packed_nll
from pgolf_jax.runtime.distributed import data_mesh
from pgolf_jax.settings import ModelConfig, OptimizerConfig, Settings, TrainConfig
from pgolf_jax.training import optimizer as optimizers
from pgolf_jax.training.step import TrainStep

MODEL = ModelConfig(
  vocab_size=64, num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, mlp_mult=2.0, num_loops=1, loop_start=0,
  loop_end=0, parallel_start_layer=1, rope_dims=8, tied_embed_init_std=0.3,
)  # fmt: skip
ROWS, TOKENS = 8, 24
SEQ_LEN = 12


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


@pytest.fixture(scope="module")
def take_step(params, rows):
  """take_step(clip_scope, devices, world) → (state, metrics) after one step; each is taken once."""

  @functools.cache
  def take(clip_scope, devices, world=0):
    s = settings(clip_scope=clip_scope)
    s = dataclasses.replace(s, train=dataclasses.replace(s.train, world_size=world))
    step = TrainStep(s, data_mesh(jax.devices()[:devices]))
    return step.lower(SEQ_LEN, looping=True).compile()(step.init(params), step.inputs(rows, 0.7, 0.9))

  return take


@pytest.fixture(scope="module")
def row_gradients(params, rows):
  """The gradient of each row's mean loss, on one device."""

  @jax.jit
  def gradient(row):
    loss = lambda p: packed_nll(  # noqa: E731
      bind(MODEL, p), row[None].astype(jnp.int32), looping=True, seq_len=SEQ_LEN, dtype=jnp.float32
    ).mean()
    return jax.grad(loss)(params)

  return [jax.tree.map(np.asarray, gradient(row)) for row in rows]


@pytest.fixture(scope="module")
def by_hand(params, row_gradients):
  """by_hand(ranks) → (parameters, norms): one step from the mean of each rank's own clipped gradient."""
  config = settings().optimizer
  opt = optimizers.make(config)

  @jax.jit
  def update(grads):
    updates, _ = opt.update(grads, opt.init(params), params, lr_scale=0.7, momentum=0.9)
    return optax.apply_updates(params, updates)

  def mean(trees):
    return jax.tree.map(lambda *x: sum(x) / len(x), *trees)

  @functools.cache
  def step(ranks):
    # Rows are of one length, so that a rank's gradient is the mean of its rows'.
    grads = [mean(row_gradients[i : i + ROWS // ranks]) for i in range(0, ROWS, ROWS // ranks)]
    norms = [float(np.sqrt(sum(np.sum(np.square(x)) for x in g.values()))) for g in grads]
    factors = [min(1.0, config.grad_clip_norm / (norm + 1e-6)) for norm in norms]
    clipped = [jax.tree.map(lambda x, f=f: x * np.float32(f), g) for g, f in zip(grads, factors, strict=True)]
    return update(mean(clipped)), norms

  return step


def assert_same_step(ours, wanted, before, limit=1e-4):
  for name in wanted:
    step = np.linalg.norm(wanted[name] - before[name])
    assert np.linalg.norm(ours[name] - wanted[name]) <= limit * step, name


@pytest.mark.parametrize("devices, world", [(8, 8), (2, 8), (1, 8), (1, 1), (2, 2)])
def test_clipping_by_rank_equals_clipping_each_rank_by_hand(params, take_step, by_hand, devices, world):
  wanted, norms = by_hand(world)
  assert min(norms) > 2 * settings().optimizer.grad_clip_norm, "the clip must bite for this test to tell anything"
  state, metrics = take_step("rank", devices, world)
  assert_same_step(state.params, wanted, params)
  np.testing.assert_allclose(np.asarray(metrics.grad_norm), norms, rtol=1e-4)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_global_clipping_is_the_same_on_any_number_of_devices(params, take_step, by_hand, devices):
  wanted, _ = by_hand(1)
  state, metrics = take_step("global", devices)
  assert_same_step(state.params, wanted, params)
  assert np.asarray(metrics.loss).shape == (1,)


def test_the_average_follows_the_parameters(params, take_step):
  state, _ = take_step("rank", 1, 1)
  decay = Settings().train.ema_decay
  for name, average in state.average.items():
    np.testing.assert_allclose(average, decay * params[name] + (1 - decay) * state.params[name], rtol=2e-6, atol=1e-7)


def test_the_softcaps_stay(params, take_step):
  state, _ = take_step("rank", 1, 1)
  assert all(np.array_equal(state.params[name], params[name]) for name in parameters.SOFTCAPS)


def test_banks_travel_by_reduce_scatter_and_all_gather():
  text = TrainStep(settings(), data_mesh()).lower(SEQ_LEN, looping=True).as_text()
  assert text.count("stablehlo.reduce_scatter") == 4 and text.count("stablehlo.all_gather") == 4


def test_the_declared_state_is_the_one_that_a_step_returns(params, take_step):
  step = TrainStep(settings(), data_mesh())
  for state in (step.init(params), take_step("rank", 8, 8)[0]):
    for x, declared in zip(jax.tree.leaves(state), jax.tree.leaves(step.abstract), strict=True):
      assert (x.shape, x.dtype, x.sharding) == (declared.shape, declared.dtype, declared.sharding)
