"""The programs of a run, compiled for hardware that need not be there: memory, work, exchanges and the least time.

They are traced from shapes alone: the train step, the scan of test-time training, the global phase.
"""

import dataclasses
import functools
import re
import time
from collections.abc import Callable

import jax

from pgolf_jax.kernels.hardware import peaks
from pgolf_jax.model import flops
from pgolf_jax.plan import by_class, estimate, hlo
from pgolf_jax.plan.by_class import Conditions
from pgolf_jax.plan.compiled import Kernel, Traffic, in_hlo, in_stablehlo, read, recorded, table
from pgolf_jax.plan.hardware import GIB, Topology
from pgolf_jax.runtime.distributed import platform, world_size
from pgolf_jax.runtime.log import progress
from pgolf_jax.scoring.buckets import LEARN, Costs, Shape, steps_per_call
from pgolf_jax.scoring.documents import Chains
from pgolf_jax.scoring.global_phase import GlobalPhase
from pgolf_jax.scoring.scan import Spec, abstract, sharded_scan
from pgolf_jax.settings import Settings
from pgolf_jax.training import Schedule
from pgolf_jax.training.step import TrainStep

VALIDATION_TOKENS = 47_853_344
"""Tokens of the official validation split, which lies on every device during an evaluation."""


@dataclasses.dataclass(frozen=True)
class Program:
  """One program of a run.

  Attributes:
    trace: traces it, from shapes alone.
    flops: of its matrix products on one device, by formula.
    keys: that a query sees on average.
    layer_uses: on one device, where they can be told apart.
  """

  title: str
  trace: Callable[[], jax.stages.Traced]
  flops: float
  keys: float = 0.0
  layer_uses: int = 0


def programs(settings: Settings, mesh, *, every_shape: bool) -> list[Program]:
  """Returns the programs that a run of these settings compiles for a mesh.

  Args:
    mesh: real, described or abstract, with the axis `data`.
    every_shape: include the train step of every sequence length and looping mode, not only the last, the largest.
  """
  shapes = Schedule(settings).shapes()
  chosen = [_train_step(settings, mesh, *shape) for shape in (shapes if every_shape else shapes[-1:])]
  if settings.ttt.enabled:
    chosen.append(_ttt_scan(settings, mesh))
    if settings.ttt.phase.prefix_docs > 0:
      chosen.append(_global_phase(settings, mesh))
  return chosen


