"""The kernels of a compiled program, read from its optimised HLO: what each one is, and the bytes it reads and writes.

A kernel reads each of its arrays once and writes each result once, unless it reads only slices of it or updates it in
place; caches are not thought of. On TPUs arrays are as large as the tiles that they fill, and those that lie in the
chip's own memory count nothing.
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from pgolf_jax.plan.compiled import CHAIN, KINDS

LAYER = "layer"
"""The `jax.named_scope` under which the model computes a use of a layer."""

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d\w*)?)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"(ENTRY )?%([^\s]+) \(.*\{$")
_NAMED = re.compile(r"\s+(ROOT )?%([^\s]+) = ")
_OPERAND = re.compile(r"%([^\s,()]+)")
_PARENTHESIS = re.compile(r"[()]")
_TILE = re.compile(r"T\((\d+)(?:,(\d+))?\)")
_IN_LAYER = re.compile(rf"(?<!\w){LAYER}(?!\w)")
_FUNCTION = re.compile(r"(\w+)\)*(?:/(?:kernel|pallas_call|mpmd_map))*$")

# No kernel: they name memory, or say in what order things are done.
_NOTHING = frozenset((
  "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "add-dependency", "opt-barrier",
  "partition-id", "replica-id", "domain", "iota", "rng-get-and-update-state",
))  # fmt: skip
_MOVES = frozenset((
  "bitcast", "broadcast", "concatenate", "copy", "dynamic-slice", "dynamic-update-slice", "pad", "reshape", "reverse",
  "slice", "transpose",
))  # fmt: skip
_CHANGES = {"dynamic-update-slice": 1, "scatter": 2}  # what changes their first operand in place: which operand that is
_PREFETCHES = frozenset(("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start"))
_SAME_ELEMENTS = frozenset(("bitcast", "reshape", "convert", "copy", "transpose", "negate"))
# Targets of calls that start nothing: they name memory, or say what is known of it.
_NO_CALLS = frozenset((
  "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveDone", "AsyncCollectiveStart", "ConcatBitcast",
  "GatherScatterIndicesBitpacked", "Sharding",
))  # fmt: skip
_PALLAS = re.compile(r"mosaic_gpu\w*|tpu_custom_call")
_LIBRARY_PRODUCT = re.compile(r"gemm|matmul|__cudnn|[Cc]onv")


class Array(NamedTuple):
  """An array of a program: its dimensions, and the bytes that it takes in the device's memory."""

  dims: tuple[int, ...]
  bytes: int

  @property
  def elements(self) -> int:
    return math.prod(self.dims)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    arrays: the results.
    operands: names of instructions of the same computation.
    literal: what stands between the parentheses, such as a parameter's number.
    attributes: what follows them.
  """

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  literal: str
  attributes: str
  is_root: bool

  @property
  def bytes(self) -> int:
    return sum(array.bytes for array in self.arrays)

  def named(self, attribute: str) -> str | None:
    """The computation, or the quoted text, that an attribute gives."""
    match = re.search(rf'\b{attribute}=(?:%([^\s,}}]+)|"([^"]*)")', self.attributes)
    return match and (match[1] or match[2])

  @property
  def origin(self) -> str:
    """JAX's names for the place that it comes from; empty where XLA made it."""
    return self.named("op_name") or ""

  @property
  def target(self) -> str:
    """What a custom call calls; empty for all else."""
    return self.named("custom_call_target") or ""


Computation = dict[str, Instruction]


class Kernel(NamedTuple):
  """A kernel of a program.

  Attributes:
    kind: its class: `products`, `elementwise`, `reductions`, `copies`, `prefetches` (copies that run beside other
      work), `gathers and scatters`, a collective's name, `kernel NAME` for Pallas kernels, `call TARGET` for other
      library calls.
    times: how often a run of the program starts it.
    read, written: bytes, each time.
    flops: of matrix products, each time; 0 for Pallas kernels.
    is_layer: whether most of it comes from a use of a layer.
    inputs: dimensions of what it reads.
  """

  kind: str
  times: int
  read: int
  written: int
  flops: float
  is_layer: bool
  inputs: tuple[tuple[int, ...], ...]


