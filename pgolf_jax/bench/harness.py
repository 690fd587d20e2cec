"""The harness of all benchmarks: ways to do the same work, timed in turn and compared in one table."""

import dataclasses
import math
import resource
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.special import stdtr

from pgolf_jax.errors import UserError
from pgolf_jax.kernels.hardware import Peaks, peaks
from pgolf_jax.runtime.log import progress
from pgolf_jax.tables import Table, line_width


class Work(NamedTuple):
  """The work of one call, which is the same whichever way does it.

  Attributes:
    amount: in units of `unit`, such as tokens; 1 where no rate is of interest.
    flops: floating-point operations that the result needs.
    num_bytes: bytes that must be read or written for it.
    model_flops: the part of `flops` that counts as the model's.
    peaks: highest rates of the hardware; None where they are not known.
  """

  amount: float = 1.0
  unit: str = ""
  flops: float = 0.0
  num_bytes: float = 0.0
  model_flops: float = 0.0
  peaks: Peaks | None = None

  @property
  def floor_s(self) -> float | None:
    """Seconds that the work takes at the peak rates."""
    return self.peaks.floor_s(self.flops, self.num_bytes) if self.peaks else None


class Peak(NamedTuple):
  """The most bytes in use during a call, or an upper bound of that."""

  num_bytes: int
  is_bound: bool


@dataclasses.dataclass(frozen=True)
class Way:
  """One way to do some work.

  Attributes:
    labels: the leading cells of its row in the table, by heading.
    prepare: makes everything ready; returns a function that does the work once.
    work: of one call.
    wait: blocks until the result of a call is complete.
    count_memory: starts counting before a call; returns a function that reads the count after it.
    inspect: returns what `Measurement.facts` is to hold, from the result of the first call.
    clock: returns the seconds to count from a call's result; None to count the whole call.
    repeats: number of timed turns, for ways too slow for as many as the others.
  """

  labels: Mapping[str, str]
  prepare: Callable[[], Callable[[], Any]]
  work: Work = dataclasses.field(default_factory=Work)
  wait: Callable[[Any], Any] = jax.block_until_ready
  count_memory: Callable[[], Callable[[], Peak | None]] = lambda: lambda: None
  inspect: Callable[[Any], Any] = lambda result: None
  clock: Callable[[Any], float] | None = None
  repeats: int | None = None


@dataclasses.dataclass(frozen=True)
class Measurement:
  """The times of one way.

  Attributes:
    seconds: of one call, for each turn.
    core_seconds: time in which cores worked for one call, in this process or in children that have ended.
    peak: None where it was not counted.
    facts: see `Way.inspect`.
    first: the measurement of the first way, with which this one is compared; None for the first.
  """

  way: Way
  seconds: np.ndarray
  core_seconds: np.ndarray
  peak: Peak | None = None
  facts: Any = None
  first: "Measurement | None" = None

  @property
  def median(self) -> float:
    """Seconds of one call."""
    return float(np.median(self.seconds))

  @property
  def deviation(self) -> float | None:
    """The standard deviation over the turns, as a share of the median."""
    return float(np.std(self.seconds, ddof=1)) / self.median if len(self.seconds) > 1 else None

  @property
  def roofline(self) -> float | None:
    """The least time at the hardware's peak rates, as a share of the median."""
    return self.way.work.floor_s and self.way.work.floor_s / self.median

  @property
  def mfu(self) -> float | None:
    """Model FLOPs utilisation: the rate of the model's operations, as a share of the hardware's peak rate."""
    work = self.way.work
    return work.model_flops / self.median / work.peaks.flops_per_s if work.peaks and work.model_flops else None

  @property
  def ratio(self) -> float | None:
    """The geometric mean, over turns, of the time per amount of work over that of the first way."""
    return None if self.first is None else math.exp(self._log_ratios().mean())

  @property
  def p(self) -> float | None:
    """The two-sided p-value of a paired t-test that the logarithms of those ratios have the mean 0."""
    if self.first is None or len(logs := self._log_ratios()) < 2:
      return None
    error = logs.std(ddof=1) / math.sqrt(len(logs))
    return 2 * float(stdtr(len(logs) - 1, -abs(logs.mean()) / error)) if error else float(not logs.any())

  def _log_ratios(self) -> np.ndarray:
    turns = min(len(self.seconds), len(self.first.seconds))
    per_amount = self.seconds[:turns] / self.way.work.amount
    return np.log(per_amount / (self.first.seconds[:turns] / self.first.way.work.amount))


