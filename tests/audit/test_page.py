"""docs/audit.md says what the audit checks, and which cheats it is tested against."""

from pathlib import Path

import test_cheating_evaluators
import test_cheating_programs
import test_lying_folders

from pgolf_jax.audit.verdict import rules, verdict
from pgolf_jax.errors import Check

PAGE = (Path(__file__).parents[2] / "docs" / "audit.md").read_text(encoding="utf-8")
EVALUATORS = [*test_cheating_evaluators.SHARED, *test_cheating_evaluators.LEARNING, *test_cheating_programs.CHEATS]
FOLDERS = [lie for lies in test_lying_folders.THOROUGH.values() for lie in lies]


def test_every_rule_stands_on_the_page():
  assert [name for name in rules().required if name not in PAGE] == []


def test_every_cheat_stands_on_the_page():
  names = [cheat.__name__.replace("_", " ") for cheat in [*EVALUATORS, *FOLDERS]]
  assert [name for name in names if name not in PAGE] == []
  planted = len(EVALUATORS) + len(FOLDERS) + len(test_lying_folders.FILES) + 1
  assert f"{planted} cheats and lies are planted" in PAGE


def test_a_verdict_needs_every_check_that_the_rules_require():
  held = [Check(name, True, "") for name in rules().required]
  assert verdict(held).is_legal
  for i, check in enumerate(held):
    missing, broken = verdict(held[:i] + held[i + 1 :]), verdict([*held, Check(check.name, False, "")])
    unproved = verdict([*held, Check(check.name, None, "not checked: …")])
    assert not missing.is_legal and check.name in missing.unproved
    assert not unproved.is_legal and check.name in unproved.unproved and check.name in unproved.text()
    assert not broken.is_legal and check.name in broken.broken and "BROKEN" in broken.text()
  assert not verdict([*held, Check("another check", False, "")]).is_legal
