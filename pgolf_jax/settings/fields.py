"""What is known of a setting: its default, its environment name, the values it can have, and what it means."""

import dataclasses
import typing
from collections.abc import Iterator
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Range:
  """The numbers that a setting can have."""

  low: float
  high: float
  above: bool = False  # whether `low` itself is left out
  below: bool = False  # whether `high` itself is left out

  def holds(self, number: float) -> bool:
    """Returns whether a number is in the range; what is not a number is not."""
    return (self.low < number if self.above else self.low <= number) and (
      number < self.high if self.below else number <= self.high
    )

  def __str__(self) -> str:
    low, high = _number(self.low), _number(self.high)
    least = f"above {low}" if self.above else f"{low} or more"
    if self.high >= UNBOUNDED:
      return least
    if self.above or self.below:
      return f"{least} and {'below' if self.below else 'at most'} {high}"
    return f"from {low} to {high}"


def _number(number: float) -> str:
  return f"{number:,}" if isinstance(number, int) else f"{number:g}"


UNBOUNDED = 2**31 - 1
"""A limit that is only there because computers have one, so that no message names it."""

COUNT = Range(1, 2**20)
INDEX = Range(0, UNBOUNDED)
LENGTH = Range(1, UNBOUNDED)
WIDTH = Range(1, 2**16)
BITS = Range(2, 8)
SHARE = Range(0, 1)
PROPER_SHARE = Range(0, 1, above=True)
DECAY = Range(0, 1, below=True)
RATE = Range(0, 1000)
NOT_NEGATIVE = Range(0, UNBOUNDED)
POSITIVE = Range(0, UNBOUNDED, above=True)


def setting(
  default: object,
  env: str | None,
  within: Range | tuple[Range, ...] | None,
  meaning: str,
  flat: str | None = None,
):
  """Returns a dataclass field that is a setting.

  Args:
    default: its value in the record run.
    env: the environment variable that sets it too.
    within: of a number its range; of a schedule a range for each number of an item; None for other kinds.
    meaning: one sentence without its full stop.
    flat: the name that it had directly under its top section, before sections were nested; files may use it.
  """
  return dataclasses.field(default=default, metadata={"env": env, "within": within, "meaning": meaning, "flat": flat})


class LengthStage(NamedTuple):
  """A stage of the sequence-length schedule, written `1024@0.1`."""

  seq_len: int  # tokens
  until: float  # last progress of the stage, in (0, 1]


class ScaleStage(NamedTuple):
  """A stage of a schedule of factors, written `0.5@0.9`."""

  scale: float
  at: float  # first progress of the stage


class ChunkStep(NamedTuple):
  """The chunk size for documents up to a length, written `256:16`."""

  longest: int  # tokens of the longest document of a batch, both bos counted
  size: int  # targets of a chunk


class Entry(NamedTuple):
  """A setting, as `every_setting` finds it."""

  path: tuple[str, ...]  # such as ("ttt", "lora", "rank")
  kind: object  # its type
  default: object
  env: str | None
  within: Range | tuple[Range, ...] | None
  meaning: str
  flat: str | None

  @property
  def name(self) -> str:
    """The dotted name, such as ttt.lora.rank."""
    return ".".join(self.path)


def every_setting(section: type, path: tuple[str, ...] = ()) -> Iterator[Entry]:
  """Yields the settings of a section and of the sections in it, in the order of the dataclasses."""
  hints = typing.get_type_hints(section)
  for field in dataclasses.fields(section):
    kind = hints[field.name]
    if dataclasses.is_dataclass(kind):
      yield from every_setting(kind, (*path, field.name))
    else:
      yield Entry((*path, field.name), kind, field.default, **field.metadata)
