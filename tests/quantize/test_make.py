"""Which matrices are quantised; the search for clips, which fills the budget in few attempts."""

import dataclasses

import numpy as np
import pytest
from tiny_model import SETTINGS, random_params, with_quantize, write_data

from pgolf_jax.errors import UserError
from pgolf_jax.model import params as parameters
from pgolf_jax.quantize.artifact import load
from pgolf_jax.quantize.artifact.tensors import Grid, Half, Rows
from pgolf_jax.quantize.calibrate import Calibration
from pgolf_jax.quantize.make import fit, make, quantize
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
