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
  rows = check(case, run(case, mesh))
  assert agrees(rows), [row for row in rows if not row.ok]
  return rows


@pytest.mark.parametrize("kind", SMALL)
def test_small_case(small_golden, kind, programs_of_users):
  assert_agrees(Case.load(small_golden(kind)))


@pytest.mark.parametrize("kind", ["forward", "optimizer", "optimizer_bf16", "train", "quantize", "ngram", "ttt"])
def test_case(golden, kind):
  assert_agrees(Case.load(golden(kind)))


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_scores_on_several_devices(golden, devices):
  """Global phase, kept A, an odd batch, short chunks, hints."""
  assert_agrees(Case.load(golden("ttt")), data_mesh(jax.devices()[:devices]))


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
