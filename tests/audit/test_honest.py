"""Honest evaluations: every check of the scores holds."""

import pytest
from case import CACHED, DATA, REFERENCE, STRICT, Run
from ttt_case import random_documents

from pgolf_jax.errors import checks_table

LONG = random_documents([40, 131, 52, 77])  # longer than a window, or than the ring of keys and values


@pytest.mark.parametrize(
  ("settings", "data"),
  [(STRICT, DATA), (REFERENCE, DATA), (STRICT, LONG), (CACHED, LONG)],
  ids=["strict", "reference", "exact", "cached"],
)
def test_an_honest_evaluation_is_clean(settings, data, tmp_path):
  run = Run(settings, data)
  checks = list(run.checks(tmp_path, run.score(tmp_path)))
  broken = [check for check in checks if check.passed is False]
  assert broken == [], checks_table(checks)
  unproved = [check.name for check in checks if check.passed is None]
  assert unproved == (["one order explains every score"] if settings is REFERENCE else [])
