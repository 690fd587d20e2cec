"""The rate quantiser: its integers against the formulas in float64, what an error costs, and whole artifacts."""

import dataclasses
import itertools

import numpy as np
import pytest
from tiny_model import MODEL, SETTINGS, write_data

from pgolf_jax.errors import UserError
from pgolf_jax.model import params as parameters
from pgolf_jax.quantize import rate
from pgolf_jax.quantize.artifact import read, writer
from pgolf_jax.quantize.artifact.codecs.trellis import NEXT, PARITY, SEGMENT, parities
from pgolf_jax.quantize.artifact.tensors import OCTAVE, Even, Half, LogGrid, unbank
from pgolf_jax.quantize.fisher import Curvature, Statistics
from pgolf_jax.quantize.make import make
from pgolf_jax.quantize.rate import Solver, TooFine, on_trellis
from pgolf_jax.settings import QuantizeConfig

CONFIG = QuantizeConfig(method="rate", trellis=False, block_size=16)


def problem(rows: int, columns: int, seed: int = 0) -> tuple[np.ndarray, Curvature]:
  rng = np.random.default_rng(seed)
  inputs = rng.standard_normal((4 * columns, columns)) @ rng.standard_normal((columns, columns))
  weight_MxN = rng.standard_normal((rows, columns)).astype(np.float32)
  hessian = inputs.T @ inputs / len(inputs)
  return weight_MxN, Curvature(hessian / np.trace(hessian), np.trace(hessian) * np.exp(rng.standard_normal(rows)))


def by_the_formulas(weight_MxN: np.ndarray, curvature: Curvature, step: float) -> LogGrid:
  """s_ij = c U_jj / √d_i with UᵀU = H⁻¹, one column after the other, in float64; H with damping and ridge."""
  hessian = curvature.hessian_NxN
  worth = np.exp(np.mean(np.log(curvature.row_M * np.square(weight_MxN).mean(axis=1))))
  hessian = hessian + (CONFIG.damping / len(hessian) + step**2 / 12 / worth) * np.eye(len(hessian))
  order = np.argsort(-np.diag(hessian), kind="stable")
  factor = np.linalg.cholesky(np.linalg.inv(hessian[order][:, order])).T
  row_M = np.rint(OCTAVE * np.log2(step / np.sqrt(curvature.row_M))).astype(int)
  column_N = np.rint(OCTAVE * np.log2(np.diag(factor))).astype(int)
  work = weight_MxN[:, order].astype(np.float64)
  q = np.zeros(work.shape, int)
  for j in range(work.shape[1]):
    steps = 2.0 ** ((row_M + column_N[j]) / OCTAVE)
    q[:, j] = np.rint(work[:, j] / steps)
    error = (work[:, j] - q[:, j] * steps) / factor[j, j]
    work[:, j + 1 :] -= np.outer(error, factor[j, j + 1 :])
  back = np.argsort(order)
  return LogGrid(q[:, back], row_M, column_N[back])


@pytest.mark.parametrize(("rows", "columns"), [(24, 40), (50, 16)])
def test_integers_are_those_of_the_formulas(rows, columns):
  weight, curvature = problem(rows, columns)
  solver = Solver({"w": weight}, Statistics({"w": curvature}, {}, 0.0, 0), CONFIG)
  for step in (0.01, 1.0):
    made, expected = solver.solve(step)["w"], by_the_formulas(weight, curvature, step)
    np.testing.assert_array_equal(made.row_M, expected.row_M)
    np.testing.assert_array_equal(made.column_N, expected.column_N)
    same = np.mean(made.q_MxN == expected.q_MxN)
    assert same > 0.98, same  # ties, and what follows from them


def test_every_weight_costs_the_same():
  # At a fine step an error is even over a step: each weight adds c²/12 to Σ d_i (E H Eᵀ)_ii, wherever it stands.
  weight, curvature = problem(64, 48)
  undamped = dataclasses.replace(CONFIG, damping=1e-6)
  for step in (0.02, 0.005):
    made = Solver({"w": weight}, Statistics({"w": curvature}, {}, 0.0, 0), undamped).solve(step)["w"]
    error = weight - made.dequantize().astype(np.float64)
    cost_M = curvature.row_M * np.einsum("mi,ij,mj->m", error, curvature.hessian_NxN, error)
    assert cost_M.sum() == pytest.approx(weight.size * step**2 / 12, rel=0.06)


