"""A program's kernels by class: how many, the bytes that they move, and an estimate of the time that they take.

Times are added up as if nothing ran beside anything else. A kernel takes the longest of its bytes at the memory's rate,
its products at the rate below, and the least time of any kernel; a collective what it sends at the links' rate.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from pgolf_jax.kernels.hardware import Peaks, peaks
from pgolf_jax.plan.compiled import KINDS, Traffic
from pgolf_jax.plan.gpus import GPUS
from pgolf_jax.plan.hlo import Kernel, Program
from pgolf_jax.tables import Table

# Readings from a card: a product of two bfloat16 matrices of 8192 × 8192, and a copy.
_MEASURED = {"NVIDIA H100 80GB HBM3": Peaks(798e12, 3.0e12)}
_OF_PEAK = 0.8
"""Share of the makers' peaks that is taken for what products and copies reach, where no reading is known."""
_PRODUCTS = 0.7
"""Share of that which products of a layer's shapes reach: their inner dimension is 512, not 8192."""
_PALLAS = 0.6
_ATTENTION = 0.5
_LINKS = 0.8
_LEAST_S = {True: 3e-6, False: 0.3e-6}
"""Seconds from the start of a small kernel to that of the next, on a GPU and elsewhere."""
_IN_VAIN = {"gpu": 96, "tpu": 340}
"""Keys that attention kernels compute for each query in vain: blocks, of 64 and 256, on the diagonal and at a segment's
first key."""

_MEAN_DOCUMENT, _SPREAD = 957, 0.9
"""Tokens of a document, and the deviation of their logarithm: a log-normal law, near to FineWeb's validation split."""


Shapes = tuple[tuple[int, ...], ...]


def _attention(products: int, platform: str) -> Callable[[Shapes, float], float]:
  """Of a kernel whose largest input is q."""
  return lambda inputs, keys: products * 2.0 * max(map(math.prod, inputs)) * (keys + _IN_VAIN[platform])


def _with_ring(products: int) -> Callable[[Shapes, float], float]:
  """Of a chunk's kernel, among whose inputs is a ring [P, K, B, S, C], all of which is seen."""
  return lambda inputs, keys: products * 2.0 * math.prod(inputs[0]) * next(x for x in inputs if len(x) == 5)[3]


