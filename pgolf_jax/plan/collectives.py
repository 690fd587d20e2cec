"""The exchanges between devices, counted in a program's text: compiled HLO, or StableHLO that was only lowered."""

import math
import re
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Traffic(NamedTuple):
  """The exchanges of one kind; an exchange inside a loop counts once.

  Attributes:
    bytes: size of the whole arrays that are reduced, or that gathering makes.
  """

  count: int
  bytes: int

  def sent(self, kind: str, devices: int) -> float:
    """Returns the bytes that each device sends if the devices form a ring."""
    share = (devices - 1) / devices
    return self.bytes * share * (2 if kind == "all-reduce" else 1)


_BITS = {"pred": 8, "bf16": 16, "i1": 8}
_HLO = re.compile(rf"= (?P<result>.*?) (?P<kind>{'|'.join(KINDS)})(?P<half>-start|-done)?\(")
_CHAIN = re.compile(r'frontend_attributes=\{[^}]*chain_id="(\d+)"')
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_TENSOR = re.compile(r"tensor<((?:\d+x)*)([a-z]+\d*)>")


def in_hlo(text: str, devices: int) -> dict[str, Traffic]:
  """Returns the traffic of compiled HLO text, by kind.

  An asynchronous exchange is counted at its end, since the form of the result of its start differs between kinds and
  releases of XLA. On TPUs an exchange that runs beside other work is a chain of fusions, each of which contains the
  exchange in its text: a chain counts once.
  """
  traffic: dict[str, Traffic] = {}
  chains: set[tuple[str, str]] = set()
  for line in text.splitlines():
    match = _HLO.search(line)
    if not match or match["half"] == "-start":
      continue
    kind = match["kind"]
    if chain := _CHAIN.search(line):
      if (kind, chain[1]) in chains:
        continue
      chains.add((kind, chain[1]))
    shapes = [(dtype, dims.split(",")) for dtype, dims in _SHAPE.findall(match["result"])]
    _add(traffic, kind, shapes, devices)
  return traffic


def in_stablehlo(module, devices: int) -> dict[str, Traffic]:
  """Returns the traffic of a StableHLO module (`Lowered.compiler_ir`), by kind."""
  traffic: dict[str, Traffic] = {}

  def walk(op) -> None:
    kind = op.name.removeprefix("stablehlo.").replace("_", "-")
    if op.name.startswith("stablehlo.") and kind in KINDS:
      tensors = [tensor for result in op.results for tensor in _TENSOR.findall(str(result.type))]
      _add(traffic, kind, [(dtype, dims.split("x")[:-1]) for dims, dtype in tensors], devices)
    for region in op.regions:
      for block in region.blocks:
        for inner in block.operations:
          walk(inner.operation)

  walk(module.operation)
  return traffic


def _add(traffic: dict[str, Traffic], kind: str, results: list[tuple[str, list[str]]], devices: int) -> None:
  """Adds one exchange with results of these types and dimensions."""
  size = sum(_bytes(dtype, dims) for dtype, dims in results)
  if kind == "reduce-scatter":  # the result is one device's part of the array
    size *= devices
  before = traffic.get(kind, Traffic(0, 0))
  traffic[kind] = Traffic(before.count + 1, before.bytes + size)


def _bytes(dtype: str, dims: list[str]) -> int:
  bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 32)
  return math.prod(int(d) for d in dims if d) * bits // 8
