"""The artifact's table of tensors, and which of their arrays lie together in a stream.

A table entry is [form, name, shape, …]:

  ["half", name, shape]                      fp16 of any shape
  ["rows", name, [M, N]]                     int8 with a step per row
  ["grid", name, [M, N], wide, low_rank]     int8 on the rows' grids;
      wide: null or [columns of a group, [first columns]]; low_rank: null or [rank, steps of A, steps of B]

Arrays of one kind share statistics, so that they share a stream: the integers of a kind of matrix over all layers; all
steps; large fp16 parameters by kind, the others together.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

from pgolf_jax.errors import ArtifactError
from pgolf_jax.quantize.artifact.codecs import Content
from pgolf_jax.quantize.artifact.names import kind
from pgolf_jax.quantize.artifact.tensors import Grid, Half, LowRank, Quantized, Rows

_LARGE = 4096  # fp16 values of one kind from which on they get a stream of their own
_MAX_SIDE = 1 << 20  # rows or columns of a grid
_MAX_RANK = 64  # of a correction
_MAX_DIMENSIONS = 4
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,99}")

Entry = list
Array = tuple[str, str, tuple[int, ...]]
"""(tensor, field of its dataclass with a dot for a nested one, shape)."""


@dataclasses.dataclass(frozen=True)
class Stream:
  name: str
  content: Content
  arrays: list[Array]


def describe(name: str, tensor: Quantized) -> Entry:
  """The table entry of a tensor."""
  match tensor:
    case Half():
      return ["half", name, list(tensor.values.shape)]
    case Rows():
      return ["rows", name, list(tensor.q_MxN.shape)]
    case Grid():
      low = tensor.low_rank
      wide = [tensor.wide_size, list(tensor.wide_starts)] if tensor.wide_starts else None
      low_rank = None if low is None else [low.b_RxN.shape[0], low.a_scale.size, low.b_scale.size]
      return ["grid", name, list(tensor.q_MxN.shape), wide, low_rank]


def split(table: list[Entry]) -> list[Stream]:
  """All arrays of the table's tensors, each in one stream; empty streams are left out."""
  found: dict[tuple[str, Content], list[Array]] = {}

  def add(stream: str, content: Content, *array) -> None:
    found.setdefault((stream, content), []).append(array)

  half_size: dict[str, int] = {}
  for form, name, shape, *_ in table:
    if form == "half":
      half_size[kind(name)] = half_size.get(kind(name), 0) + math.prod(shape)
  for form, name, shape, *more in table:
    shape = tuple(shape)
    if form == "half":
      large = half_size[kind(name)] >= _LARGE
      add(f"half/{kind(name)}" if large else "half", "half", name, "values", shape)
      continue
    if form == "rows":
      add("gates", "small", name, "q_MxN", shape)
      add("steps", "half", name, "scale_M", shape[:1])
      continue
    wide, low_rank = more
    add(f"grid/{kind(name)}", "grid", name, "q_MxN", shape)
    add("steps", "half", name, "scale_M", shape[:1])
    if wide is not None:
      add("steps", "half", name, "wide_scale_M", shape[:1])
    if low_rank is not None:
      rank, a_steps, b_steps = low_rank
      add("low_rank/a", "small", name, "low_rank.a_MxR", (shape[0], rank))
      add("low_rank/b", "small", name, "low_rank.b_RxN", (rank, shape[1]))
      add("low_rank/steps", "half", name, "low_rank.a_scale", (a_steps,))
      add("low_rank/steps", "half", name, "low_rank.b_scale", (b_steps,))
  return [Stream(name, content, arrays) for (name, content), arrays in sorted(found.items())]


def part(tensor: Quantized, field: str) -> np.ndarray:
  """The array that an `Array`'s field names."""
  for step in field.split("."):
    tensor = getattr(tensor, step)
  return tensor


def assemble(entry: Entry, found: Mapping[tuple[str, str], np.ndarray]) -> Quantized:
  """The tensor of a checked entry out of the decoded arrays by (tensor, field)."""
  form, name, _, *more = entry
  if form == "half":
    return Half(found[name, "values"])
  if form == "rows":
    return Rows(found[name, "q_MxN"], found[name, "scale_M"])
  wide, low_rank = more
  size, starts = (0, []) if wide is None else wide
  correction = None
  if low_rank is not None:
    correction = LowRank(*(found[name, f"low_rank.{f.name}"] for f in dataclasses.fields(LowRank)))
  wide_scale_M = None if wide is None else found[name, "wide_scale_M"]
  return Grid(found[name, "q_MxN"], found[name, "scale_M"], tuple(starts), size, wide_scale_M, correction)


def parameter_count(entry: Entry) -> int:
  """Values that the entry's arrays hold in all, steps and factors included."""
  return sum(math.prod(shape) for stream in split([entry]) for *_, shape in stream.arrays)


def check_entry(entry: object) -> None:
  """Raises ArtifactError unless the entry is one that `describe` could have made."""

  def number(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high

  def require(condition: bool, what: str) -> None:
    if not condition:
      raise ArtifactError(f"The artifact's table has {what}: it is damaged.")

  require(isinstance(entry, list) and len(entry) >= 3, "an entry of the wrong type")
  form, name, shape, *more = entry
  require(isinstance(name, str) and _NAME.fullmatch(name) is not None, "an impossible name")
  require(isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS, f"an impossible shape for {name}")
  require(all(number(size, 1, 2**28) for size in shape), f"an impossible shape for {name}")
  if form == "half":
    require(not more, f"too much to say of {name}")
    return
  require(len(shape) == 2, f"an impossible shape for {name}")
  if form == "rows":
    require(not more, f"too much to say of {name}")
    return
  require(form == "grid" and len(more) == 2, f"an unknown form for {name}")
  require(max(shape) <= _MAX_SIDE, f"an impossible shape for {name}")
  (rows, columns), (wide, low_rank) = shape, more
  if wide is not None:
    require(isinstance(wide, list) and len(wide) == 2 and isinstance(wide[1], list), f"odd groups for {name}")
    size, starts = wide
    require(number(size, 1, columns) and 0 < len(starts) <= columns, f"odd groups for {name}")
    require(all(number(start, 0, columns - size) for start in starts), f"odd groups for {name}")
    require(all(a + size <= b for a, b in itertools.pairwise(starts)), f"odd groups for {name}")
  if low_rank is not None:
    require(isinstance(low_rank, list) and len(low_rank) == 3, f"odd factors for {name}")
    rank, a_steps, b_steps = low_rank
    require(number(rank, 1, min(rows, columns, _MAX_RANK)) and a_steps in (1, rows), f"odd factors for {name}")
    require(number(b_steps, 1, rank * columns) and rank * columns % b_steps == 0, f"odd factors for {name}")
    require(type(a_steps) is int, f"odd factors for {name}")
