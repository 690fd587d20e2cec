"""The edges of the recipe, where we repeat the reference, and where we refuse what it lets through (section 8)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgolf_jax.errors import UserError
from pgolf_jax.kernels import polar_express as polar
from pgolf_jax.kernels import segment_attention as attention
from pgolf_jax.model import params as parameters
from pgolf_jax.model.gpt import bind, packed_nll
from pgolf_jax.parity import Case
from pgolf_jax.parity.tolerances import TOLERANCES, tolerance_for
from pgolf_jax.quantize.artifact import load, writer
from pgolf_jax.quantize.calibrate import Calibration
from pgolf_jax.quantize.make import quantize
from pgolf_jax.scoring.documents import find_documents
from pgolf_jax.settings import ModelConfig, OptimizerConfig, Settings, check
from pgolf_jax.settings.load import changed, to_dict
from pgolf_jax.training import optimizer as optimizers

SMALL = ModelConfig(
  vocab_size=64, num_layers=3, model_dim=32, num_heads=2, num_kv_heads=1, mlp_mult=2.0, num_loops=1, loop_start=0,
  loop_end=1, parallel_start_layer=0, rope_dims=8,
)  # fmt: skip


@pytest.mark.parametrize(("start", "is_possible"), [(0, True), (1, False), (2, True), (9, True)])
def test_lanes_that_begin_inside_the_loop_are_refused(start, is_possible):
  """Layers 0 1 2 with 0 and 1 looped once: 0 1 | 0 1 2."""
  settings = Settings(model=dataclasses.replace(SMALL, parallel_start_layer=start, loop_end=1))
  assert settings.model.layer_order(looping=True) == ((0, 1), (0, 1, 2))
  if not is_possible:  # with 0 1 2 looped, layer 0 comes after layer 1
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, loop_end=2, num_loops=2))
    with pytest.raises(UserError, match="inside the loop"):
      check.check(settings)
  else:
    check.check(settings)


def test_a_parameter_without_a_path_is_not_decayed():
  assert parameters.without_path(SMALL) == {"parallel_post_lambdas", "parallel_resid_lambdas"}
  assert parameters.without_path(dataclasses.replace(SMALL, parallel_start_layer=2)) == frozenset()
  params = parameters.init(SMALL, jax.random.key(0))
  optimizer = optimizers.make(OptimizerConfig(muon_dtype="float32"), unused=parameters.without_path(SMALL))
  grads = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(grads, optimizer.init(params), params, lr_scale=1.0, momentum=0.9)
  assert not updates["parallel_resid_lambdas"].any() and not updates["parallel_post_lambdas"].any()
  assert updates["blocks.0.attn_scale"].any()  # has a path, and so decays


def test_a_case_scored_without_the_loop_is_marked_as_intended(small_golden):
  case = Case.load(small_golden("train"))
  name = next(name for name in case.expected if name.startswith("val_loss_"))
  assert tolerance_for(case, name).quantity == "validation loss, nats"
  case.__dict__["settings"] = changed(case.settings, {"train.enable_looping_at": 1.0, "model.num_loops": 1})
  assert "as intended" in tolerance_for(case, name).quantity
  assert {t.kind for t in TOLERANCES if "as intended" in t.quantity} == {"train", "e2e"}


def test_the_slope_of_the_activation_is_obeyed():
  params = parameters.init(SMALL, jax.random.key(0))
  params = {name: value + 0.05 * jax.random.normal(jax.random.key(1), value.shape) for name, value in params.items()}
  tokens = jnp.arange(13)[None] % 7 + 1

  def loss(slope):
    model = bind(dataclasses.replace(SMALL, leaky_relu_sq_slope=slope), params)
    return float(packed_nll(model, tokens, looping=True, seq_len=12, dtype=jnp.float32).mean())

  assert len({loss(slope) for slope in (0.3, 0.5, 1.0)}) == 3


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_one_visible_key_has_no_gradient_at_all(implementation):
  """Adam with its eps of 1e-10 would take full steps of rounding noise."""
  q, k, v, dy = (jax.random.normal(jax.random.key(i), (2, 5, 2, 8)) for i in range(4))
  start = jnp.array([[0, 1, 2, 3, 4], [0, 1, 1, 3, 4]])

  def total(q, k):
    y = attention.segment_attention(q, k, v, start, max_segment=5, implementation=implementation)
    return jnp.sum(y * dy)

  dq, dk = jax.jit(jax.grad(total, argnums=(0, 1)))(q, k)
  assert not dq[0].any() and not dk[0].any()
  assert not dq[1, [0, 1, 3, 4]].any() and not dk[1, [0, 3, 4]].any()
  assert dq[1, 2].any() and dk[1, 1].any()


@pytest.mark.parametrize(("steps", "same_as"), [(0, 0), (5, 5), (6, 5), (9, 5)])
def test_more_steps_of_muon_than_there_are_count_as_five_and_none_is_none(steps, same_as):
  u = jax.random.normal(jax.random.key(0), (2, 6, 4))
  for implementation in ("xla", "reference"):
    ours = polar.polar_express(u, steps=steps, implementation=implementation)
    np.testing.assert_array_equal(ours, polar.polar_express(u, steps=same_as, implementation=implementation))
    if steps == 0:
      norm = np.sqrt(np.square(u).sum((1, 2), keepdims=True))
      np.testing.assert_allclose(ours, u / (norm + 1e-7), rtol=1e-6)
  params = {"qo_bank": u}
  optimizer = optimizers.make(OptimizerConfig(muon_dtype="float32", muon_steps=steps))
  updates, _ = optimizer.update(params, optimizer.init(params), params, lr_scale=1.0, momentum=0.9)
  assert np.isfinite(updates["qo_bank"]).all() and updates["qo_bank"].any()


@pytest.mark.parametrize("codec", ["entropy", "zstd"])
def test_a_model_of_one_layer_is_quantised_and_read_back(codec, tmp_path):
  """Its skip weights are [0, D]."""
  model = dataclasses.replace(SMALL, num_layers=1, num_loops=0, xsa_last_n=1)
  settings = Settings(model=model)
  params = {name: np.asarray(value) for name, value in parameters.init(model, jax.random.key(0)).items()}
  assert params["skip_weights"].shape == (0, 32)
  tensors = quantize(params, calibration=Calibration({}, {}), config=settings.quantize)
  (tmp_path / "one.pgolf").write_bytes(writer.write(to_dict(settings), tensors, codec))
  back = load(tmp_path / "one.pgolf")[1]
  assert {name: value.shape for name, value in back.items()} == parameters.shapes(model)


def test_a_stream_that_does_not_begin_with_bos_is_refused_by_position():
  with pytest.raises(UserError, match=r"at position 0, .*first bos is at position 3"):
    find_documents(np.array([5, 6, 7, 1, 8, 9]), 1)


def test_an_empty_document_at_the_end_is_dropped():
  documents = find_documents(np.array([1, 5, 6, 1, 7, 1]), 1)
  assert [(d.start, d.length) for d in documents] == [(0, 4), (3, 3)]
