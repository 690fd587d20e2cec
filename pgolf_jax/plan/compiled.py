"""The text and the machine code of compiled programs: exchanges between devices, registers and memory of kernels."""

import ast
import contextlib
import dataclasses
import functools
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

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
CHAIN = re.compile(r'frontend_attributes=\{[^}]*chain_id="(\d+)"')
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
    if chain := CHAIN.search(line):
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


SHARED_MEMORY = 232_448
"""Bytes of shared memory that one thread block may have on compute capability 9.0 (CUDA C++ Programming Guide)."""

_REGISTERS, _THREADS, _SHARED_OF_SM, _SHARED_OF_SYSTEM = 65_536, 2048, 233_472, 1024

_PRODUCT = re.compile(r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]+)"(?:\s+"([^"]+)")?', re.M)
_PLACE = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)", re.M)
_DYNAMIC = re.compile(rb"dynamic_shared_memory_size %c(\d+)(?:_i32)?\b")


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One kernel's machine code.

  Attributes:
    name: the folder and function from which the kernel is called, such as `segment_attention/_attend`; for the kernels
      of a gradient, the function that is differentiated, the only place that JAX records.
    registers: of a thread.
    spilled: bytes that a thread stores to local memory for want of registers.
    products: tensor-core instructions in the text: shape, number.
    shared: bytes of shared memory of a thread block, static and dynamic.
    threads: of a thread block.
    remarks: the assembler's, on lost speed.
  """

  name: str
  registers: int
  spilled: int
  products: tuple[tuple[str, int], ...]
  shared: int
  threads: int
  remarks: tuple[str, ...]

  @property
  def blocks_on_sm(self) -> int:
    """Thread blocks that fit on a multiprocessor at once."""
    by_warp = -(-self.registers // 8) * 8 * 32  # a warp gets registers in units of 256
    by_registers = _REGISTERS // (by_warp * -(-self.threads // 32))
    return min(by_registers, _SHARED_OF_SM // (self.shared + _SHARED_OF_SYSTEM), _THREADS // self.threads)


@contextlib.contextmanager
def recorded() -> Iterator[Path]:
  """Gives a folder to which Mosaic GPU writes the code of every kernel that is compiled inside, for `read`.

  JAX's cache of compiled programs is not used inside, since the kernels of a program from the cache are not compiled.
  """
  cached, before = jax.config.jax_enable_compilation_cache, os.environ.get("MOSAIC_GPU_DUMP_TO")
  with tempfile.TemporaryDirectory() as folder:
    os.environ["MOSAIC_GPU_DUMP_TO"] = folder
    _use_cache(False)
    try:
      yield Path(folder)
    finally:
      _use_cache(cached)
      os.environ.pop("MOSAIC_GPU_DUMP_TO")
      if before is not None:
        os.environ["MOSAIC_GPU_DUMP_TO"] = before


def _use_cache(yes: bool) -> None:
  jax.config.update("jax_enable_compilation_cache", yes)
  compilation_cache.reset_cache()  # JAX reads the setting only when it first compiles


def read(folder: Path) -> dict[Kernel, int]:
  """Returns the kernels in a folder of `recorded`, and how often each was compiled."""
  kernels: Counter[Kernel] = Counter()
  for ptx in sorted(folder.glob("*.ptx")):
    passes = ptx.with_suffix(".mlir-passes.log")
    sizes = _DYNAMIC.findall(passes.read_bytes()) if passes.exists() else []
    assembler = ptx.with_suffix(".ptxas").read_text(errors="replace")
    kernels[kernel(ptx.read_text(errors="replace"), assembler, int(sizes[-1]) if sizes else 0)] += 1
  return dict(sorted(kernels.items(), key=lambda item: item[0].name))


def kernel(ptx: str, assembler: str, dynamic_shared: int) -> Kernel:
  """Returns a kernel from its PTX, the assembler's output, and its bytes of dynamic shared memory."""
  products = Counter(_PRODUCT.findall(ptx))
  threads = re.search(r"\.maxntid\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", ptx)
  return Kernel(
    name=_place(ptx),
    registers=_number(r"Used (\d+) registers", assembler),
    spilled=_number(r"(\d+) bytes spill stores", assembler),
    products=tuple(sorted(products.items())),
    shared=_number(r"(\d+) bytes smem", assembler) + dynamic_shared,
    threads=functools.reduce(lambda n, part: n * int(part or 1), threads.groups(), 1) if threads else 1,
    remarks=tuple(dict.fromkeys(re.findall(r"Potential Performance Loss: (.*)", assembler))),
  )


def _number(pattern: str, text: str) -> int:
  match = re.search(pattern, text)
  return int(match[1]) if match else 0


def _place(ptx: str) -> str:
  """Folder and outermost function of the source line that calls the kernel, or the name of the kernel's entry."""
  files = {number: Path(folder, name) if name else Path(folder) for number, folder, name in _FILE.findall(ptx)}
  place = _PLACE.search(ptx)
  path = files.get(place[1]) if place else None
  if path is not None and path.is_file():
    for node in ast.parse(path.read_text()).body:
      if isinstance(node, ast.FunctionDef) and node.lineno <= int(place[2]) <= (node.end_lineno or node.lineno):
        return f"{path.parent.name}/{node.name}"
  entry = re.search(r"\.entry\s+(\w+)", ptx)
  return entry[1] if entry else "unnamed"


def table(kernels: dict[Kernel, int]) -> list[str]:
  """Returns the kernels as lines of text, with the assembler's remarks below."""
  lines = [
    f"    {'kernel':<40}{'registers':>10}{'spilled':>9}{'shared':>9}{'blocks/SM':>11}  wgmma",
    *(
      f"    {k.name:<40}{k.registers:>10}{k.spilled:>9}{k.shared:>9,}{k.blocks_on_sm:>11}  "
      + (", ".join(f"{count} × {shape}" for shape, count in k.products) or "none")
      for k in kernels
    ),
    f"    (bytes spilled by a thread; bytes of shared memory of a thread block, at most {SHARED_MEMORY:,})",
  ]
  remarks: dict[str, list[str]] = {}
  for k in kernels:
    for remark in k.remarks:
      remarks.setdefault(remark, []).append(k.name)
  return lines + [f"    ptxas: {remark} ({', '.join(dict.fromkeys(names))})" for remark, names in remarks.items()]
