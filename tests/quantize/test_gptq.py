"""GPTQ against the loop that the recipe describes, and against the golden case of the PyTorch reference."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from pgolf_jax.parity.run import quantize_case
from pgolf_jax.quantize.artifact.tensors import LowRank, unbank
from pgolf_jax.quantize.calibrate import Calibration
from pgolf_jax.quantize.gptq import Grids, gptq, inverse_factor, row_step
from pgolf_jax.quantize.make import quantize
from pgolf_jax.settings.load import from_env


def matrix_and_hessian(seed: int, rows: int, columns: int):
  rng = np.random.default_rng(seed)
  inputs = rng.standard_normal((4 * columns, columns)) @ rng.standard_normal((columns, columns))
  inputs *= np.exp(rng.standard_normal(columns))
  weight = rng.standard_normal((rows, columns)).astype(np.float32)
  return weight, (inputs.T @ inputs / len(inputs)).astype(np.float32)


def by_the_recipe(weight, hessian, step, levels, damping=0.01):
  """One column after the other in float64, without blocks."""
  weight, hessian, step = weight.astype(np.float64).copy(), hessian.astype(np.float64).copy(), step.astype(np.float64)
  dead = np.diagonal(hessian) == 0
  hessian[dead, dead] = 1
  weight[:, dead] = 0
  hessian += damping * np.mean(np.diagonal(hessian)) * np.eye(len(hessian))
  order = np.argsort(-np.diagonal(hessian), kind="stable")
  factor = np.linalg.cholesky(np.linalg.inv(hessian[np.ix_(order, order)])).T
  q = np.zeros(weight.shape, np.int8)
  for j, column in enumerate(order):
    q[:, column] = np.clip(np.round(weight[:, column] / step), -levels, levels)
    error = (weight[:, column] - q[:, column] * step) / factor[j, j]
    weight[:, order[j:]] -= np.outer(error, factor[j, j:])
  return q


def run(weight, hessian, step, levels, block=32, is_fine=None, fine_step=None):
  """`gptq` of a single matrix; integers of fine columns go up to 127."""
  is_fine = np.zeros(weight.shape[1], bool) if is_fine is None else is_fine
  fine_step = step if fine_step is None else fine_step
  levels, fine_levels = np.array([levels], np.float32), np.array([127], np.float32)
  grids = Grids(step[None], levels, fine_step[None], fine_levels, is_fine[None])
  return np.asarray(gptq(weight[None], hessian[None], grids, block=block)[0])


@pytest.mark.parametrize("columns", [32, 50, 96])
def test_blocks_give_what_single_columns_give(columns):
  weight, hessian = matrix_and_hessian(columns, 24, columns)
  step = row_step(weight, 12.0, 31)
  differ = run(weight, hessian, step, 31) != by_the_recipe(weight, hessian, step, 31)
  assert np.mean(differ) <= 0.005  # float32 may fall on the other side of a tie


def test_inputs_that_never_fired_get_zero_columns():
  weight, hessian = matrix_and_hessian(1, 8, 40)
  hessian[7] = hessian[:, 7] = 0
  q = run(weight, hessian, row_step(weight, 12.0, 31), 31)
  assert not q[:, 7].any()
  assert q[:, 8].any()


def test_a_row_of_zeros_stays_zero():
  weight, hessian = matrix_and_hessian(2, 8, 40)
  weight[3] = 0
  q = run(weight, hessian, row_step(weight, 12.0, 31), 31)
  assert not q[3].any()


def test_marked_columns_use_the_finer_grid():
  weight, _ = matrix_and_hessian(3, 32, 64)
  step, fine_step = row_step(weight, 13.0, 31), row_step(weight, 13.0, 127)
  is_fine = np.zeros(64, bool)
  is_fine[16:32] = True
  # Independent inputs: no error is passed on, each value goes to its nearest grid point.
  q = run(weight, np.eye(64, dtype=np.float32), step, 31, is_fine=is_fine, fine_step=fine_step)
  steps = np.where(is_fine, fine_step.astype(np.float32)[:, None], step.astype(np.float32)[:, None])
  assert np.array_equal(q, np.rint(weight / steps))
  assert np.abs(q[:, is_fine]).max() > 1.5 * np.abs(q[:, ~is_fine]).max()


def test_error_feedback_lowers_the_weighted_error():
  weight, hessian = matrix_and_hessian(4, 32, 64)
  step = row_step(weight, 12.0, 7)
  step_Mx1 = step.astype(np.float32)[:, None]
  rounded = np.clip(np.rint(weight / step_Mx1), -7, 7)

  def loss(q):
    error = weight - q * step_Mx1
    return np.sum((error @ hessian) * error)

  assert loss(run(weight, hessian, step, 7)) < 0.7 * loss(rounded)


def test_inverse_factor_is_the_upper_factor_of_the_inverse():
  _, hessian = matrix_and_hessian(5, 4, 20)
  hessian += 0.1 * np.eye(20, dtype=np.float32)
  factor = np.asarray(inverse_factor(jnp.asarray(hessian)), np.float64)
  assert np.allclose(factor, np.triu(factor))
  assert np.allclose(factor.T @ factor @ hessian, np.eye(20), atol=1e-3)


@pytest.fixture(scope="module")
def case(golden):
  folder = golden("quantize")
  inputs, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")
  groups = ("params/", "hessian/", "act_rms/")
  parts = [{k.removeprefix(g): v for k, v in inputs.items() if k.startswith(g)} for g in groups]
  return json.loads((folder / "case.json").read_text())["settings"], *parts, expected


@pytest.fixture(scope="module")
def quantised(case):
  environ, params, hessian, act_rms, _ = case
  return quantize(params, Calibration(hessian, act_rms), from_env(environ).quantize)


def test_golden_integers_and_steps(case, quantised):
  expected = case[-1]
  exact = 0
  for name, tensor in quantised.items():
    if f"quantized/{name}.q" not in expected:
      assert np.array_equal(tensor.dequantize(), expected[f"dequantized/{name}"]), name
      continue
    assert np.array_equal(tensor.step_M, expected[f"quantized/{name}.scale"]), name
    differ = np.mean(tensor.q_MxN != expected[f"quantized/{name}.q"])
    exact += differ == 0
    assert differ <= 0.005, name
    assert (tensor.low_rank is not None) == (f"quantized/{name}.lqA_a" in expected), name
  assert exact >= 8  # of nine; the ninth has ties


@pytest.fixture(scope="module")
def dequantized(case):
  """Out of an artifact, quantised a second time."""
  return quantize_case(*case[:-1])


def test_golden_weighted_error_out_of_the_artifact(case, dequantized):
  _, params, hessian, _, expected = case
  assert {n for n in expected if n.startswith("dequantized/")} == set(dequantized)
  weights = unbank(params)
  for name in hessian:
    weight, moment = weights[name].astype(np.float64), hessian[name].astype(np.float64)

    def loss(values, weight=weight, moment=moment):
      return np.sum(((weight - values) @ moment) * (weight - values))

    # Not bit for bit: the sign of a singular pair is free, and its factors round differently with either sign.
    assert loss(dequantized[f"dequantized/{name}"]) <= 1.0005 * loss(expected[f"dequantized/{name}"]), name


def test_golden_low_rank_factors_up_to_sign(case, quantised):
  expected = case[-1]
  for name, tensor in quantised.items():
    if getattr(tensor, "low_rank", None) is None:
      continue
    ours = tensor.low_rank
    assert np.array_equal(ours.a_step, expected[f"quantized/{name}.lqAs_a"].reshape(1)), name
    assert np.array_equal(ours.b_step, expected[f"quantized/{name}.lqBs_a"]), name
    theirs = LowRank(ours.a_MxR, ours.a_step, expected[f"quantized/{name}.lqB_a"], ours.b_step).b()
    alignment = np.sum(ours.b() * theirs, axis=1)
    alignment /= np.linalg.norm(ours.b(), axis=1) * np.linalg.norm(theirs, axis=1)
    assert np.all(np.abs(alignment) > 0.98), name


def test_quantising_twice_gives_the_same(quantised, dequantized):
  for name, tensor in quantised.items():
    assert np.array_equal(tensor.dequantize(), dequantized[f"dequantized/{name}"]), name


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators_in_full_precision(platform):
  """Matrix products must not fall to bfloat16 or TF32: the integers would differ from machine to machine."""
  f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
  step, is_fine = jax.ShapeDtypeStruct((3, 40), jnp.float16), jax.ShapeDtypeStruct((3, 64), jnp.bool_)
  grids = Grids(step, f32(3), step, f32(3), is_fine)
  text = gptq.trace(f32(3, 40, 64), f32(3, 64, 64), grids, block=32).lower(lowering_platforms=(platform,)).as_text()
  products = [line for line in text.splitlines() if "dot_general" in line]
  assert products
  assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
