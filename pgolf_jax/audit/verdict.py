"""The rules that ship with the package, and the verdict of a list of checks under them."""

import functools
import tomllib
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import NamedTuple

from pgolf_jax.errors import Check


class Rules(NamedTuple):
  """What the challenge asks for."""

  submission_bytes: int  # artifact and code
  training_seconds: float
  evaluation_seconds: float
  required: dict[str, str]  # check that has to hold → the rule that it proves


@functools.cache
def rules() -> Rules:
  """Returns the rules of the challenge."""
  values = tomllib.loads(resources.files("pgolf_jax.audit").joinpath("rules.toml").read_text(encoding="utf-8"))
  return Rules(**values["limits"], required=values["required"])


class Verdict(NamedTuple):
  """What the checks of a run amount to. A rule whose check was not made is not proved."""

  broken: list[str]  # checks that failed
  unproved: dict[str, str]  # required check that was not made → why, and what would prove it

  @property
  def is_legal(self) -> bool:
    """Whether everything that the rules require is proved."""
    return not self.broken and not self.unproved

  def text(self) -> str:
    """Returns the verdict in a few lines."""
    if self.is_legal:
      return "Verdict: legal; everything that the rules require is proved."
    lines = [f"Verdict: {'BROKEN' if self.broken else 'not proved'}."]
    required = rules().required
    lines += [f"  broken: {name}" + (f" ({required[name]})" if name in required else "") for name in self.broken]
    lines += [f"  not proved: {name} ({required[name]}): {why}" for name, why in self.unproved.items()]
    return "\n".join(lines)


def verdict(checks: Sequence[Check], required: Iterable[str] | None = None) -> Verdict:
  """Returns the verdict of all checks of a run; a check may occur several times, once for each run of a set.

  Args:
    checks: as far as they were made.
    required: names of checks that have to hold; those of the rules if not given.
  """
  broken = list(dict.fromkeys(check.name for check in checks if check.passed is False))
  unproved = {}
  for name in rules().required if required is None else required:
    made = [check for check in checks if check.name == name]
    missing = [check.finding for check in made if check.passed is None]
    if missing or not made:
      unproved[name] = missing[0] if missing else "it was not made, because another failed"
  return Verdict(broken, {name: why for name, why in unproved.items() if name not in broken})
