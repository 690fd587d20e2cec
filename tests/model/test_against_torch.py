"""A second writing of the recipe, in PyTorch, agrees with the golden case and with the model on other inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgolf_jax.data.loader import Loader
from pgolf_jax.kernels.segment_attention import segment_starts
from pgolf_jax.model import params as parameters
from pgolf_jax.model.gpt import bind, packed_nll
from pgolf_jax.parity import Case
from pgolf_jax.settings import ModelConfig
from pgolf_jax.training import Schedule

torch_gpt = pytest.importorskip("pgolf_jax.bench.torch_gpt", reason="PyTorch is not installed")
torch_stand_in = pytest.importorskip("pgolf_jax.bench.torch_stand_in", reason="PyTorch is not installed")

CONFIG = ModelConfig(
  vocab_size=96, num_layers=5, model_dim=48, num_heads=6, num_kv_heads=2, mlp_mult=1.5, num_loops=1, loop_start=1,
  loop_end=2, parallel_start_layer=3, xsa_last_n=4, rope_dims=4, gate_window=8,
)  # fmt: skip


def segment_lengths(tokens_T: np.ndarray, seq_len: int, bos_id: int) -> tuple[int, ...]:
  start_T = segment_starts(jnp.asarray(tokens_T)[None], bos_id=bos_id, seq_len=seq_len)[0]
  return tuple(np.unique(start_T, return_counts=True)[1].tolist())


def loss_and_gradient(model, tokens_T1: np.ndarray, lengths: tuple[int, ...], looping: bool):
  """The PyTorch model's loss, and its gradient by parameter; parameters that the loss does not see have None."""
  names, tensors = zip(*model.params.items(), strict=True)
  loss = model.loss(torch_gpt.tensor(tokens_T1, "cpu"), lengths, looping)
  gradients = torch_gpt.torch.autograd.grad(loss, tensors, allow_unused=True)
  return loss.item(), {name: g if g is None else g.numpy() for name, g in zip(names, gradients, strict=True)}


def assert_near(actual: np.ndarray, expected: np.ndarray, tolerance: float, name: str) -> None:
  """Checks that the difference is small beside the expected tensor, by its norm."""
  assert np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected) + 1e-9, name


MODELS = {"plain": torch_gpt.TorchGPT, "stand-in": torch_stand_in.StandIn}


@pytest.mark.parametrize("looping", [False, True])
@pytest.mark.parametrize(
  ("cases", "kind"),
  [("small_golden", "plain"), ("golden", "plain"), ("small_golden", "stand-in"), ("golden", "stand-in")],
)
def test_pytorch_agrees_with_the_golden_case(cases, kind, looping, request):
  case = Case.load(request.getfixturevalue(cases)("forward"))
  form = f"loop{looping:d}/"
  expected = {name.removeprefix(form): x for name, x in case.expected.items() if name.startswith(form)}
  params = {name.removeprefix("params/"): x for name, x in case.inputs.items() if name.startswith("params/")}
  m, tokens_T1 = case.settings.model, case.inputs["tokens"]
  model = MODELS[kind](m, params)
  lengths = segment_lengths(tokens_T1[:-1], case.about["max_doc_len"], m.bos_id)
  assert len(set(lengths)) > 1
  loss, gradients = loss_and_gradient(model, tokens_T1, lengths, looping)
  assert loss == pytest.approx(expected["loss"].item(), rel=1e-5)
  for name in params.keys() - set(parameters.SOFTCAPS):
    assert_near(gradients[name], expected[f"grads/{name}"], 1e-4, name)
  if kind != "plain":
    return  # it is made for training
  logits = model.evaluation_logits(torch_gpt.tensor(tokens_T1[:-1], "cpu"), lengths, looping).detach().numpy()
  np.testing.assert_allclose(logits, expected["logits"], rtol=1e-5, atol=1e-5 * np.abs(expected["logits"]).max())