def measure(
  ways: Sequence[Way], repeats: int = 5, *, warmups: int = 1, group_s: float = 0.0, noise: bool = False
) -> tuple[list[Measurement], list[str]]:
  """Times every way once a turn, so that a machine that slows down slows all ways alike.

  Args:
    repeats: timed turns.
    warmups: untimed calls of each way before the first turn.
    group_s: least seconds of a turn: a turn makes as many calls as take about that long, and waits for all together,
      so that the start of a call hides behind the call before.
    noise: measure the first way once more, as "again", to show which ratios and p-values mean nothing.

  Returns:
    The measurements, and a note on each way that did not fit in memory, which is left out.

  Raises:
    UserError: there is no turn to time.
  """
  if repeats < 1:
    raise UserError(f"--repeats {repeats} must be at least 1.")
  runners, notes = [], []
  for way in ways:
    try:
      with progress(f"preparing {', '.join(way.labels.values())}"):
        runners.append(_Runner(way, way.prepare(), warmups, group_s))
    except Exception as e:
      if not _is_out_of_memory(e):
        raise
      notes.append(f"{', '.join(way.labels.values())}: does not fit in memory ({str(e).splitlines()[0][:200]})")
  if noise and runners:
    heading, name = list(runners[0].way.labels.items())[-1]
    again = dataclasses.replace(runners[0].way, labels={**runners[0].way.labels, heading: f"{name}, again"})
    runners.append(_Runner(again, runners[0].run, warmups, group_s))
  with progress("timing", total=repeats, unit="turns") as bar:
    for turn in range(repeats):
      for runner in runners:
        if turn < (runner.way.repeats or repeats):
          runner.take_turn()
      bar.advance()
  first = runners[0].measurement() if runners else None
  return [first, *(runner.measurement(first) for runner in runners[1:])] if runners else [], notes


class _Runner:
  """A prepared way and the times of its turns."""

  def __init__(self, way: Way, run: Callable[[], Any], warmups: int, group_s: float):
    self.way, self.run, self.calls = way, run, 1
    self.facts, self.is_inspected = None, False
    self.peaks: list[Peak] = []
    self.times: list[tuple[float, float]] = []
    for _ in range(warmups):
      self.take_turn()
    if self.times:
      self.calls = max(1, round(group_s / self.times[-1][0]))
      self.times.clear()

  def take_turn(self) -> None:
    read_peak = self.way.count_memory()
    core, began = _core_seconds(), time.perf_counter()
    for _ in range(self.calls):
      result = self.run()
    self.way.wait(result)
    wall, core = time.perf_counter() - began, _core_seconds() - core
    if peak := read_peak():
      self.peaks.append(peak)
    if not self.is_inspected:
      self.facts, self.is_inspected = self.way.inspect(result), True
    seconds = wall / self.calls if self.way.clock is None else self.way.clock(result)
    self.times.append((seconds, core / self.calls))

  def measurement(self, first: Measurement | None = None) -> Measurement:
    seconds, core_seconds = np.array(self.times).T
    exact = [peak for peak in self.peaks if not peak.is_bound]
    peak = max(exact) if exact else min(self.peaks, default=None)
    return Measurement(self.way, seconds, core_seconds, peak, self.facts, first)