def _train_step(settings: Settings, mesh, seq_len: int, looping: bool) -> Program:
  trace = functools.partial(TrainStep(settings, mesh).trace, seq_len, looping)
  title = f"train step, segments up to {seq_len}, looping {'on' if looping else 'off'}"
  work = flops.train_step(settings, mesh.size, seq_len, looping=looping)
  rows = -(-settings.train.micro_batches // mesh.size)
  uses = rows * flops.positions(settings.model, looping=looping)
  return Program(title, trace, work, by_class.mean_keys(seq_len), uses)


def _ttt_scan(settings: Settings, mesh) -> Program:
  """The learning scan whose window is full and in which no document has ended: the largest of an evaluation."""
  ttt = settings.ttt
  rows = ttt.batch_size * Chains.choose(ttt, world_size(settings, mesh), mesh.size).width
  shape = Shape(-(-rows // mesh.size), ttt.seq_len, ttt.chunk_size, LEARN)
  spec = Spec.choose(settings, short=False)

  def trace():
    arguments = abstract(mesh, spec, shape, shape.slots, VALIDATION_TOKENS + ttt.seq_len + ttt.chunk_size)
    return sharded_scan(mesh, spec, shape).trace(*arguments)

  steps = steps_per_call(platform(mesh))
  chunks = "a chunk" if steps == 1 else f"{steps} chunks"
  title = f"TTT, {chunks} of {shape.width} with windows of {shape.window}, {shape.slots} documents a device"
  return Program(title, trace, steps * Costs.estimate(settings.model, ttt).step(shape), (shape.window + 1) / 2)


def _global_phase(settings: Settings, mesh) -> Program:
  phase = GlobalPhase(settings, mesh)
  rows = phase.world // mesh.size if phase.world % mesh.size == 0 else phase.world
  work = flops.forward_and_gradient(settings.model, rows * phase.row_tokens, phase.seq_len, looping=True)
  title = f"TTT, global phase, {phase.world} rows of {phase.row_tokens} tokens"
  return Program(title, phase.trace, work, by_class.mean_keys(phase.seq_len))


_KERNEL = re.compile(r'@mosaic_gpu\w*|@tpu_custom_call|custom_call_target="(?:tpu_custom_call|mosaic_gpu\w*)"')
_GPU_KERNEL = re.compile(r'\bkernel_hash = "([^"]*)"')
_TOO_LARGE = re.compile(r"RESOURCE_EXHAUSTED|[Rr]an out of memory|[Ee]xceed(s|ed).*memory")


@dataclasses.dataclass(frozen=True)
class Finding:
  """The examination of one program.

  Attributes:
    seconds: spent on tracing, lowering and compiling.
    memory: bytes of one device, by part; empty where the compiler does not say.
    fits: whether the memory is enough; None where that is not known.
    is_estimate: whether the memory is estimated from the trace, since nothing here compiles for the hardware.
    flops: of matrix products on one device, by formula.
    kernels: number of Pallas kernels in the program's text.
    traffic: by kind of collective.
    floors: seconds that the program takes at least, by the part of the hardware that limits it.
    failure: the compiler's message on a program that does not fit.
    machine_code: of the Pallas kernels, where they were compiled for a GPU, and how often each was.
    known_kernels: number of kernels for GPUs that this process compiled before, and so not again for this program.
    started: the kernels that it starts, and what their times depend on, where that was asked for.
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
  is_estimate: bool = False
  started: tuple[hlo.Program, Conditions] | None = None


def examine(program: Program, topology: Topology, *, count_bytes: bool = False) -> Finding:
  """Traces and lowers a program for the topology, and compiles it where that is possible.

  Args:
    count_bytes: count the kernels that it starts and the bytes that they move, where it is compiled.
  """
  with progress(f"compiling {program.title}"):
    finding, started = _examine(program, topology, count_bytes)
  if not count_bytes or started is None:
    return finding
  link = topology.chip and topology.chip.link
  conditions = Conditions(topology.kind, topology.mesh.size, link, program.keys, program.layer_uses)
  return dataclasses.replace(finding, started=(started, conditions))


def _examine(program: Program, topology: Topology, count_bytes: bool) -> tuple[Finding, hlo.Program | None]:
  """Returns the finding, and the kernels of the program where it was compiled and they were needed."""
  began = time.perf_counter()
  traced = program.trace()
  lowered = traced.lower(lowering_platforms=(topology.platform,))
  compiled, machine_code, failure, started = None, {}, None, None
  if not topology.only_lowers:
    try:
      compiled, machine_code = _compile(lowered, topology)
    except jax.errors.JaxRuntimeError as e:
      if not _TOO_LARGE.search(str(e)):
        raise
      failure = _first_words(str(e))
  if compiled is None:
    text, num_bytes = lowered.as_text(), None
    parts = {} if failure else estimate.memory(traced)
    fits = False if failure else _may_fit(sum(parts.values()), topology)
    traffic = in_stablehlo(lowered.compiler_ir("stablehlo"), topology.mesh.size)
  else:
    text, parts = compiled.as_text(), memory(compiled)
    fits = topology.chip is None or sum(parts.values()) <= topology.chip.memory
    is_tpu = topology.platform == "tpu"
    if count_bytes or is_tpu:
      started = hlo.read(text, is_tpu=is_tpu)
    # On TPUs XLA counts what stays in the chip's own memory too, which costs no bandwidth.
    num_bytes = _moved(started) if is_tpu else (compiled.cost_analysis() or {}).get("bytes accessed")
    traffic = in_hlo(text, topology.mesh.size)
  known_kernels = len(set(_GPU_KERNEL.findall(text))) - sum(machine_code.values()) if compiled else 0
  finding = Finding(
    title=program.title,
    seconds=time.perf_counter() - began,
    memory=parts,
    fits=fits,
    flops=program.flops,
    kernels=len(_KERNEL.findall(text)),
    traffic=traffic,
    floors=_floors(program.flops, num_bytes, traffic, topology),
    failure=failure,
    machine_code=machine_code,
    known_kernels=max(0, known_kernels),
    is_estimate=topology.only_lowers is not None,
  )
  return finding, started


def _moved(started: hlo.Program) -> int:
  """Bytes between a device's memory and its units."""
  return sum(kernel.times * (kernel.read + kernel.written) for kernel in started.kernels)


def _may_fit(estimated: int, topology: Topology) -> bool | None:
  """Whether an estimate lies safely below or above the memory; None where it is too near to tell."""
  if topology.chip is None:
    return None
  least, most = estimate.scaled(estimated, topology.platform)
  if most <= topology.chip.memory:
    return True
  return False if least > topology.chip.memory else None


def _compile(lowered: jax.stages.Lowered, topology: Topology) -> tuple[jax.stages.Compiled, dict[Kernel, int]]:
  """Returns the compiled program and, for GPUs, the machine code of its kernels."""
  if topology.platform != "cuda":
    return lowered.compile(), {}
  with recorded() as folder:
    return lowered.compile(), read(folder)


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
  """Returns the bytes of one device that a program needs, by part; nothing where the backend does not say."""
  m = compiled.memory_analysis()
  if m is None:
    return {}
  # Outputs that take the place of donated arguments need no memory of their own.
  return {
    "arguments": m.argument_size_in_bytes,
    "outputs": m.output_size_in_bytes - m.alias_size_in_bytes,
    "temporaries": m.temp_size_in_bytes,
    "code": m.generated_code_size_in_bytes,
  }


def _floors(flops: float, num_bytes: float | None, traffic: dict[str, Traffic], topology: Topology) -> dict[str, float]:
  limits, chip = peaks(topology.kind), topology.chip
  floors = {}
  if limits is not None:
    floors["products"] = flops / limits.flops_per_s
    if num_bytes:
      floors["memory"] = num_bytes / limits.bytes_per_s
  if chip is not None and traffic:
    floors["collectives"] = sum(t.sent(kind, topology.mesh.size) for kind, t in traffic.items()) / chip.link
  return floors


def _first_words(message: str) -> str:
  line = next((line for line in message.splitlines() if _TOO_LARGE.search(line)), message.splitlines()[0])
  return line[:300]


_TAKEN_AT_FIRST = 0.75  # of a GPU's memory, by JAX: docs.jax.dev, page on GPU memory allocation
_FRACTION = "XLA_CLIENT_MEM_FRACTION"


def _memory_lines(finding: Finding, topology: Topology) -> list[str]:
  """The memory of one device by part, and whether it is enough."""
  parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in finding.memory.items())
  total, chip = sum(finding.memory.values()), topology.chip
  available = "" if chip is None else f" of {chip.memory / GIB:.1f}"
  verdict = "" if chip is None else {True: ", fits", False: ", DOES NOT FIT", None: ", may not fit"}[finding.fits]
  about = "about " if finding.is_estimate else ""
  lines = [f"  memory        {about}{total / GIB:.2f}{available} GiB a device{verdict} ({parts})"]
  if finding.is_estimate:
    low, high = (f"{size / GIB:.2f}" for size in estimate.scaled(total, topology.platform))
    lines.append(f"                estimated from the trace: compilers were seen to take {low} to {high}")
  if chip is not None and topology.platform == "cuda" and finding.fits and total > _TAKEN_AT_FIRST * chip.memory:
    lines.append(f"                more than the 75 % that JAX takes at first: set {_FRACTION}=0.95")
  return lines


def report(finding: Finding, topology: Topology) -> str:
  """Returns the finding as lines of text."""
  done = "lowered" if topology.only_lowers else "compiled"
  lines = [f"{finding.title}: {done} in {finding.seconds:.0f} s, {finding.kernels} Pallas kernels"]
  if finding.failure:
    lines.append(f"  memory        DOES NOT FIT: {finding.failure}")
  elif finding.memory:
    lines += _memory_lines(finding, topology)
  else:
    lines.append("  memory        the compiler does not say")
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
    lines.append(f"    {finding.known_kernels} more, which a program above has too")
  if finding.started:
    lines.append(by_class.report(*finding.started))
  return "\n".join(lines)
