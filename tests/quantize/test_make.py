"""Which matrices are quantised; the search for clips, which fills the budget in few attempts."""

import dataclasses
import functools

import numpy as np
import pytest
from tiny_model import SETTINGS, random_params, with_quantize, write_data

from pgolf_jax.errors import UserError
from pgolf_jax.model import params as parameters
from pgolf_jax.quantize.artifact import load
from pgolf_jax.quantize.artifact.tensors import Grid, Half, Rows
from pgolf_jax.quantize.calibrate import Calibration
from pgolf_jax.quantize.fisher import Curvature, Statistics
from pgolf_jax.quantize.make import fit, make, quantize
from pgolf_jax.quantize.rate import Solver, TooFine
from pgolf_jax.settings import ModelConfig, QuantizeConfig


def sized(bytes_at_one: float, parameters: int):
  """Returns an `attempt` whose artifacts are nearly as long as expected, and the list of multipliers it was given."""
  tried = []

  def attempt(config: QuantizeConfig) -> bytes:
    multiplier = config.mlp_clip_sigmas / QuantizeConfig().mlp_clip_sigmas
    tried.append(multiplier)
    return bytes(int(bytes_at_one - 0.9 * parameters / 8 * np.log2(multiplier)))

  return attempt, tried


@pytest.mark.parametrize("budget", [300_000, 410_000, 520_000])
def test_fit_fills_the_budget(budget):
  attempt, tried = sized(400_000, 800_000)
  config, data = fit(QuantizeConfig(), attempt, budget, 800_000)
  assert 0.9995 * budget <= len(data) <= budget
  assert len(attempt(config)) == len(data)
  assert len(tried) <= 6


def test_fit_takes_the_finest_grids_where_all_fit_and_refuses_where_none_does():
  attempt, _ = sized(400_000, 800_000)
  config, _ = fit(QuantizeConfig(), attempt, 10**7, 800_000)
  assert config.mlp_clip_sigmas == pytest.approx(0.2 * QuantizeConfig().mlp_clip_sigmas)
  with pytest.raises(UserError, match="below 50,000 bytes"):
    fit(QuantizeConfig(), attempt, 50_000, 800_000)


@pytest.mark.parametrize("octaves", [2.5, 1.0, -1.0])
def test_fit_learns_how_few_values_are_quantised(octaves):
  """An eighth of the parameters: the rest stays fp16, and takes most of the bytes."""
  attempt, tried = sized(1_500_000, 125_000)
  _, data = fit(QuantizeConfig(), attempt, budget := int(1_500_000 - 0.9 * 125_000 / 8 * octaves), 1_000_000)
  assert 0.9995 * budget <= len(data) <= budget
  assert len(tried) <= 5


def test_fit_refuses_only_after_the_coarsest_grids():
  """Bytes that hardly fall before the coarsest grids: the last attempt is of those."""
  tried = []

  def attempt(config: QuantizeConfig) -> bytes:
    tried.append(config.mlp_clip_sigmas / QuantizeConfig().mlp_clip_sigmas)
    return bytes(400_500 - int(tried[-1]) if tried[-1] < 7.999 else 300_000)

  config, data = fit(QuantizeConfig(), attempt, 400_480, 8_000_000)
  assert len(data) == 300_000 and config.mlp_clip_sigmas == pytest.approx(8 * QuantizeConfig().mlp_clip_sigmas)


def test_fit_takes_the_finest_step_whose_integers_can_be_held():
  tried = []

  def attempt(config: QuantizeConfig) -> bytes:
    tried.append(np.log2(config.step / 0.001))
    if tried[-1] < -6.3:
      raise TooFine("cut off")
    return bytes(int(100_000 * (4 - tried[-1])))

  config, data = fit(QuantizeConfig(method="rate", step=0.001), attempt, 10**8, 800_000)
  assert -6.3 <= np.log2(config.step / 0.001) < -5.3
  assert len(data) == max(int(100_000 * (4 - x)) for x in tried if x >= -6.3)
  assert len(tried) <= 6
  with pytest.raises(TooFine):
    fit(QuantizeConfig(method="rate", step=1e-12), attempt, 10**8, 800_000)