def _mlp(inputs: Shapes, keys: float) -> float:
  (tokens, width), hidden = inputs[0], math.prod(inputs[1])
  return 2.0 * tokens * width * (hidden // width)


FLOPS = {
  "kernel _attend": _attention(2, "gpu"),
  "kernel _query_gradient": _attention(3, "gpu"),
  "kernel key_gradients": _attention(4, "gpu"),
  "kernel _attention": _attention(2, "tpu"),
  "kernel _attention_gradients": _attention(5, "tpu"),
  "kernel _attend_with_ring": _with_ring(2),
  "kernel _query_gradient_with_ring": _with_ring(3),
  "kernel up": _mlp,
  "kernel up_gradient": _mlp,
}
"""Class → (inputs' dimensions, mean number of keys that a query sees) → operations. Other Pallas kernels have none."""


def mean_keys(seq_len: int) -> float:
  """Returns how many keys a query sees on average in documents that are cut into segments of at most `seq_len`."""
  lengths = np.ceil(_MEAN_DOCUMENT * np.exp(_SPREAD * ndtri((np.arange(20_000) + 0.5) / 20_000) - _SPREAD**2 / 2))
  whole, rest = np.divmod(lengths, seq_len)
  return float((whole * seq_len * (seq_len + 1) / 2 + rest * (rest + 1) / 2).sum() / lengths.sum())


@dataclasses.dataclass(frozen=True)
class Conditions:
  """What the times depend on beside the program.

  Attributes:
    kind: the devices' `device_kind`.
    link: bytes/s that a device can send to the others; None where that is not known.
    keys: that a query sees on average.
    layer_uses: of a run of the program by one device; 0 where layers are not to be told apart.
  """

  kind: str
  devices: int
  link: float | None
  keys: float
  layer_uses: int

  @property
  def is_gpu(self) -> bool:
    return any(card.kind == self.kind for card in GPUS.values())

  @property
  def rates(self) -> Peaks | None:
    """What products and copies are taken to reach; None for a chip that is not listed."""
    if known := _MEASURED.get(self.kind):
      return known
    limits = peaks(self.kind)
    return limits and Peaks(_OF_PEAK * limits.flops_per_s, _OF_PEAK * limits.bytes_per_s)


class Row(NamedTuple):
  """The sum over kernels.

  Attributes:
    kernels: number of starts.
    read, written: bytes.
    seconds: None where the device's rates are not known.
  """

  kernels: int
  read: int
  written: int
  flops: float
  seconds: float | None

  @property
  def moved(self) -> int:
    """Bytes read and written."""
    return self.read + self.written


def total(kernels: Iterable[Kernel], conditions: Conditions) -> Row:
  """Returns the sum over kernels, each counted as often as it is started."""
  count, read, written, flops, seconds = 0, 0, 0, 0.0, 0.0
  for k in kernels:
    work = _flops(k, conditions)
    count += k.times
    read += k.times * k.read
    written += k.times * k.written
    flops += k.times * work
    seconds += k.times * (_seconds(k, work, conditions) or 0.0)
  return Row(count, read, written, flops, seconds if conditions.rates else None)


def _flops(k: Kernel, conditions: Conditions) -> float:
  return FLOPS[k.kind](k.inputs, conditions.keys) if k.kind in FLOPS else k.flops


def _seconds(k: Kernel, work: float, conditions: Conditions) -> float | None:
  rates, least = conditions.rates, _LEAST_S[conditions.is_gpu]
  if rates is None:
    return None
  if k.kind in KINDS:
    sent = Traffic(1, max(k.read, k.written)).sent(k.kind, conditions.devices)
    return max(least, sent / (_LINKS * conditions.link)) if conditions.link else least
  if k.kind == "prefetches":
    least = 0.0
  share = _PRODUCTS
  if k.kind in FLOPS:
    share = _PALLAS if FLOPS[k.kind] is _mlp else _ATTENTION
  return max(least, (k.read + k.written) / rates.bytes_per_s, work / (share * rates.flops_per_s))


LEFT_TO_XLA = ("elementwise", "reductions")
"""The classes whose bytes fused kernels save."""


def report(program: Program, conditions: Conditions) -> str:
  """Returns the classes as a table, the sum, and what the times rest on."""
  classes = sorted({k.kind for k in program.kernels})
  uses, times = conditions.layer_uses, conditions.rates is not None
  head = ["  class", ">kernels", ">GB read", ">GB written", ">TFLOP"]
  head += [">ms"] * times + [">kernels a use", ">GB a use"] * bool(uses) + [">ms a use"] * (times and uses > 0)

  def line(title: str, kernels: list[Kernel]) -> list[str]:
    row = total(kernels, conditions)
    cells = [f"  {title}", str(row.kernels), _giga(row.read), _giga(row.written), f"{row.flops / 1e12:.2f}"]
    cells += [f"{1e3 * row.seconds:.2f}"] if times else []
    if uses:
      part = total([k for k in kernels if k.is_layer], conditions)
      cells += [f"{part.kernels / uses:.1f}", f"{part.moved / uses / 1e9:.3f}"]
      cells += [f"{1e3 * part.seconds / uses:.3f}"] if times else []
    return cells

  everything = list(program.kernels)
  rows = [line(c, [k for k in everything if k.kind == c]) for c in classes]
  rows.append(line("all", everything))
  rows.append(line("elementwise and reductions", [k for k in everything if k.kind in LEFT_TO_XLA]))
  return "\n".join([str(Table(head, rows)), *_notes(program, conditions)])


def _giga(num_bytes: int) -> str:
  return f"{num_bytes / 1e9:.2f}"


def _notes(program: Program, conditions: Conditions) -> list[str]:
  lines = []
  if conditions.layer_uses:
    lines.append(f"  a use: the mean of {conditions.layer_uses} uses of a layer, forward and gradient")
  if program.unknown_loops:
    lines.append(f"  {program.unknown_loops} loops of unknown length are counted as one turn")
  if (rates := conditions.rates) is not None:
    in_vain = _IN_VAIN["gpu" if conditions.is_gpu else "tpu"]
    source = "read from a card" if conditions.kind in _MEASURED else f"{_OF_PEAK:.0%} of the maker's peaks"
    lines.append(
      f"  ms: at {rates.bytes_per_s / 1e12:.2f} TB/s and {rates.flops_per_s / 1e12:.0f} TFLOP/s ({source}), of which"
      f" products reach {_PRODUCTS:.0%}, the MLP's kernels {_PALLAS:.0%} and attention {_ATTENTION:.0%},"
    )
    lines.append(
      f"      with {conditions.keys:.0f} keys a query and {in_vain} in vain; at least"
      f" {1e6 * _LEAST_S[conditions.is_gpu]:.1f} µs a kernel; links at {_LINKS:.0%}; nothing beside anything else"
    )
    by_bytes = sorted({k.kind for k in program.kernels if k.kind.startswith("kernel ") and k.kind not in FLOPS})
    if by_bytes:
      lines.append(f"      {', '.join(by_bytes)}: by bytes alone")
  return lines
