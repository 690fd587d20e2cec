"""Exchanges between devices, counted in a program's text: compiled HLO, or StableHLO where it was only lowered."""

import math
import re
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Traffic(NamedTuple):
  """The exchanges of one kind. One inside a loop counts once."""

  count: int
  bytes: int  # of the whole arrays: of what is reduced, or of what is gathered

  def sent(self, kind: str, devices: int) -> float:
    """Bytes that each device sends, on a ring."""
    share = (devices - 1) / devices
    return self.bytes * share * (2 if kind == "all-reduce" else 1)


_BITS = {"pred": 8, "bf16": 16, "i1": 8}
_HLO = re.compile(rf"= (?P<result>.*?) (?P<kind>{'|'.join(KINDS)})(?P<half>-start|-done)?\(")
_CHAIN = re.compile(r'frontend_attributes=\{[^}]*chain_id="(\d+)"')
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_TENSOR = re.compile(r"tensor<((?:\d+x)*)([a-z]+\d*)>")


def in_hlo(text: str, devices: int) -> dict[str, Traffic]:
  """Kind → traffic of compiled HLO text.

  An asynchronous pair counts once, by its end: what its start's result holds beside it differs by kind and release. On
  TPUs an exchange that runs beside other work is a chain of fusions with that work, each of which repeats it in the
  text: a chain counts once.
  """
  found: dict[str, Traffic] = {}
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
    size = sum(_bytes(kind_, dims.split(",")) for kind_, dims in _SHAPE.findall(match["result"]))
    _add(found, kind, size * (devices if kind == "reduce-scatter" else 1))
  return found


def in_stablehlo(module, devices: int) -> dict[str, Traffic]:
  """Kind → traffic of a StableHLO module (`Lowered.compiler_ir`)."""
  found: dict[str, Traffic] = {}

  def walk(op) -> None:
    kind = op.name.removeprefix("stablehlo.").replace("_", "-")
    if op.name.startswith("stablehlo.") and kind in KINDS:
      size = sum(
        _bytes(kind_, dims.split("x")[:-1]) for r in op.results for dims, kind_ in _TENSOR.findall(str(r.type))
      )
      _add(found, kind, size * (devices if kind == "reduce-scatter" else 1))
    for region in op.regions:
      for block in region.blocks:
        for inner in block.operations:
          walk(inner.operation)

  walk(module.operation)
  return found


def _add(found: dict[str, Traffic], kind: str, size: int) -> None:
  before = found.get(kind, Traffic(0, 0))
  found[kind] = Traffic(before.count + 1, before.bytes + size)


def _bytes(kind: str, dims: list[str]) -> int:
  bits = _BITS.get(kind) or int(re.sub(r"\D", "", kind) or 32)
  return math.prod(int(d) for d in dims if d) * bits // 8