NARROW = ModelConfig(
  vocab_size=64, num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, num_loops=0, parallel_start_layer=1
)
WIDTHS = {"mlp.proj": NARROW.mlp_dim}  # of inputs, where they are not the model's


def quantized(limit: int) -> dict:
  rng = np.random.default_rng(0)
  params = {n: rng.standard_normal(s).astype(np.float32) for n, s in parameters.shapes(NARROW).items()}
  names = [f"blocks.{i}.{kind}.weight" for i in range(2) for kind in (
    "attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj")] + ["tok_emb.weight"]  # fmt: skip
  width = {n: next((w for part, w in WIDTHS.items() if part in n), NARROW.model_dim) for n in names}
  hessian = {n: np.eye(width[n], dtype=np.float32) for n in names}
  act_rms = {n: np.ones(width[n], np.float32) for n in names}
  return quantize(params, Calibration(hessian, act_rms), QuantizeConfig(fp16_up_to=limit))


def test_matrices_above_the_limit_are_quantised_and_nothing_else():
  sizes = {"tok_emb.weight": 64 * 32, "mlp.fc.weight": 128 * 32, "attn.c_q.weight": 32 * 32, "attn.c_k.weight": 16 * 32}
  for limit in (0, 16 * 32, 32 * 32, 64 * 32, 65_536):
    tensors = quantized(limit)
    grids = {name for name, tensor in tensors.items() if isinstance(tensor, Grid)}
    for suffix, size in sizes.items():
      named = {name for name in tensors if name.endswith(suffix)}
      assert named and (named <= grids if size > limit else not named & grids), (limit, suffix)
    assert all(isinstance(tensors[n], Half | Rows) for n in tensors if "attn_gate" in n or "scale" in n or "skip" in n)


@pytest.mark.parametrize("method", ["gptq", "rate"])
def test_a_hessian_without_a_factor_is_refused(method):
  """More inputs than positions, and no damping: the factor is not a number, of which integers would be zeros."""
  rng = np.random.default_rng(0)
  weight, inputs = rng.standard_normal((40, 64)).astype(np.float32), rng.standard_normal((20, 64))
  hessian = (inputs.T @ inputs / np.square(inputs).sum()).astype(np.float32)
  for damping in (0.0, 0.01):
    config = QuantizeConfig(method=method, damping=damping, fp16_up_to=0, lqer=False)
    if method == "gptq":
      calibration = Calibration({"tok_emb.weight": hessian}, {"tok_emb.weight": np.ones(64, np.float32)})
      run = functools.partial(quantize, {"tok_emb.weight": weight}, calibration, config)
    else:
      curvature = Curvature(hessian, np.ones(40))
      run = functools.partial(Solver({"w": weight}, Statistics({"w": curvature}, {}, 0.0, 0), config).solve, 1e-6)
    if damping:
      assert all(stored.q_MxN.any() for stored in run().values())
    else:
      with pytest.raises(UserError, match=r"has no factor with quantize\.damping = 0;"):
        run()


def test_the_limit_is_the_recipes_unless_set():
  assert QuantizeConfig().fp16_up_to == 65_536


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "rate"])
def test_what_the_model_may_have_beside_the_recipe_travels_in_the_artifact(tmp_path, method):
  write_data(tmp_path / "data")
  model = dataclasses.replace(SETTINGS.model, value_residual=True, dense_skips=1)
  rng = np.random.default_rng(0)
  shapes = {"value_shares": (2,), "dense_skip_weights": (2, model.model_dim), "dense_skip_biases": (2,)}
  new = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
  made = make(dataclasses.replace(with_quantize(method=method), model=model), random_params() | new, tmp_path / "data")
  (tmp_path / "artifact").write_bytes(made.data)
  settings, params = load(tmp_path / "artifact")
  assert settings.model == model
  for name, value in new.items():
    error = np.linalg.norm(params[name] - value) / np.linalg.norm(value)
    assert error < (1e-3 if method == "gptq" else 0.3), name
