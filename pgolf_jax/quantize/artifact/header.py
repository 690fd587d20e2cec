"""What an artifact's header says: where the artifact comes from, and the table of its tensors.

A table entry is [form, name, shape, …]:

  ["half", name, shape]                      fp16 of any shape
  ["rows", name, [M, N]]                     int8 with a step per row
  ["grid", name, [M, N], fine, low_rank]     int8 on the grids of the rows;
      fine: null or [columns of a group, [first columns]]; low_rank: null or [rank, steps of A, steps of B]
  ["log", name, [M, N], trellis]             integers with steps by row and column; trellis: whether flags say which
      rows and columns are under one
  ["even", name, shape, step]                integers of any shape on one step

Arrays of one kind share statistics and therefore a stream: the integers of one kind of matrix from all layers; all
steps; large fp16 parameters by kind; all other fp16 parameters; all small parameters that are integers.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

from pgolf_jax.errors import ArtifactError
from pgolf_jax.quantize.artifact.codecs import Content
from pgolf_jax.quantize.artifact.codecs.integers import Steps
from pgolf_jax.quantize.artifact.tensors import (
  BANKS,
  MAX_STEP,
  Even,
  Grid,
  Half,
  LogGrid,
  LowRank,
  Quantized,
  Rows,
  kind,
)
from pgolf_jax.settings.check import MAX_PARAMETERS

_LARGE = 4096  # fp16 values; a kind with at least as many gets a stream of its own
_MAX_SIDE = 1 << 20  # rows or columns of a grid
_MAX_LOG_SIDE = 1 << 18  # with steps by row and column
_MAX_RANK = 64  # of a correction
_MAX_DIMENSIONS = 4
_NAME = re.compile(r"(?!blocks\.)[A-Za-z_][A-Za-z0-9_.]{0,99}|blocks\.(0|[1-9][0-9]{0,3})\.[A-Za-z0-9_.]{1,88}")

_HASH = re.compile(r"[0-9a-f]{64}|")
_MOST_PIECES = 1 << 16
_LONGEST = 200  # characters


@dataclasses.dataclass(frozen=True)
class Origin:
  """What made an artifact. What is not known, as of artifacts of format version 1, is empty or 0; hashes are SHA-256.

  Attributes:
    pgolf_jax, jax: versions.
    pieces: of the tokenizer.
    tokenizer: hash of the tokenizer's model.
    data: which text, in words.
    manifest: hash of the data folder's manifest.
    validation: hash of the tokens of its validation split.
  """

  pgolf_jax: str = ""
  jax: str = ""
  pieces: int = 0
  tokenizer: str = ""
  data: str = ""
  manifest: str = ""
  validation: str = ""

  def to_json(self) -> dict:
    """Returns what is known, by name."""
    return {name: value for name, value in dataclasses.asdict(self).items() if value}

  @classmethod
  def from_json(cls, fields: object) -> "Origin":
    """Inverse of `to_json`.

    Raises:
      ArtifactError: the fields are not such as `to_json` returns.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(fields, dict) or not fields.keys() <= known:
      raise ArtifactError("What the artifact says of its origin has unknown parts: it is damaged.")
    for name, value in fields.items():
      if name == "pieces":
        is_right = type(value) is int and 0 < value <= _MOST_PIECES
      elif name in ("tokenizer", "manifest", "validation"):
        is_right = isinstance(value, str) and bool(_HASH.fullmatch(value))
      else:
        is_right = isinstance(value, str) and len(value) <= _LONGEST and value.isprintable()
      if not is_right:
        raise ArtifactError(f"What the artifact says of its origin has an impossible {name}: it is damaged.")
    return cls(**fields)


UNKNOWN = Origin()
"""Of an artifact that says nothing of it."""


Entry = list
"""One line of the table, as JSON has it."""

Array = tuple[str, str, tuple[int, ...]]
"""(tensor, field of its dataclass, with a dot for a nested one, shape)."""


@dataclasses.dataclass(frozen=True)
class Stream:
  name: str
  content: Content
  arrays: list[Array]


def describe(name: str, tensor: Quantized) -> Entry:
  """Returns the table entry of a tensor."""
  match tensor:
    case Half():
      return ["half", name, list(tensor.values.shape)]
    case Rows():
      return ["rows", name, list(tensor.q_MxN.shape)]
    case Grid():
      factors = tensor.low_rank
      fine = [tensor.fine_size, list(tensor.fine_starts)] if tensor.fine_starts else None
      low_rank = None if factors is None else [factors.b_RxN.shape[0], factors.a_step.size, factors.b_step.size]
      return ["grid", name, list(tensor.q_MxN.shape), fine, low_rank]
    case LogGrid():
      return ["log", name, list(tensor.q_MxN.shape), tensor.trellis_N is not None]
    case Even():
      return ["even", name, list(tensor.q.shape), int(tensor.step)]


