"""Schedules as text: `1024@0.1,3072@1` (length@progress), `0.5@0.9` (factor@progress), `256:16` (length:size), `1,5`.

They are tuples in memory.
"""

import itertools
import math
from typing import NamedTuple

from pgolf_jax.errors import UserError, shown
from pgolf_jax.settings.fields import ChunkStep, LengthStage, Range, ScaleStage


class _Form(NamedTuple):
  """How the items of a schedule are written."""

  joint: str  # between the numbers of an item
  types: tuple[type, ...]  # of these numbers
  ordered_by: int  # the number that must rise from item to item
  pattern: str
  example: str


_FORMS = {
  LengthStage: _Form("@", (int, float), 1, "LENGTH@PROGRESS,…", "1024@0.35"),
  ScaleStage: _Form("@", (float, float), 1, "FACTOR@PROGRESS,…", "0.5@0.9"),
  ChunkStep: _Form(":", (int, int), 0, "LENGTH:SIZE,…", "256:16"),
  int: _Form("", (int,), 0, "NUMBER,…", "1,5,20"),
}


def pattern(kind: type) -> str:
  """Returns how a schedule with items of this type is written, such as LENGTH@PROGRESS,…"""
  return _FORMS[kind].pattern


def as_text(stages: tuple) -> str:
  """Returns a schedule as the text that `parse` reads."""
  return ",".join(_item_as_text(stage) for stage in stages)


def _item_as_text(stage) -> str:
  if not isinstance(stage, tuple):
    return str(stage)
  return _FORMS[type(stage)].joint.join(str(number).removesuffix(".0") for number in stage)


def parse(name: str, text: str, kind: type, within: tuple[Range, ...]) -> tuple:
  """Returns the tuple that a schedule's text stands for; empty for empty text.

  Args:
    name: of the setting, for errors.
    kind: the type of the tuple's items: LengthStage, ScaleStage, ChunkStep or int.
    within: a range for each number of an item.

  Raises:
    UserError: an item does not read as it should, a number is out of range, or the schedule goes backwards.
  """
  stages = tuple(_parse_item(name, item.strip(), kind) for item in text.split(",") if item.strip())
  if kind is int:
    stages = tuple(sorted(stages))
  check(name, stages, within)
  return stages


def check(name: str, stages: tuple, within: tuple[Range, ...]) -> None:
  """Raises UserError if a number of a schedule is out of its range, or if the schedule goes backwards."""
  for stage in stages:
    for number, limits in zip(stage if isinstance(stage, tuple) else (stage,), within, strict=True):
      if not math.isfinite(number):
        raise UserError(f"{name} must be finite, not {shown(number)}.")
      if not limits.holds(number):
        place = f"{as_text(stages)}: {shown(number)}" if isinstance(stage, tuple) or len(stages) > 1 else shown(number)
        raise UserError(f"{name}={place} must be {limits}.")
  if not stages or not isinstance(stages[0], tuple):
    return
  rising = _FORMS[type(stages[0])].ordered_by
  ordered = tuple(sorted(stages, key=lambda stage: stage[rising]))
  if any(a[rising] == b[rising] for a, b in itertools.pairwise(ordered)):
    raise UserError(f"{name}={as_text(stages)} has two stages at the same place; give each a place of its own.")
  if stages != ordered:
    raise UserError(f"{name}={as_text(stages)} goes backwards; in order it is {as_text(ordered)}.")


def _parse_item(name: str, item: str, kind: type):
  form = _FORMS[kind]
  words = item.replace("=", ":").split(form.joint) if form.joint else [item]
  try:
    numbers = [number(word) for number, word in zip(form.types, words, strict=True)]
  except (ValueError, OverflowError):
    each = "a whole number" if kind is int else f"written {form.pattern.removesuffix(',…')}"
    raise UserError(f"{name} has the item {shown(item)}; each must be {each}, as in {form.example}.") from None
  return numbers[0] if kind is int else kind(*numbers)
