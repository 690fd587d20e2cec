"""The harness takes ways in turn, counts what they say, and compares them."""

import time

import numpy as np
import pytest
from scipy import stats

from pgolf_jax.bench import harness
from pgolf_jax.bench.harness import Measurement, Peak, Way, Work, measure
from pgolf_jax.errors import UserError
from pgolf_jax.kernels.hardware import Peaks


def sleeping(name: str, seconds: float, calls: list[str], **fields) -> Way:
  def run():
    calls.append(name)
    time.sleep(seconds)
    return name

  return Way({"by": name}, lambda: run, **fields)


def measurement(seconds, first=None, **fields) -> Measurement:
  return Measurement(Way({"by": "x"}, lambda: None, **fields), np.array(seconds), np.array(seconds), first=first)


def test_ways_are_taken_in_turn_after_their_warm_ups():
  calls = []
  ways = [sleeping("a", 0, calls), sleeping("b", 0, calls)]
  measurements, _ = measure(ways, 3, warmups=2)
  assert calls == ["a", "a", "b", "b", *"ababab"]
  assert [len(m.seconds) for m in measurements] == [3, 3]


def test_a_slow_way_may_take_fewer_turns():
  calls = []
  measurements, _ = measure([sleeping("a", 0, calls), sleeping("b", 0, calls, repeats=1)], 3, warmups=0)
  assert calls == list("abaa")
  assert [len(m.seconds) for m in measurements] == [3, 1]
  assert measurements[1].ratio > 0 and measurements[1].p is None


def test_short_calls_are_timed_in_groups():
  calls = []
  (m,), _ = measure([sleeping("a", 0.002, calls)], 2, warmups=2, group_s=0.02)
  assert 2 + 2 * 2 < len(calls) <= 2 + 2 * 10
  assert all(m.seconds >= 0.002) and all(m.seconds < 0.02)


def test_the_result_of_the_first_call_is_inspected_once():
  results = iter(["first", "second", "third"])
  (m,), _ = measure([Way({}, lambda: lambda: next(results), inspect=lambda result: result)], 2)
  assert m.facts == "first"


def test_a_way_may_say_which_seconds_count():
  (m,), _ = measure([Way({}, lambda: lambda: 7.0, clock=lambda result: result)], 2)
  assert m.seconds.tolist() == [7.0, 7.0]


def test_time_asleep_is_no_work_of_a_core():
  (m,), _ = measure([sleeping("a", 0.05, [])], 1)
  assert m.core_seconds[0] < 0.025 < 0.05 <= m.seconds[0]


def test_noise_is_the_first_way_once_more():
  calls = []
  measurements, _ = measure([sleeping("a", 0, calls), sleeping("b", 0, calls)], 2, warmups=0, noise=True)
  assert [m.way.labels["by"] for m in measurements] == ["a", "b", "a, again"]
  assert calls == list("abaaba")


def test_a_way_that_does_not_fit_in_memory_is_left_out_with_a_note():
  class OutOfMemoryError(RuntimeError):
    pass

  def too_large():
    raise OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")

  (m,), notes = measure([sleeping("small", 0, []), Way({"pass": "step", "by": "large"}, too_large)], 1)
  assert m.way.labels["by"] == "small"
  assert notes == ["step, large: does not fit in memory (CUDA out of memory.)"]
  with pytest.raises(ZeroDivisionError):
    measure([Way({}, lambda: lambda: 1 / 0)], 1)


def test_a_process_wide_peak_is_a_bound_for_ways_that_do_not_raise_it():
  class Device:
    peak = 100

    def memory_stats(self):
      return {"peak_bytes_in_use": self.peak}

  device = Device()

  def using(size: int) -> Way:
    def run():
      device.peak = max(device.peak, size)

    return Way({}, lambda: run, count_memory=lambda: harness.device_memory(device))

  measurements, _ = measure([using(300), using(200), using(400)], 2)
  assert [m.peak for m in measurements] == [Peak(300, False), Peak(300, True), Peak(400, False)]


def test_statistics():
  first, second = [1.0, 2.0, 4.0, 4.0], [1.1, 2.1, 4.6, 4.5]
  base = measurement(first)
  assert (base.median, base.ratio, base.p) == (3.0, None, None)
  assert base.deviation == pytest.approx(np.std(first, ddof=1) / 3.0)
  m = measurement(second, base)
  assert m.ratio == pytest.approx(stats.gmean(np.divide(second, first)))
  assert m.p == pytest.approx(stats.ttest_rel(np.log(second), np.log(first)).pvalue)
  assert measurement(first, base).p == 1.0
  assert measurement([2.0, 4.0, 8.0, 8.0], base).p == 0.0


def test_ways_that_do_different_amounts_are_compared_by_amount():
  base = measurement([4.0, 4.0], work=Work(8.0))
  assert measurement([1.0, 1.0], base, work=Work(1.0)).ratio == pytest.approx(2.0)


def test_the_roofline_is_the_longer_of_two_times():
  peaks = Peaks(flops_per_s=100.0, bytes_per_s=10.0)
  assert measurement([4.0], work=Work(flops=200.0, num_bytes=10.0, peaks=peaks)).roofline == pytest.approx(0.5)
  assert measurement([4.0], work=Work(flops=200.0, num_bytes=30.0, peaks=peaks)).roofline == pytest.approx(0.75)
  assert measurement([4.0], work=Work(flops=200.0)).roofline is None


def test_no_turn_is_refused():
  with pytest.raises(UserError, match="--repeats 0"):
    measure([], 0)


def test_the_table_has_no_empty_columns_and_no_broken_cells(capsys):
  base = measurement([0.5, 0.5], work=Work(1e6, "tokens"))
  rows = [base, measurement([1.0, 1.5], base, work=Work(1e6, "tokens"))]
  columns = {**harness.MILLISECONDS, **harness.rate("tokens"), **harness.RATES, **harness.ROOFLINE}
  wide = {f"a heading with the number {i}": lambda m: "cell" for i in range(8)}
  harness.show("a title", rows, {**columns, **harness.COMPARISON, **wide}, ["a note", "a note"])
  printed = capsys.readouterr().out
  assert "2,000,000" in printed and "1,250.000" in printed and "2.449" in printed
  assert "roofline" not in printed and "TFLOP/s" not in printed
  assert all(heading in printed for heading in wide)
  assert printed.count("a note") == 1
