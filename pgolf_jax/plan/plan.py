"""Compiles a program for hardware that is not there, and says what it would take of it."""

import dataclasses
import re
import time

import jax

from pgolf_jax.kernels.hardware import peaks
from pgolf_jax.plan import collectives
from pgolf_jax.plan.collectives import Traffic
from pgolf_jax.plan.hardware import GIB, Topology
from pgolf_jax.plan.machine_code import Kernel, read, recorded, table
from pgolf_jax.plan.programs import Program

_KERNEL = re.compile(r'@mosaic_gpu\w*|@tpu_custom_call|custom_call_target="(?:tpu_custom_call|mosaic_gpu\w*)"')
_GPU_KERNEL = re.compile(r'\bkernel_hash = "([^"]*)"')
_TOO_LARGE = re.compile(r"RESOURCE_EXHAUSTED|[Rr]an out of memory|[Ee]xceed(s|ed).*memory")


@dataclasses.dataclass(frozen=True)
class Finding:
  """What is known about one program.

  Attributes:
    memory: bytes a device, by part; empty where the program was not compiled.
    fits: None where that is not known.
    kernels: Pallas kernels in the program's text.
    traffic: by kind of collective.
    floors: seconds that the program cannot beat, by what limits it.
    failure: what the compiler said of a program that does not fit.
    machine_code: of the Pallas kernels, where they were compiled for a GPU, each with how often it was.
    known_kernels: how many different kernels for GPUs this process had compiled before, which leave no record again.
  """

  title: str
  seconds: float
  memory: dict[str, int]
  fits: bool | None
  flops: float
  kernels: int
  traffic: dict[str, Traffic]
  floors: dict[str, float]
  failure: str | None = None
  machine_code: dict[Kernel, int] = dataclasses.field(default_factory=dict)
  known_kernels: int = 0


def examine(program: Program, topology: Topology) -> Finding:
  """Traces, lowers and, where something can, compiles a program for the topology."""
  began = time.perf_counter()
  devices = topology.mesh.size
  lowered = program.trace().lower(lowering_platforms=(topology.platform,))
  memory, fits, failure, moved, machine_code = {}, None, None, None, {}
  if topology.only_lowers:
    text = lowered.as_text()
    traffic = collectives.in_stablehlo(lowered.compiler_ir("stablehlo"), devices)
  else:
    try:
      compiled, machine_code = _compile(lowered, topology)
    except jax.errors.JaxRuntimeError as e:
      if not _TOO_LARGE.search(str(e)):
        raise
      text = lowered.as_text()
      traffic = collectives.in_stablehlo(lowered.compiler_ir("stablehlo"), devices)
      fits, failure = False, _first_words(str(e))
    else:
      text = compiled.as_text()
      traffic = collectives.in_hlo(text, devices)
      memory = _memory(compiled)
      fits = topology.chip is None or sum(memory.values()) <= topology.chip.memory
      moved = (compiled.cost_analysis() or {}).get("bytes accessed")
  kernels = len(_KERNEL.findall(text))
  floors = _floors(program.flops, moved, traffic, topology)
  seconds = time.perf_counter() - began
  known = 0 if not memory else len(set(_GPU_KERNEL.findall(text))) - sum(machine_code.values())
  return Finding(
    program.title, seconds, memory, fits, program.flops, kernels, traffic, floors, failure, machine_code, max(0, known)
  )


def _compile(lowered, topology: Topology):
  """(compiled program, machine code of its kernels, for GPUs)."""
  if topology.platform != "cuda":
    return lowered.compile(), {}
  with recorded() as folder:
    return lowered.compile(), read(folder)


def _memory(compiled) -> dict[str, int]:
  m = compiled.memory_analysis()
  # Outputs that take the place of donated arguments need no memory of their own.
  return {
    "arguments": m.argument_size_in_bytes,
    "outputs": m.output_size_in_bytes - m.alias_size_in_bytes,
    "temporaries": m.temp_size_in_bytes,
    "code": m.generated_code_size_in_bytes,
  }


def _floors(flops: float, moved: float | None, traffic: dict[str, Traffic], topology: Topology) -> dict[str, float]:
  limits, chip = peaks(topology.kind), topology.chip
  floors = {}
  if limits is not None:
    floors["products"] = flops / limits.flops_per_s
    if moved:
      floors["memory"] = moved / limits.bytes_per_s
  if chip is not None and traffic:
    floors["collectives"] = sum(t.sent(kind, topology.mesh.size) for kind, t in traffic.items()) / chip.link
  return floors


def _first_words(message: str) -> str:
  line = next((line for line in message.splitlines() if _TOO_LARGE.search(line)), message.splitlines()[0])
  return line[:300]


def report(finding: Finding, topology: Topology) -> str:
  """The finding as lines of text."""
  done = "lowered" if topology.only_lowers else "compiled"
  lines = [f"{finding.title}: {done} in {finding.seconds:.0f} s, {finding.kernels} Pallas kernels"]
  if finding.failure:
    lines.append(f"  memory        DOES NOT FIT: {finding.failure}")
  elif finding.memory:
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in finding.memory.items())
    total = sum(finding.memory.values()) / GIB
    of = "" if topology.chip is None else f" of {topology.chip.memory / GIB:.1f}"
    verdict = "" if topology.chip is None else ", fits" if finding.fits else ", DOES NOT FIT"
    lines.append(f"  memory        {total:.2f}{of} GiB a device{verdict} ({parts})")
  else:
    lines.append("  memory        not known without compiling")
  lines.append(f"  work          {finding.flops / 1e12:.2f} TFLOP a device in products, by formula")
  for kind, t in sorted(finding.traffic.items()):
    lines.append(f"  {kind:<18}{t.count:>4}, {t.bytes / 1e6:,.1f} MB in all")
  if finding.floors:
    each = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in finding.floors.items())
    longest = max(finding.floors.values()) * 1e3
    lines.append(f"  time          at least {longest:.1f} ms at the chips' peak rates ({each})")
  if finding.machine_code:
    lines += ["  machine code", *table(finding.machine_code)]
  if finding.known_kernels:
    lines.append(f"    {finding.known_kernels} more with the machine code that they have in programs above")
  return "\n".join(lines)