class Program(NamedTuple):
  """A program's kernels.

  Attributes:
    unknown_loops: loops whose number of turns the compiler does not say; they count as one turn.
  """

  kernels: tuple[Kernel, ...]
  unknown_loops: int


def read(text: str, *, is_tpu: bool = False) -> Program:
  """Returns the kernels of compiled HLO text (`Compiled.as_text()`).

  A branch counts as the one that moves most bytes; what a loop does counts as often as the compiler says it turns.

  Args:
    is_tpu: memory spaces other than 0 are the chip's own.
  """
  computations, entry = _computations(text, is_tpu)
  walk = _Walk(computations)
  return Program(tuple(walk.kernels(entry, 1)), len(walk.unknown_loops))


def _computations(text: str, is_tpu: bool) -> tuple[dict[str, Computation], str]:
  lines: dict[str, list[str]] = {}
  entry, current = "", None
  for line in text.split("\n"):
    if line.startswith(("%", "ENTRY")) and (head := _HEAD.match(line)):
      current = lines[head[2]] = []
      entry = head[2] if head[1] else entry
    elif line == "}" or line.startswith("}, execution_thread"):
      current = None
    elif current is not None and _NAMED.match(line):
      current.append(line)
    elif current:
      current[-1] += line  # attributes that run over several lines
  return {name: {i.name: i for i in (_instruction(line, is_tpu) for line in lines[name])} for name in lines}, entry


def _instruction(line: str, is_tpu: bool) -> Instruction:
  named = _NAMED.match(line)
  rest = line[named.end() :]
  kind_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  opening = rest.index("(", kind_end)
  closing = _closing(rest, opening)
  literal = rest[opening + 1 : closing]
  return Instruction(
    name=named[2],
    opcode=rest[kind_end:opening].strip(),
    arrays=tuple(_array(*found, is_tpu=is_tpu) for found in _ARRAY.findall(rest[:kind_end])),
    operands=tuple(_OPERAND.findall(literal)),
    literal=literal,
    attributes=rest[closing + 1 :],
    is_root=bool(named[1]),
  )


def _closing(text: str, opening: int) -> int:
  """The place of the parenthesis that closes the one at `opening`."""
  depth = 0
  for match in _PARENTHESIS.finditer(text, opening):
    depth += 1 if match[0] == "(" else -1
    if depth == 0:
      return match.start()
  raise ValueError(f"no parenthesis closes in {text[:80]}")