def test_the_stand_in_by_flex_attention_has_the_golden_loss(small_golden):
  """It has no gradient on a CPU."""
  case = Case.load(small_golden("forward"))
  params = {name.removeprefix("params/"): x for name, x in case.inputs.items() if name.startswith("params/")}
  model = torch_stand_in.StandIn(case.settings.model, params, attention="flex")
  for value in model.params.values():
    value.requires_grad_(False)
  tokens_T1 = case.inputs["tokens"]
  lengths = segment_lengths(tokens_T1[:-1], case.about["max_doc_len"], case.settings.model.bos_id)
  loss = model.loss(torch_gpt.tensor(tokens_T1, "cpu"), lengths, looping=True)
  assert loss.item() == pytest.approx(case.expected["loop1/loss"].item(), rel=1e-5)


@pytest.mark.parametrize("cases", ["small_golden", "golden"])
def test_the_stand_in_trains_as_the_golden_case_does(cases, request):
  case = Case.load(request.getfixturevalue(cases)("train"))
  s = case.settings
  params = {name.removeprefix("params/"): x for name, x in case.inputs.items() if name.startswith("params/")}
  model, ranks = torch_stand_in.StandIn(s.model, params), max(1, s.train.world_size)
  row_tokens = s.train.batch_tokens // s.train.micro_batches
  loader = Loader(case.data, world_size=ranks, row_tokens=row_tokens, bos_id=s.model.bos_id)
  schedule, losses, plans = Schedule(s), [], []

  def loss(row_T1):
    lengths = segment_lengths(row_T1[:-1].numpy(), plans[-1].seq_len, s.model.bos_id)
    return model.loss(row_T1, lengths, plans[-1].looping)

  step = torch_gpt.TorchStep(s, model, ranks, loss)
  for k in range(len(case.expected["train_loss"])):
    plans.append(schedule.plan(k, elapsed=0.0))
    if plans[-1].seq_len_changed and s.data.discard_prefetched:
      loader.skip(2)
    tokens = torch_gpt.tensor(loader.step(s.train.micro_batches // ranks), "cpu")
    losses.append(float(step(tokens, plans[-1].lr_scale, plans[-1].momentum)))
  np.testing.assert_allclose(losses, case.expected["train_loss"], atol=1e-4, rtol=0)
  assert losses[-1] < losses[0]
  for name, average in case.expected_under("params_ema/").items():
    if name not in parameters.SOFTCAPS:
      assert_near(step.average[name].numpy(), average, 1e-3, name)


@pytest.mark.parametrize("looping", [False, True])
@pytest.mark.parametrize(
  "change",
  [
    {},
    {"rope_dims": 0, "ln_scale": False, "parallel_start_layer": 0},
    {"smear_gate": False, "skip_gates": False, "sparse_attn_gate": False, "parallel_final_lane": "attn"},
  ],
)
def test_the_model_agrees_with_pytorch(looping, change):
  config = dataclasses.replace(CONFIG, **change)
  random = np.random.default_rng(0)
  params = {
    name: random.normal(scale=0.2, size=shape).astype(np.float32) for name, shape in parameters.shapes(config).items()
  }
  tokens_T1 = random.integers(0, config.vocab_size, 201)
  tokens_T1[[0, 17, 18, 140]] = config.bos_id
  lengths = segment_lengths(tokens_T1[:-1], 32, config.bos_id)
  expected_loss, expected = loss_and_gradient(torch_gpt.TorchGPT(config, params), tokens_T1, lengths, looping)

  def mean_nll(params):
    rows = jnp.asarray(tokens_T1)[None]
    return packed_nll(bind(config, params), rows, seq_len=32, looping=looping, dtype=jnp.float32).mean()

  loss, gradients = jax.jit(jax.value_and_grad(mean_nll))(params)
  assert float(loss) == pytest.approx(expected_loss, rel=1e-5)
  for name, gradient in gradients.items():
    zero = np.zeros_like(params[name])
    assert_near(np.asarray(gradient), zero if expected[name] is None else expected[name], 1e-4, name)
