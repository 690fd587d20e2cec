"""GPTQ against the loop that the recipe describes, and against what the PyTorch reference made."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from pgolf_jax.parity.quantize import quantize_case
from pgolf_jax.quantize.artifact.names import unbank
from pgolf_jax.quantize.artifact.tensors import LowRank
from pgolf_jax.quantize.gptq import gptq, inverse_factor, row_scale
from pgolf_jax.quantize.quantize import quantize
from pgolf_jax.settings.load import from_env


def matrix_and_hessian(seed: int, rows: int, columns: int):
  rng = np.random.default_rng(seed)
  inputs = rng.standard_normal((4 * columns, columns)) @ rng.standard_normal((columns, columns))
  inputs *= np.exp(rng.standard_normal(columns))
  weight = rng.standard_normal((rows, columns)).astype(np.float32)
  return weight, (inputs.T @ inputs / len(inputs)).astype(np.float32)


def by_the_recipe(weight, hessian, scale, levels, damping=0.01):
  """One column after the other in float64, without blocks."""
  weight, hessian, scale = weight.astype(np.float64).copy(), hessian.astype(np.float64).copy(), scale.astype(np.float64)
  dead = np.diagonal(hessian) == 0
  hessian[dead, dead] = 1
  weight[:, dead] = 0
  hessian += damping * np.mean(np.diagonal(hessian)) * np.eye(len(hessian))
  order = np.argsort(-np.diagonal(hessian), kind="stable")
  factor = np.linalg.cholesky(np.linalg.inv(hessian[np.ix_(order, order)])).T
  q = np.zeros(weight.shape, np.int8)
  for j, column in enumerate(order):
    q[:, column] = np.clip(np.round(weight[:, column] / scale), -levels, levels)
    error = (weight[:, column] - q[:, column] * scale) / factor[j, j]
    weight[:, order[j:]] -= np.outer(error, factor[j, j:])
  return q


def run(weight, hessian, scale, levels, block=32, wide=None, wide_scale=None, wide_levels=127):
  is_wide = np.zeros(weight.shape[1], bool) if wide is None else wide
  wide_scale = scale if wide_scale is None else wide_scale
  found = gptq(
    weight[None],
    hessian[None],
    scale[None],
    wide_scale[None],
    is_wide[None],
    np.array([levels], np.float32),
    np.array([wide_levels], np.float32),
    block=block,
  )
  return np.asarray(found[0])


@pytest.mark.parametrize("columns", [32, 50, 96])
def test_blocks_give_what_single_columns_give(columns):
  weight, hessian = matrix_and_hessian(columns, 24, columns)
  scale = row_scale(weight, 12.0, 31)
  found = run(weight, hessian, scale, 31)
  wanted = by_the_recipe(weight, hessian, scale, 31)
  assert np.mean(found != wanted) <= 0.005  # float32 may fall on the other side of a tie


def test_inputs_that_never_fired_get_zero_columns():
  weight, hessian = matrix_and_hessian(1, 16, 40)
  hessian[7] = hessian[:, 7] = 0
  found = run(weight, hessian, row_scale(weight, 12.0, 31), 31)
  assert not found[:, 7].any()
  assert found[:, 8].any()


def test_a_row_of_zeros_stays_zero():
  weight, hessian = matrix_and_hessian(2, 8, 40)
  weight[3] = 0
  found = run(weight, hessian, row_scale(weight, 12.0, 31), 31)
  assert not found[3].any()


def test_marked_columns_use_the_finer_grid():
  weight, _ = matrix_and_hessian(3, 8, 64)
  scale, wide_scale = row_scale(weight, 13.0, 31), row_scale(weight, 13.0, 127)
  wide = np.zeros(64, bool)
  wide[16:32] = True
  # Inputs that do not depend on each other: no error is passed on, each value goes to its nearest grid point.
  found = run(weight, np.eye(64, dtype=np.float32), scale, 31, wide=wide, wide_scale=wide_scale)
  step = np.where(wide, wide_scale.astype(np.float32)[:, None], scale.astype(np.float32)[:, None])
  assert np.array_equal(found, np.rint(weight / step))
  assert np.abs(found[:, wide]).max() > 1.5 * np.abs(found[:, ~wide]).max()


def test_error_feedback_lowers_the_weighted_error():
  weight, hessian = matrix_and_hessian(4, 32, 64)
  scale = row_scale(weight, 12.0, 7)
  step = scale.astype(np.float32)[:, None]
  rounded = np.clip(np.rint(weight / step), -7, 7)

  def loss(q):
    error = weight - q * step
    return np.sum((error @ hessian) * error)

  assert loss(run(weight, hessian, scale, 7)) < 0.7 * loss(rounded)


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
  return quantize(params, hessian, act_rms, from_env(environ).quantize)


def test_golden_integers_and_steps(case, quantised):
  expected = case[-1]
  exact = 0
  for name, tensor in quantised.items():
    if f"quantized/{name}.q" not in expected:
      assert np.array_equal(tensor.dequantize(), expected[f"dequantized/{name}"]), name
      continue
    assert np.array_equal(tensor.scale_M, expected[f"quantized/{name}.scale"]), name
    differ = np.mean(tensor.q_MxN != expected[f"quantized/{name}.q"])
    exact += differ == 0
    assert differ <= 0.005, name
    assert (tensor.low_rank is not None) == (f"quantized/{name}.lqA_a" in expected), name
  assert exact >= 8  # of nine: ties


def test_golden_weighted_error_out_of_the_artifact(case):
  environ, params, hessian, act_rms, expected = case
  found = quantize_case(environ, params, hessian, act_rms)
  assert {n for n in expected if n.startswith("dequantized/")} == set(found)
  weights = unbank(params)
  for name in hessian:
    weight, moment = weights[name].astype(np.float64), hessian[name].astype(np.float64)

    def loss(values, weight=weight, moment=moment):
      return np.sum(((weight - values) @ moment) * (weight - values))

    # The sign of a singular pair is free, and with it the rounding of its factors: hence not bit for bit.
    assert loss(found[f"dequantized/{name}"]) <= 1.0005 * loss(expected[f"dequantized/{name}"]), name


def test_golden_low_rank_factors_up_to_sign(case, quantised):
  expected = case[-1]
  for name, tensor in quantised.items():
    if getattr(tensor, "low_rank", None) is None:
      continue
    ours = tensor.low_rank
    assert np.array_equal(ours.a_scale, expected[f"quantized/{name}.lqAs_a"].reshape(1)), name
    assert np.array_equal(ours.b_scale, expected[f"quantized/{name}.lqBs_a"]), name
    theirs = LowRank(ours.a_MxR, ours.a_scale, expected[f"quantized/{name}.lqB_a"], ours.b_scale).b()
    alignment = np.sum(ours.b() * theirs, axis=1)
    alignment /= np.linalg.norm(ours.b(), axis=1) * np.linalg.norm(theirs, axis=1)
    assert np.all(np.abs(alignment) > 0.98), name


def test_quantising_twice_gives_the_same(case, quantised):
  environ, params, hessian, act_rms, _ = case
  again = quantize(params, hessian, act_rms, from_env(environ).quantize)
  for name, tensor in quantised.items():
    assert np.array_equal(tensor.dequantize(), again[name].dequantize()), name


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators_in_full_precision(platform):
  """Matrix products must not fall to bfloat16 or TF32: the integers would differ from machine to machine."""
  f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
  half, mask = jax.ShapeDtypeStruct((3, 40), jnp.float16), jax.ShapeDtypeStruct((3, 64), jnp.bool_)
  arguments = f32(3, 40, 64), f32(3, 64, 64), half, half, mask, f32(3), f32(3)
  text = gptq.trace(*arguments, block=32).lower(lowering_platforms=(platform,)).as_text()
  products = [line for line in text.splitlines() if "dot_general" in line]
  assert products
  assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
