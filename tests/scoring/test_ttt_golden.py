"""Test-time training against the PyTorch reference: global phase, kept A, an odd batch, short chunks, hints."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from pgolf_jax.parity.run import run_case
from pgolf_jax.runtime.distributed import data_mesh
from pgolf_jax.settings.load import from_env


@pytest.fixture(scope="module")
def case(golden):
  folder = golden("ttt")
  settings = from_env(json.loads((folder / "case.json").read_text())["settings"])
  return settings, load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow), 8])
def test_agrees_with_the_reference(case, devices):
  settings, inputs, expected = case
  found = run_case(settings, inputs, data_mesh(jax.devices()[:devices]))
  assert set(found) == set(expected)
  np.testing.assert_array_equal(found["hint_ids"], expected["hint_ids"])
  np.testing.assert_array_equal(found["gate_mask"], expected["gate_mask"])
  np.testing.assert_allclose(found["nll"], expected["nll"], atol=2e-5)
  np.testing.assert_allclose(found["val_bpb"], expected["val_bpb"], atol=1e-6)
  for name, value in expected.items():
    if name.startswith("params_after/"):
      np.testing.assert_allclose(found[name], value, atol=2e-5 * max(np.abs(value).max(), 1e-3), err_msg=name)