def _core_seconds() -> float:
  usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
  return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _is_out_of_memory(error: Exception) -> bool:
  return type(error).__name__ == "OutOfMemoryError" or "RESOURCE_EXHAUSTED" in str(error)


def device_memory(device: jax.Device) -> Callable[[], Peak | None]:
  """Starts counting the memory of a device; returns a function that reads the count.

  The backend reports the peak of the whole process: a bound for what runs between, unless that raises it.
  """

  def peak() -> int | None:
    return (device.memory_stats() or {}).get("peak_bytes_in_use")

  before = peak()
  return lambda: None if (after := peak()) is None else Peak(after, is_bound=after <= (before or 0))


Columns = Mapping[str, Callable[[Measurement], str | None]]
"""Headings and what their cells say of a measurement. A column that is empty for every row is left out."""


def figure(x: float | None, scale: float = 1.0) -> str | None:
  """`x / scale` to three significant digits, or as a whole number."""
  if x is None:
    return None
  return f"{x / scale:,.0f}" if abs(x / scale) >= 1000 else f"{x / scale:.3g}"


def percentage(x: float | None) -> str | None:
  """A share in per cent."""
  return None if x is None else f"{x:.1%}"


_TURNS: Columns = {"n": lambda m: f"{len(m.seconds)}", "±": lambda m: percentage(m.deviation)}
SECONDS: Columns = {"s": lambda m: f"{m.median:,.2f}", **_TURNS}
MILLISECONDS: Columns = {"ms": lambda m: f"{m.median * 1e3:,.3f}", **_TURNS}
CORES: Columns = {"core s": lambda m: f"{np.median(m.core_seconds):,.2f}"}
COMPARISON: Columns = {
  "÷ first": lambda m: m.ratio and f"{m.ratio:.3f}",
  "p": lambda m: None if m.p is None else f"{m.p:.1g}",
}
RATES: Columns = {
  "TFLOP/s": lambda m: figure(m.way.work.flops / m.median or None, 1e12),
  "GB/s": lambda m: figure(m.way.work.num_bytes / m.median or None, 1e9),
}
ROOFLINE: Columns = {"MFU": lambda m: percentage(m.mfu), "roofline": lambda m: percentage(m.roofline)}
PEAK: Columns = {"peak MiB": lambda m: m.peak and f"{'≤ ' if m.peak.is_bound else ''}{m.peak.num_bytes / 2**20:,.0f}"}


def rate(unit: str, scale: float = 1.0) -> Columns:
  """The column of the amount of work a second, over `scale`."""
  return {f"{unit}/s": lambda m: figure(m.way.work.amount / m.median, scale)}


def describe_peaks(kind: str) -> str:
  """A note on the peak rates of a kind of device, and on the columns that compare with them."""
  if (limits := peaks(kind)) is None:
    return f"{kind}: no peak known, so no MFU and no roofline"
  rates = f"{limits.flops_per_s / 1e12:g}e12 FLOP/s, dense bfloat16, and {limits.bytes_per_s / 1e12:g} TB/s"
  return f"roofline: the least time at the chip's peak rates, {rates}, as a share of the time"


def show(title: str, measurements: Sequence[Measurement], columns: Columns, notes: Sequence[str] = ()) -> None:
  """Prints the table of some measurements, whose ways have the same labels, and notes below it."""
  cells = {heading: [m.way.labels[heading] for m in measurements] for heading in _labels(measurements)}
  for heading, cell in columns.items():
    if any(values := [cell(m) for m in measurements]):
      cells[f">{heading}"] = values
  print(Table(tuple(cells), zip(*cells.values(), strict=True), title))
  for note in dict.fromkeys(notes):
    print("\n".join(textwrap.wrap(note, line_width(), break_long_words=False, break_on_hyphens=False)))


def _labels(measurements: Sequence[Measurement]) -> list[str]:
  return list(measurements[0].way.labels) if measurements else []
