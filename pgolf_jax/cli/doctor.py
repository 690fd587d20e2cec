"""The verb `pgolf doctor`."""

import dataclasses
import json
import textwrap
from collections.abc import Iterable

from pgolf_jax.tables import page_width


def doctor(seconds: float = 60.0, json: bool = False) -> int:
  """Show what is here of all that pgolf needs: versions, devices, drivers, caches, data; and how to repair what is not.

  Exit status 1 if something does not work; warnings and what is optional do not count. Devices are asked in a process
  of their own, so a broken one costs the seconds given here and no more.

  Example: pgolf doctor

  Args:
    seconds: that JAX gets to show its devices.
    json: print the findings as JSON, one list of objects.
  """
  from pgolf_jax import doctor as examination
  from pgolf_jax.errors import UserError

  if not seconds > 0:
    raise UserError(f"--seconds {seconds:g} must be above 0; 60 is usual.")
  findings = []
  for finding in examination.examine(seconds=seconds):
    findings.append(finding)
    if not json:
      _show(finding, is_first=len(findings) == 1 or findings[-2].part != finding.part)
  if json:
    print(_as_json(findings))
  else:
    print("\n" + "\n".join(textwrap.wrap(_summary(findings), page_width())))
  return int(any(finding.state == "fail" for finding in findings))


_MARKS = {"ok": "ok", "note": "note", "warn": "WARN", "fail": "FAIL"}
_NAME = 22


def _show(finding, *, is_first: bool) -> None:
  """Prints one finding, folded to the terminal, under the heading of its part."""
  width = page_width()
  if is_first:
    print(f"{finding.part}")
  wide = width >= 60
  indent = " " * (7 + _NAME if wide else 4)
  head = f"  {_MARKS[finding.state]:<4} " + (f"{finding.name:<{_NAME}}" if wide else f"{finding.name}: ")
  text = head + finding.finding
  print("\n".join(textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False, drop_whitespace=True)))
  if finding.mend:
    mend = textwrap.wrap(f"→ {finding.mend}", width, initial_indent=indent, subsequent_indent=f"{indent}  ",
                         break_on_hyphens=False, break_long_words=False)  # fmt: skip
    print("\n".join(mend), flush=True)


def _summary(findings: Iterable) -> str:
  states = [finding.state for finding in findings]
  failed, warned = states.count("fail"), states.count("warn")
  if failed:
    badly = f", {warned} could be better" if warned else ""
    return f"{failed} of {len(states)} do not work{badly}; the lines after → say what to do."
  if warned:
    return f"Everything works; {warned} of {len(states)} could be better."
  return f"Everything works ({len(states)} looked at)."


def _as_json(findings: Iterable) -> str:
  return json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2)


COMMANDS = {"doctor": {"": doctor}}
