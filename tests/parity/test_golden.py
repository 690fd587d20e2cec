"""Golden cases of the PyTorch reference, through the code of `pgolf parity`, within the agreement check.py states."""

import dataclasses

import jax
import numpy as np
import pytest

from pgolf_jax.parity.case import Case
from pgolf_jax.parity.check import check, check_caseops, table
from pgolf_jax.parity.run import _train, run, run_caseops


def assert_agrees(case, ours):
  rows = check(case, ours)
  assert rows and all(row.ok for row in rows), "\n" + table(rows)


@pytest.mark.parametrize("kind", ["forward", "optimizer", "optimizer_bf16", "train", "quantize", "ngram", "ttt"])
def test_case(golden, kind):
  case = Case.load(golden(kind))
  assert_agrees(case, run(case))


def test_caseops(golden, published_tokenizer):
  import json

  case = Case.load(golden("caseops"))
  expected = [json.loads(line) for line in (case.folder / "expected.jsonl").read_text().splitlines()]
  rows = check_caseops(run_caseops(case, published_tokenizer), expected)
  assert len(expected) > 50 and all(row.ok for row in rows), "\n" + table(rows)


@pytest.mark.parametrize("devices", [2, 8])
def test_training_curve_on_several_devices(golden, devices, monkeypatch):
  """One rank's stream, its micro-batches shared out over devices, clipped by the global norm: the same losses."""
  from pgolf_jax.parity import run as module

  case = Case.load(golden("train"))
  s = case.settings
  s = dataclasses.replace(
    s,
    optimizer=dataclasses.replace(s.optimizer, clip_scope="global"),
    train=dataclasses.replace(s.train, iterations=16),
  )
  # The curve is followed up to and past the first change of length; the schedule keeps its 40 steps.
  s = dataclasses.replace(s, train=dataclasses.replace(s.train, iterations=40, stop_step=16))
  monkeypatch.setitem(case.__dict__, "settings", s)
  monkeypatch.setattr(module, "_one_device", lambda: module.data_mesh(jax.devices()[:devices]))
  losses = _train(case)["train_loss"]
  assert len(losses) == 16
  np.testing.assert_allclose(losses, case.expected["train_loss"][:16], atol=1e-4, rtol=0)
