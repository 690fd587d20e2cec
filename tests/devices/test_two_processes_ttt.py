"""Test-time training in two processes of four devices each scores as one process of eight does."""

import sys
from pathlib import Path

import numpy as np
import pytest
from test_two_processes import finish, start_two
from two_process_ttt import evaluate

SCRIPT = Path(__file__).with_name("two_process_ttt.py")


@pytest.mark.slow
def test_scores_and_saved_state_are_the_same(tmp_path):
  one = evaluate(tmp_path / "one")
  first, second = finish(start_two([sys.executable, str(SCRIPT), str(tmp_path / "two")]))
  assert "0 compilations inside the clock" in first
  assert "bits per byte" not in second, "one process speaks for both"
  nll_N = np.load(tmp_path / "two" / "nll.npy")
  np.testing.assert_allclose(nll_N, one.nll_N, rtol=0, atol=1e-5)
  (line,) = (line for line in first.splitlines() if "bits per byte" in line)  # gloo speaks too
  np.testing.assert_allclose(float(line.split()[0]), one.score.bpb, rtol=0, atol=1e-6)
  assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
