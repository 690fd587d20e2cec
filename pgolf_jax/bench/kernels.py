"""`pgolf bench kernels`: each accelerated operation, every implementation that is possible here, and PyTorch."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Literal

Operation = Literal[
  "segment_attention", "leaky_relu2_mlp", "softcapped_xent", "linear_softcapped_xent", "polar_express"
]


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table. `share` is the floor of time over the time, None where the chip's peaks are not known."""

  operation: str
  passes: str
  implementation: str
  seconds: float
  flops_per_s: float
  bytes_per_s: float
  share: float | None


def kernels(
  operations: tuple[Operation, ...] = (),
  tokens: int | None = None,
  max_segment: int = 2048,
  repeats: int = 20,
) -> None:
  """Time the accelerated operations at the record's widths, forward alone and with the gradient.

  FLOP/s count the products that the operation needs, bytes/s the arrays that it must read or write; the share of
  the roofline is the longer of the two times at the chip's peaks over the measured one. The last column is the time
  over that of plain XLA.

  Example: pgolf bench kernels --operations leaky_relu2_mlp --tokens 8192

  Args:
    operations: which ones; all if none is given.
    tokens: of one device's micro-batch; 98304 if not given, 2048 on a CPU.
    max_segment: tokens of the longest segment; documents are about 957 tokens long.
    repeats: timed calls at most, fewer where they take seconds; the median counts.
  """
  from rich.console import Console
  from rich.table import Table

  from pgolf_jax.runtime import distributed

  distributed.start()
  rows, notes = measure(operations, tokens, max_segment, repeats)
  table = Table("operation", "pass", "by", "ms", "TFLOP/s", "GB/s", "roofline", "÷ XLA")
  xla = {(row.operation, row.passes): row.seconds for row in rows if row.implementation == "xla"}
  for row in rows:
    share = "" if row.share is None else f"{row.share:.0%}"
    of_xla = f"{row.seconds / xla[row.operation, row.passes]:.2f}"
    rates = f"{row.flops_per_s / 1e12:.3g}", f"{row.bytes_per_s / 1e9:.4g}"
    table.add_row(row.operation, row.passes, row.implementation, f"{row.seconds * 1e3:.3f}", *rates, share, of_xla)
  console = Console()
  console.width = max(console.width, 110)  # narrower, the table would break its headings
  console.print(table)
  for note in dict.fromkeys(notes):
    console.print(note, markup=False)


def measure(operations, tokens, max_segment, repeats) -> tuple[list[Row], list[str]]:
  """The table's rows, and a line for each implementation that was left out."""
  import jax
  import jax.numpy as jnp

  from pgolf_jax.bench import _kernel_cases, _kernel_torch
  from pgolf_jax.kernels.hardware import peaks, target

  device = target()
  on_cpu = device.platform == "cpu"
  tokens = tokens or (2048 if on_cpu else 98304)
  limits = peaks(device.kind)
  torch_functions = _kernel_torch.functions(device.platform) or {}
  matrices, dtype = (2, jnp.float32) if on_cpu else (22, jnp.bfloat16)
  notes = [f"{device.kind}: {tokens} tokens in segments up to {max_segment}, {matrices} matrices, {dtype.__name__}"]
  if limits is None:
    notes.append(f"{device.kind}: no peak known, so no share of the roofline")
  else:
    peaks_of = f"{limits.flops_per_s / 1e12:g}e12 FLOP/s, {limits.bytes_per_s / 1e12:g} TB/s"
    notes.append(f"roofline: share of the least time at the chip's peaks, {peaks_of}")
  rows = []
  for case in _kernel_cases.cases(tokens, max_segment, matrices, dtype):
    if operations and case.name not in operations:
      continue
    for passes, with_gradient in (("fwd", False), ("fwd+bwd", True))[: 2 if case.differentiated else 1]:
      calls = {}
      for name in ("mosaic_gpu", "mosaic_tpu", "xla"):
        try:
          case.choose(name)
        except ValueError as e:
          notes += [str(e)] if not with_gradient else []
          continue
        calls[name] = _jax_call(jax, case, name, with_gradient)
      if case.name in torch_functions:
        f = torch_functions[case.name]
        calls["PyTorch"] = _kernel_torch.timed_call(f, case, device.platform, with_gradient)
      flops, num_bytes = case.flops[with_gradient], case.num_bytes[with_gradient]
      for name, (call, wait) in calls.items():
        seconds = _median_seconds(call, wait, repeats)
        share = None if limits is None else limits.floor_s(flops, num_bytes) / seconds
        rows.append(Row(case.name, passes, name, seconds, flops / seconds, num_bytes / seconds, share))
  return rows, notes


def _jax_call(jax, case, implementation: str, with_gradient: bool) -> tuple[Callable, Callable]:
  def forward(*arguments):
    return case.call(implementation, *arguments)

  def total(*arguments):
    return forward(*arguments).astype("float32").sum()

  compiled = jax.jit(jax.grad(total, case.differentiated) if with_gradient else forward)
  last = []

  def call():
    last[:] = [compiled(*case.arguments)]

  return call, lambda: jax.block_until_ready(last)


def _median_seconds(call: Callable, wait: Callable, repeats: int) -> float:
  """The median of `repeats` calls after two that compile and warm up.

  Calls are waited for in groups that take some 10 ms, so that the time to start one hides behind the one before.
  """

  def group(size: int) -> float:
    start = time.perf_counter()
    for _ in range(size):
      call()
    wait()
    return (time.perf_counter() - start) / size

  group(1)
  one = group(1)
  size = max(1, min(repeats, round(0.01 / one)))
  groups = min(-(-repeats // size), 1 + round(3 / (size * one)))
  return statistics.median(group(size) for _ in range(groups))


COMMAND = kernels