def _array(dtype: str, dims: str, layout: str, *, is_tpu: bool) -> Array:
  sizes = tuple(int(re.sub(r"\D", "", d)) for d in dims.split(",") if d)
  if is_tpu and re.search(r"S\([1-9]", layout):
    return Array(sizes, 0)
  padded = list(sizes)
  order, tile = layout.split(":")[0], _TILE.search(layout)
  if tile and sizes:
    minor = [int(i) for i in order.split(",") if i]
    for dimension, unit in zip(minor, reversed([int(t) for t in tile.groups() if t]), strict=False):
      padded[dimension] = -(-sizes[dimension] // unit) * unit
  digits = re.search(r"\d+", dtype)
  bits = _BITS.get(dtype, int(digits[0]) if digits else 32)
  return Array(sizes, math.prod(padded) * bits // 8)


@dataclasses.dataclass
class _Walk:
  """The kernels that computations start, with what they start in turn."""

  computations: dict[str, Computation]
  unknown_loops: set[str] = dataclasses.field(default_factory=set)
  chains: set[tuple[str, str]] = dataclasses.field(default_factory=set)

  def kernels(self, computation: str, times: int) -> Iterator[Kernel]:
    body = self.computations[computation]
    for i in body.values():
      if i.opcode in _NOTHING or i.opcode.endswith("-update") or i.target in _NO_CALLS:
        continue
      if i.opcode == "while":
        turns = self._turns(body, i)
        yield from self.kernels(i.named("body"), times * turns)
        yield from self.kernels(i.named("condition"), times * turns)
      elif i.opcode == "conditional":
        named = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
        names = _OPERAND.findall(named[1]) if named else [i.named("true_computation"), i.named("false_computation")]
        branches = [list(self.kernels(name, times)) for name in names]
        yield from max(branches, key=lambda kernels: sum(k.times * (k.read + k.written) for k in kernels))
      elif i.opcode in ("call", "async-start"):
        yield from self.kernels(i.named("to_apply") or i.named("calls"), times)
      elif i.opcode.endswith("-done") and i.opcode != "async-done":
        yield self._kernel(body, body[i.operands[0]], i.arrays, times)
      elif not i.opcode.endswith(("-start", "-done")):  # what is started is counted where it is done
        yield from self._exchange(i, times)
        yield self._kernel(body, i, i.arrays, times)

  def _inside(self, i: Instruction) -> Computation | None:
    return self.computations[i.named("calls")] if i.opcode.startswith("fusion") else None

  def _exchange(self, i: Instruction, times: int) -> Iterator[Kernel]:
    """The collective that runs beside the work of a chain of fusions, each of which has it inside: only TPUs'."""
    for inner in (inside := self._inside(i) or {}).values():
      chain = inner.opcode in KINDS and CHAIN.search(inner.attributes)
      if chain and (inner.opcode, chain[1]) not in self.chains:
        self.chains.add((inner.opcode, chain[1]))
        yield self._kernel(inside, inner, inner.arrays, times)

  def _turns(self, body: Computation, loop: Instruction) -> int:
    """How often a loop turns: as the compiler says, or as its condition does if it counts up by one to a constant."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
      return int(known[1])
    condition = self.computations[loop.named("condition")]
    root = next(i for i in condition.values() if i.is_root)
    if root.opcode == "compare" and "direction=LT" in root.attributes:
      counter, limit = (condition[name] for name in root.operands)
      place, first = re.search(r"index=(\d+)", counter.attributes), body[loop.operands[0]]
      if limit.opcode == "constant" and place and first.opcode == "tuple":
        start = body[first.operands[int(place[1])]]
        while start.opcode in ("copy", "bitcast"):
          start = body[start.operands[0]]
        if start.opcode == "constant":
          return int(limit.literal) - int(start.literal)
    self.unknown_loops.add(loop.name)
    return 1

  def _kernel(self, body: Computation, i: Instruction, results: tuple[Array, ...], times: int) -> Kernel:
    """The kernel of an instruction, or of the start of one whose end has these results."""
    inputs = [array for name in dict.fromkeys(i.operands) for array in body[name].arrays]
    read, written = sum(a.bytes for a in inputs), sum(a.bytes for a in results)
    inside = self._inside(i)
    if inside is not None:
      reads = _reads(inside)
      places: dict[str, int] = defaultdict(int)  # an array given twice is read once
      for place, name in enumerate(i.operands):
        places[name] = max(places[name], min(reads.get(place, 0), body[name].bytes))
      read, written = sum(places.values()), _writes(inside, results)
    elif i.opcode.removesuffix("-start") in ("slice", "dynamic-slice", "gather"):
      source = body[i.operands[0]].arrays[0]
      read = round(source.bytes * min(1.0, sum(a.elements for a in results) / max(1, source.elements)))
    elif i.opcode in _CHANGES:
      read = written = body[i.operands[_CHANGES[i.opcode]]].bytes
    return Kernel(
      kind=_kind(i, inside),
      times=times,
      read=read,
      written=written,
      flops=self._flops(body, i),
      is_layer=_is_layer(body, i, inside),
      inputs=tuple(a.dims for a in inputs),
    )

  def _flops(self, body: Computation, i: Instruction) -> float:
    if inside := self._inside(i):
      return sum(self._flops(inside, inner) for inner in inside.values())
    if i.opcode in ("dot", "convolution") or _LIBRARY_PRODUCT.search(i.target):
      return 2.0 * i.arrays[0].elements * _summed(i, *(body[name].arrays[0] for name in i.operands[:2]))
    return 0.0


def _summed(i: Instruction, a: Array, b: Array) -> float:
  """The number of terms in each element of a product or convolution of a and b."""
  if match := re.search(r"\blhs_contracting_dim(?:s=\{([\d,]*)\}|ensions\":\[([^\]]*)\])", i.attributes):
    places = re.findall(r"\d+", match[1] or match[2] or "")
    return math.prod(a.dims[int(p)] for p in places)
  if labels := re.search(r"dim_labels=\w+_(\w+)->", i.attributes):
    # A dimension of the window that dilates the first operand stands for a batch: it meets one term of each window.
    is_batch = "lhs_dilate" in i.attributes
    return math.prod(
      size for size, label in zip(b.dims, labels[1], strict=True) if label == "i" or (label.isdigit() and not is_batch)
    )
  return math.sqrt(a.elements * b.elements / max(1, i.arrays[0].elements))


def _kind(i: Instruction, inside: Computation | None) -> str:
  if i.opcode in _PREFETCHES:
    return "prefetches"
  opcode = i.opcode.removesuffix("-start")
  if opcode == "custom-call":
    if _PALLAS.fullmatch(i.target):
      function = _FUNCTION.search(i.origin)
      return f"kernel {function[1] if function else i.name.split('.')[0]}"
    return "products" if _LIBRARY_PRODUCT.search(i.target) else f"call {i.target}"
  if opcode in KINDS:
    return opcode
  opcodes = {opcode} if inside is None else {inner.opcode for inner in inside.values()} - {"parameter", "constant"}
  for kind, signs in (
    ("products", ("dot", "convolution")),
    ("gathers and scatters", ("gather", "scatter", "sort")),
    ("reductions", ("reduce", "reduce-window", "select-and-scatter")),
  ):
    if opcodes & set(signs):
      return kind
  return "copies" if opcodes <= _MOVES else "elementwise"


def _is_layer(body: Computation, i: Instruction, inside: Computation | None) -> bool:
  origins = [inner.origin for inner in (inside or {i.name: i}).values() if inner.origin]
  while not origins and i.operands:  # XLA's copies have no origin but that of what they copy
    i = body[i.operands[0]]
    origins = [i.origin] if i.origin else []
  return bool(origins) and 2 * sum(bool(_IN_LAYER.search(origin)) for origin in origins) >= len(origins)


def _reads(inside: Computation) -> dict[int, int]:
  """Bytes that a fusion reads of each of its parameters, by the parameter's number."""
  users: dict[str, list[Instruction]] = defaultdict(list)
  for i in inside.values():
    for name in dict.fromkeys(i.operands):
      users[name].append(i)
  in_place = {i.name for i in _results(inside)}

  @functools.cache
  def needed(name: str) -> int:
    """Elements of a value that its users read."""
    whole = sum(a.elements for a in inside[name].arrays)
    if inside[name].is_root:
      return whole
    total = 0
    for user in users[name]:
      is_first = user.operands[0] == name
      if is_first and user.opcode in ("slice", "dynamic-slice", "gather"):
        total += user.arrays[0].elements if user.opcode == "gather" else needed(user.name)
      elif is_first and user.opcode == "dynamic-update-slice" and user.name in in_place:
        continue
      elif is_first and user.opcode == "scatter":
        total += inside[user.operands[2]].arrays[0].elements
      elif user.opcode in _SAME_ELEMENTS:
        total += needed(user.name)
      else:
        return whole
    return min(total, whole)

  parameters = [i for i in inside.values() if i.opcode == "parameter"]
  return {int(i.literal): i.bytes * needed(i.name) // max(1, sum(a.elements for a in i.arrays)) for i in parameters}


def _results(inside: Computation) -> list[Instruction]:
  """What a fusion computes, below bitcasts, in the order of its results."""
  root = next(i for i in inside.values() if i.is_root)
  results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
  for place, i in enumerate(results):
    while i.opcode == "bitcast":
      i = inside[i.operands[0]]
    results[place] = i
  return results


def _writes(inside: Computation, results: tuple[Array, ...]) -> int:
  """Bytes that a fusion writes: whole results, or what it changes of those that it updates in place."""
  total, place = sum(a.bytes for a in results), 0
  for i in _results(inside):
    if i.opcode in _CHANGES and i.arrays[0].elements:
      change = inside[i.operands[_CHANGES[i.opcode]]].arrays[0]
      total -= round(results[place].bytes * max(0.0, 1 - change.elements / i.arrays[0].elements))
    place += len(i.arrays)
  return total