def split(table: list[Entry]) -> list[Stream]:
  """Returns all arrays of the table's tensors, each in one stream; empty streams are left out."""
  arrays: dict[tuple[str, Content], list[Array]] = {}

  def add(stream: str, content: Content, *array) -> None:
    arrays.setdefault((stream, content), []).append(array)

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
      add("steps", "half", name, "step_M", shape[:1])
      continue
    if form == "even":
      add("small", "integers", name, "q", shape)
      continue
    if form == "log":
      add(f"matrix/{kind(name)}", "matrix", name, "q_MxN", shape)
      add("steps/log", "integers", name, "column_N", shape[1:])
      add("steps/log", "integers", name, "row_M", shape[:1])
      if more[0]:
        add("steps/log", "integers", name, "trellis_N", shape[1:])
        add("steps/log", "integers", name, "trellis_M", shape[:1])
      continue
    fine, low_rank = more
    add(f"grid/{kind(name)}", "grid", name, "q_MxN", shape)
    add("steps", "half", name, "step_M", shape[:1])
    if fine is not None:
      add("steps", "half", name, "fine_step_M", shape[:1])
    if low_rank is not None:
      rank, a_steps, b_steps = low_rank
      add("low_rank/a", "small", name, "low_rank.a_MxR", (shape[0], rank))
      add("low_rank/b", "small", name, "low_rank.b_RxN", (rank, shape[1]))
      add("low_rank/steps", "half", name, "low_rank.a_step", (a_steps,))
      add("low_rank/steps", "half", name, "low_rank.b_step", (b_steps,))
  return [Stream(name, content, members) for (name, content), members in sorted(arrays.items())]


def field_of(tensor: Quantized, field: str) -> np.ndarray:
  """Returns the array that an `Array`'s field names."""
  for name in field.split("."):
    tensor = getattr(tensor, name)
  return tensor


def assemble(entry: Entry, arrays: Mapping[tuple[str, str], np.ndarray]) -> Quantized:
  """Returns the tensor of a checked entry, from decoded arrays by (tensor, field)."""
  form, name, _, *more = entry
  if form == "half":
    return Half(arrays[name, "values"])
  if form == "rows":
    return Rows(arrays[name, "q_MxN"], arrays[name, "step_M"])
  if form == "log":
    steps = Steps(*(arrays.get((name, field)) for field in Steps._fields))
    flags = (None if array is None else array.astype(bool) for array in (steps.trellis_N, steps.trellis_M))
    return LogGrid(arrays[name, "q_MxN"], steps.row_M, steps.column_N, *flags)
  if form == "even":
    return Even(arrays[name, "q"], *more)
  fine, low_rank = more
  size, starts = (0, []) if fine is None else fine
  correction = None
  if low_rank is not None:
    correction = LowRank(*(arrays[name, f"low_rank.{f.name}"] for f in dataclasses.fields(LowRank)))
  fine_step_M = None if fine is None else arrays[name, "fine_step_M"]
  return Grid(arrays[name, "q_MxN"], arrays[name, "step_M"], tuple(starts), size, fine_step_M, correction)


def least_version(table: list[Entry]) -> int:
  """Returns the first format version that knows all forms of the table."""
  return 3 if any(form in ("log", "even") for form, *_ in table) else 1


def parameter_count(entry: Entry) -> int:
  """Returns the number of values in all of the entry's arrays, steps and factors included."""
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
  require(name not in BANKS, "a whole bank, which is stored by its matrices")
  require(isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS, f"an impossible shape for {name}")
  least = 0 if form in ("half", "even") else 1  # a model of one layer has no skips, and [0, D] of their weights
  require(all(number(size, least, MAX_PARAMETERS) for size in shape), f"an impossible shape for {name}")
  # An array without values must be one that NumPy can make; others are bounded by their number.
  require(all(shape) or math.prod(filter(None, shape)) <= MAX_PARAMETERS, f"an impossible shape for {name}")
  if form == "half":
    require(not more, f"too many fields for {name}")
    return
  if form == "even":
    require(len(more) == 1 and number(more[0], -2 * MAX_STEP, 2 * MAX_STEP), f"an impossible step for {name}")
    return
  require(len(shape) == 2, f"an impossible shape for {name}")
  if form == "rows":
    require(not more, f"too many fields for {name}")
    return
  if form == "log":
    require(len(more) == 1 and type(more[0]) is bool, f"an odd trellis for {name}")
    require(max(shape) <= _MAX_LOG_SIDE, f"an impossible shape for {name}")
    return
  require(form == "grid" and len(more) == 2, f"an unknown form for {name}")
  require(max(shape) <= _MAX_SIDE, f"an impossible shape for {name}")
  (rows, columns), (fine, low_rank) = shape, more
  if fine is not None:
    require(isinstance(fine, list) and len(fine) == 2 and isinstance(fine[1], list), f"odd groups for {name}")
    size, starts = fine
    require(number(size, 1, columns) and 0 < len(starts) <= columns, f"odd groups for {name}")
    require(all(number(start, 0, columns - size) for start in starts), f"odd groups for {name}")
    require(all(a + size <= b for a, b in itertools.pairwise(starts)), f"odd groups for {name}")
  if low_rank is not None:
    require(isinstance(low_rank, list) and len(low_rank) == 3, f"odd factors for {name}")
    rank, a_steps, b_steps = low_rank
    require(number(rank, 1, min(rows, columns, _MAX_RANK)) and a_steps in (1, rows), f"odd factors for {name}")
    require(number(b_steps, 1, rank * columns) and rank * columns % b_steps == 0, f"odd factors for {name}")
    require(type(a_steps) is int, f"odd factors for {name}")
