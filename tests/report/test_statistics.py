"""Tests, intervals and rules against SciPy and against figures worked out by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from pgolf_jax.report import statistics
from pgolf_jax.report.statistics import REFERENCE

FIRST, SECOND = [2.310, 2.316, 2.313], [2.300, 2.304, 2.299, 2.303]


def test_summary_of_the_published_seeds():
  found = statistics.summary(REFERENCE.bpb)
  # The record's own submission.json: mean and standard deviation (n, not n − 1) of its three seeds.
  assert found.mean == pytest.approx(1.05701907, abs=5e-8)
  assert found.deviation * math.sqrt(2 / 3) == pytest.approx(0.00102611, abs=5e-8)
  low, high = stats.t.interval(0.95, 2, found.mean, stats.sem(REFERENCE.bpb))
  assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))
  assert statistics.summary([1.5]) == (1, 1.5, None, None)


def test_published_losses_are_the_published_bits():
  factor = REFERENCE.targets / REFERENCE.text_bytes / math.log(2)
  assert np.array(REFERENCE.loss) * factor == pytest.approx(np.array(REFERENCE.bpb), rel=1e-6)


def test_welch_by_its_formula():
  a, b = np.array(FIRST), np.array(SECOND)
  found = statistics.welch(a, b)
  va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
  t = (b.mean() - a.mean()) / math.sqrt(va + vb)
  freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
  assert found.mean == pytest.approx(b.mean() - a.mean())
  assert found.p == pytest.approx(2 * stats.t.cdf(-abs(t), freedom)) and found.p_lower == pytest.approx(
    stats.t.cdf(t, freedom)
  )
  assert found.half_width == pytest.approx(stats.t.ppf(0.975, freedom) * math.sqrt(va + vb))
  assert found.p == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue)


def test_paired_by_its_formula():
  a, b = np.array([1.0, 2.0, 3.0, 5.0]), np.array([0.9, 2.1, 2.7, 4.6])
  found, gap = statistics.paired(a, b), b - a
  t = gap.mean() / (gap.std(ddof=1) / 2)
  assert found.mean == pytest.approx(gap.mean()) and found.count == 4
  assert found.p == pytest.approx(2 * stats.t.cdf(-abs(t), 3)) and found.p_lower == pytest.approx(stats.t.cdf(t, 3))


def test_without_variation_there_is_no_p():
  assert statistics.welch([1.0], [0.9, 0.8]).p is None and statistics.welch([1.0, 1.0], [0.9, 0.9]).p is None
  assert statistics.paired([1.0, 2.0], [0.5, 1.5]).p is None and statistics.paired([1.0], [0.5]).p_lower is None


def test_rules_ask_for_the_margin_first_and_for_any_gain_later():
  much = statistics.rules(FIRST, [x - 0.02 for x in FIRST])
  assert much.gain == pytest.approx(0.02) and much.holds and much.holds_later
  margin = stats.ttest_ind([x - 0.015 for x in FIRST], FIRST, equal_var=False, alternative="less").pvalue
  assert much.p_margin == pytest.approx(margin) and margin < 0.01
  little = statistics.rules(FIRST, [x - 0.003 for x in FIRST])
  assert not little.holds and little.holds_later and little.p_better < 0.25
  worse = statistics.rules(FIRST, [x + 0.01 for x in FIRST])
  assert not worse.holds and not worse.holds_later
  single = statistics.rules(FIRST, [2.0])
  assert single.p_margin is None and not single.holds and not single.holds_later


def test_a_ratio_is_tested_over_pairs():
  rng = np.random.default_rng(0)
  whole = rng.integers(50, 500, 400)
  draws = [statistics.ratio(0.3 * whole + rng.normal(0, np.sqrt(whole)), whole) for _ in range(300)]
  assert np.std([draw.value for draw in draws]) == pytest.approx(np.mean([draw.error for draw in draws]), rel=0.15)
  assert draws[0].value == pytest.approx(0.3, abs=4 * draws[0].error)
  # Where all wholes are alike, it is the test of a mean.
  values = rng.normal(0.1, 1.0, 30)
  found, known = statistics.ratio(7 * values, np.full(30, 7.0)), stats.ttest_1samp(values, 0.0)
  assert found == pytest.approx((values.mean(), stats.sem(values), known.pvalue))
  assert statistics.ratio([1.0], [4.0]) == (0.25, None, None)
  assert statistics.ratio([0.0, 0.0], [4.0, 5.0]) == (0.0, 0.0, 1.0)


def test_a_curve_is_read_between_its_points():
  points = [(100.0, 0.08), (300.0, 0.02), (200.0, 0.04)]
  assert statistics.interpolated(points, 150, 0.02) == pytest.approx((0.08 / math.sqrt(2), 300))
  assert statistics.interpolated(points, 90, 0.01) == (None, None)
  assert statistics.interpolated(points, 300.2, 0.05)[0] == pytest.approx(0.02)
  assert statistics.interpolated(points, 301, 0.05)[0] is None
  # Noise: more bytes, and no less loss; and a loss that is not there.
  noisy = [*points, (250.0, 0.05), (400.0, -0.001)]
  assert statistics.interpolated(noisy, 250, 0.03) == statistics.interpolated(points, 250, 0.03)
  assert statistics.interpolated(points, 150, -0.1) == (None, None)
