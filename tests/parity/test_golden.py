"""Golden cases of the PyTorch reference, through the code of `pgolf parity`, within the tolerances it states."""

import dataclasses

import jax
import numpy as np
import pytest

from pgolf_jax.parity import Case, find_cases, shipped_cases
from pgolf_jax.parity.check import agrees, check, needs_floors
from pgolf_jax.parity.run import run
from pgolf_jax.runtime.distributed import data_mesh

SMALL = [path.name for path in find_cases(shipped_cases())]


def assert_agrees(case, mesh=None):
  assert not needs_floors(case)
  outputs = run(case, mesh)
  rows = check(case, outputs)
  assert agrees(rows), [row for row in rows if not row.ok]
  return outputs


@pytest.mark.parametrize("kind", SMALL)
def test_small_case(small_golden, kind, programs_of_users):
  assert_agrees(Case.load(small_golden(kind)))


@pytest.mark.parametrize("kind", ["forward", "optimizer", "optimizer_bf16", "train", "quantize", "ngram"])
def test_case(golden, kind):
  assert_agrees(Case.load(golden(kind)))


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow), 8])
def test_scores_on_several_devices(golden, devices, programs_of_users):
  """Global phase, kept A, an odd batch, short chunks, hints; within less than `pgolf parity` allows other machines."""
  case = Case.load(golden("ttt"))
  outputs, expected = assert_agrees(case, data_mesh(jax.devices()[:devices])), case.expected
  assert set(outputs) == set(expected)
  np.testing.assert_array_equal(outputs["hint_ids"], expected["hint_ids"])
  np.testing.assert_array_equal(outputs["gate_mask"], expected["gate_mask"])
  np.testing.assert_allclose(outputs["nll"], expected["nll"], atol=2e-5)
  np.testing.assert_allclose(outputs["val_bpb"], expected["val_bpb"], atol=1e-6)
  for name, value in expected.items():
    if name.startswith("params_after/"):
      np.testing.assert_allclose(outputs[name], value, atol=2e-5 * max(np.abs(value).max(), 1e-3), err_msg=name)


@pytest.mark.slow
def test_whole_run(golden):
  assert_agrees(Case.load(golden("e2e")))


def test_caseops(golden, published_tokenizer):
  case = Case.load(golden("caseops"), tokenizer=published_tokenizer)
  assert len(case.expected) > 50
  assert_agrees(case)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 8])
def test_training_curve_on_several_devices(golden, devices):
  """One rank's stream, its micro-batches shared out over devices, clipped by the global norm: the same losses."""
  case = Case.load(golden("train"))
  s = case.settings
  # 16 of the 40 steps: up to and past the first change of length.
  case.__dict__["settings"] = dataclasses.replace(
    s,
    optimizer=dataclasses.replace(s.optimizer, clip_scope="global"),
    train=dataclasses.replace(s.train, stop_step=16),
  )
  losses = run(case, data_mesh(jax.devices()[:devices]))["train_loss"]
  assert len(losses) == 16
  np.testing.assert_allclose(losses, case.expected["train_loss"][:16], atol=1e-4, rtol=0)
