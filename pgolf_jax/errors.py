"""What the program tells a person: errors that they can put right, and the outcomes of checks."""

import dataclasses
import signal
from collections.abc import Mapping, Sequence


class UserError(Exception):
  """Something the user can put right. The message is one sentence: what was wrong, and what to do."""


class ArtifactError(UserError):
  """An artifact that cannot be read or made; the message says what is wrong with it."""


class Stopped(Exception):
  """A run that a signal ended after its work was saved.

  Args:
    signum: the signal's number.
    where: what was saved, such as "step 120"; the same command continues after it.
  """

  def __init__(self, signum: int, where: str):
    super().__init__(f"stopped by {signal.Signals(signum).name} after {where}; the same command continues there.")
    self.status = 128 + signum


@dataclasses.dataclass(frozen=True)
class Check:
  """The outcome of one check."""

  name: str
  passed: bool | None  # None: neither proved nor refuted
  finding: str  # the evidence, or why nothing is proved and what would prove it


def checks_table(checks: Sequence[Check]) -> str:
  """Returns one line per check: whether it holds, and the evidence."""
  words = {True: "holds", False: "BROKEN", None: "unproved"}
  width = max(len(check.name) for check in checks)
  return "\n".join(f"{words[check.passed]:<8} {check.name:<{width}}  {check.finding}" for check in checks)


def checks_summary(checks: Sequence[Check]) -> str:
  """Returns one line: how many checks hold, which are broken, and how many are not proved."""
  broken = [check.name for check in checks if check.passed is False]
  unproved = sum(check.passed is None for check in checks)
  parts = [f"{len(checks) - len(broken) - unproved} of {len(checks)} checks hold"]
  if broken:
    parts.append(f"broken: {', '.join(broken)}")
  if unproved:
    parts.append(f"{unproved} not proved")
  return "; ".join(parts)


def shown(value: object) -> str:
  """Returns what a value looks like in a message: its beginning, on one line, without Python's quotes."""
  if isinstance(value, bool):
    return str(value).lower()
  if value is None:
    return "nothing"
  if isinstance(value, Mapping | list | tuple | set):
    return "a table" if isinstance(value, Mapping) else "a list"
  try:
    text = str(value)
  except ValueError:  # a whole number of thousands of digits
    return "a number too long to show"
  text = "".join(c if c.isprintable() else " " for c in text[:101])
  if isinstance(value, str) and (not text.strip() or " " in text):
    return f'"{text[:100]}…"' if len(text) > 100 else f'"{text}"'
  return text if len(text) <= 100 else f"{text[:100]}…"
