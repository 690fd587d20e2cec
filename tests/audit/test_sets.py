"""Checks of several runs, and the words for outcomes."""

import dataclasses

from ttt_case import SETTINGS, changed

from pgolf_jax.audit.evidence import one_config
from pgolf_jax.errors import Check, checks_summary, checks_table
from pgolf_jax.run_folder import RunFolder


def test_runs_of_a_set_share_a_config(tmp_path):
  runs = [RunFolder(tmp_path / str(seed), dataclasses.replace(SETTINGS, seed=seed)) for seed in (1, 2)]
  assert one_config(runs).passed
  other = RunFolder(tmp_path / "other", changed(dataclasses.replace(SETTINGS, seed=3), chunk_size=16))
  assert not one_config([*runs, other]).passed
  again = RunFolder(tmp_path / "again", dataclasses.replace(SETTINGS, seed=2))
  assert not one_config([*runs, again]).passed


def test_outcomes_are_told_apart():
  held, broken, unproved = (Check(name, passed, "why") for name, passed in (("a", True), ("b", False), ("c", None)))
  assert str(checks_table([held, broken, unproved])).splitlines() == [
    "holds     a  why",
    "BROKEN    b  why",
    "unproved  c  why",
  ]
  assert checks_summary([held, held]) == "2 of 2 checks hold"
  assert checks_summary([held, unproved]) == "1 of 2 checks hold; 1 not proved"
  assert checks_summary([held, broken, unproved]) == "1 of 3 checks hold; broken: b; 1 not proved"