def paths(segment: np.ndarray) -> float:
  """The least sum of squared errors over all paths of a short segment, one by one."""
  best = np.inf
  for bits in itertools.product((0, 1), repeat=len(segment)):
    state, cost = 0, 0.0
    for value, bit in zip(segment, bits, strict=True):
      offset = bit + 0.5 * PARITY[state]
      cost += (value - (2 * np.rint((value - offset) / 2) + offset)) ** 2
      state = NEXT[state, bit]
    best = min(best, cost)
  return best


def test_a_trellis_takes_the_best_path():
  rng = np.random.default_rng(0)
  for scale in (0.3, 2.0, 40.0):
    column = (scale * rng.standard_normal(SEGMENT + 9)).astype(np.float32)
    value = np.asarray(on_trellis(column, len(column)))
    q = np.floor(value).astype(np.int32)
    parity = parities((q[:, None] & 1).astype(np.uint8))[:, 0]
    np.testing.assert_array_equal(value, q + 0.5 * parity)
    assert np.square(column - value)[SEGMENT:].sum() == pytest.approx(paths(column[SEGMENT:]), rel=1e-4)
  wide = (100 * rng.standard_normal(64 * SEGMENT)).astype(np.float32)
  # Rounding errs by 1/12; at the same rate these 8 states err by 0.9 dB less.
  assert np.square(wide - np.asarray(on_trellis(wide, len(wide)))).mean() == pytest.approx(10**-0.09 / 12, rel=0.04)


def test_what_a_trellis_made_is_what_is_read():
  weight, curvature = problem(150, 48)
  solver = Solver({"w": weight}, Statistics({"w": curvature}, {}, 0.0, 0), dataclasses.replace(CONFIG, trellis=True))
  plain = Solver({"w": weight}, Statistics({"w": curvature}, {}, 0.0, 0), CONFIG)
  made = solver.solve(0.02)["w"]
  assert made.trellis_N.all() and made.trellis_M.all()
  stored = read(writer.write({}, {"w": made})).tensors["w"]
  np.testing.assert_array_equal(stored.dequantize(), made.dequantize())
  costs = []
  for grid in (made, plain.solve(0.02)["w"]):
    error = weight - grid.dequantize().astype(np.float64)
    costs.append(np.sum(curvature.row_M * np.einsum("mi,ij,mj->m", error, curvature.hessian_NxN, error)))
  assert costs[0] < 0.87 * costs[1]
  assert solver.solve(1000.0)["w"].trellis_N is None


def test_rows_and_columns_of_few_bits_are_left_out_of_the_trellis(monkeypatch):
  """Two matrices of one shape with other rows of few bits, and one with too few rows of many."""
  monkeypatch.setattr(rate, "_TRELLIS_BITS", 3.5)  # the ridge lets no column here have fewer than 2
  weights, matrices = {}, {}
  for seed, name in enumerate("abc"):
    weight, curvature = problem(150, 48, seed)
    few_M = np.random.default_rng(seed).random(150) < (0.2 if name < "c" else 0.7)
    scale_N = np.where(np.arange(48) == 5, 1e-3, 1.0)  # a column that hardly matters
    hessian = curvature.hessian_NxN * scale_N * scale_N[:, None]
    weights[name] = np.where(few_M[:, None], 1e-4, 1.0).astype(np.float32) * weight
    matrices[name] = Curvature(hessian / np.trace(hessian), curvature.row_M), few_M
  statistics = Statistics({name: curvature for name, (curvature, _) in matrices.items()}, {}, 0.0, 0)
  undamped = dataclasses.replace(CONFIG, damping=1e-6)
  made, plain = (Solver(weights, statistics, dataclasses.replace(undamped, trellis=t)).solve(0.2) for t in (1, 0))
  stored = read(writer.write({}, made)).tensors
  for name, (curvature, few_M) in matrices.items():
    grid, other = made[name], plain[name]
    np.testing.assert_array_equal(stored[name].dequantize(), grid.dequantize())
    if name == "c":
      assert grid.trellis_N is None and grid.trellis_M is None
      np.testing.assert_array_equal(grid.q_MxN, other.q_MxN)
      continue
    np.testing.assert_array_equal(grid.trellis_M, ~few_M)
    assert not grid.trellis_N[5] and grid.trellis_N.sum() == 47
    # Rows are rounded one by one: those that are left out are as they would be without a trellis.
    np.testing.assert_array_equal(grid.q_MxN[few_M], other.q_MxN[few_M])
    costs = []
    for each in (grid, other):
      error = (weights[name] - each.dequantize().astype(np.float64))[~few_M]
      costs.append(np.sum(curvature.row_M[~few_M] * np.einsum("mi,ij,mj->m", error, curvature.hessian_NxN, error)))
    assert costs[0] < 0.87 * costs[1]


def test_inputs_that_never_fire_get_no_integers():
  weight, curvature = problem(8, 24)
  hessian = curvature.hessian_NxN.copy()
  hessian[3] = hessian[:, 3] = 0
  made = Solver({"w": weight}, Statistics({"w": Curvature(hessian, curvature.row_M)}, {}, 0.0, 0), CONFIG).solve(0.1)
  assert not made["w"].q_MxN[:, 3].any()
  assert made["w"].q_MxN.any(axis=0).sum() == 23


@pytest.mark.parametrize(("damping", "step"), [(0.3, 0.003), (0.001, 6.0)])  # most of it damping, and most of it ridge
def test_inputs_that_never_fire_change_nothing_for_the_others(damping, step):
  """Damping and ridge are as large as without them: a trace of 1 over fewer inputs."""
  weight, curvature = problem(24, 40)
  live = np.flatnonzero(np.arange(40) % 3)
  # The ridge depends on a row's mean square, which is as without the others.
  weight[:, ::3] = np.sqrt(np.square(weight[:, live]).mean(axis=1, keepdims=True))
  hessian = np.zeros((40, 40))
  part = curvature.hessian_NxN[np.ix_(live, live)]
  hessian[np.ix_(live, live)] = part / np.trace(part)
  damped = dataclasses.replace(CONFIG, damping=damping)

  def grid(weight_MxN, hessian_NxN):
    matrices = {"w": Curvature(hessian_NxN, curvature.row_M)}
    return Solver({"w": weight_MxN}, Statistics(matrices, {}, 0.0, 0), damped).solve(step)["w"]

  with_dead, alone = grid(weight, hessian), grid(weight[:, live], part / np.trace(part))
  np.testing.assert_array_equal(with_dead.column_N[live], alone.column_N)
  assert np.mean(with_dead.q_MxN[:, live] == alone.q_MxN) > 0.98  # ties, and what follows from them


@pytest.mark.parametrize("trellis", [False, True])
def test_steps_whose_integers_an_artifact_cannot_hold_are_refused(trellis):
  weight, curvature = problem(150, 48)
  config = dataclasses.replace(CONFIG, trellis=trellis)
  solver = Solver({"w": weight}, Statistics({"w": curvature}, {}, 0.0, 0), config)
  made = solver.solve(1e-5)["w"]
  assert np.abs(read(writer.write({}, {"w": made})).tensors["w"].dequantize() - weight).max() < 1e-4
  for step in (1e-8, 1e-12):
    with pytest.raises(TooFine, match=f"quantize.step = {step:g} .* take a larger step"):
      solver.solve(step)


def test_small_parameters_get_one_step_or_stay_fp16():
  scale, unread = np.linspace(0.5, 2, 9, dtype=np.float32), np.float32(30)
  solver = Solver({"scale": scale, "unread": unread}, Statistics({}, {"scale": 4.0, "unread": 0.0}, 0.0, 0), CONFIG)
  made = solver.solve(0.01)
  assert isinstance(made["scale"], Even)
  assert np.abs(made["scale"].dequantize() - scale).max() <= 0.5 * 0.01 / 2 * 2 ** (0.5 / OCTAVE)
  assert isinstance(solver.solve(1e-7)["scale"], Half)
  assert made["unread"].shape == ()
  assert made["unread"].dequantize() == pytest.approx(unread, rel=1 / 8)
  with pytest.raises(UserError, match="no curvature of other"):
    Solver({"other": scale}, Statistics({}, {}, 0.0, 0), CONFIG)


def test_an_artifact_fills_its_budget_and_is_made_the_same_again(tmp_path):
  write_data(tmp_path)
  model = dataclasses.replace(MODEL, model_dim=64)
  settings = dataclasses.replace(
    SETTINGS, model=model, quantize=QuantizeConfig(method="rate", calibration_batches=1, calibration_micro_batches=1)
  )
  rng = np.random.default_rng(0)
  params = {n: 0.1 * rng.standard_normal(s).astype(np.float32) for n, s in parameters.shapes(model).items()}
  budget = 40_000
  made = make(settings, params, tmp_path, fit_bytes=budget)
  assert 0.998 * budget <= len(made.data) <= budget  # a stream is a whole number of words
  again = make(dataclasses.replace(settings, quantize=made.config), params, tmp_path)
  assert again.data == made.data
  artifact = read(made.data)
  assert artifact.tensors.keys() == unbank(params).keys()
  assert isinstance(artifact.tensors["blocks.0.attn.c_q.weight"], LogGrid)
  restored = artifact.params()
  assert np.std(restored["mlp_up_bank"] - params["mlp_up_bank"]) < 0.25 * params["mlp_up_bank"].std()
