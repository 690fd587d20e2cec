"""What several runs say together: means, differences and how sure they are, and the rules of the field.

Tests are those of SciPy. Scores are losses or bits per byte: lower is better.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

RULE_NATS = 0.005
"""A record has to be better by this many nats per token (github.com/openai/parameter-golf, README)…"""

RULE_P = 0.01
"""…at this one-sided p."""

LATER_RULE_P = 0.25
"""One-sided p below which the organisers later let a row on the leaderboard (their pull request 1902)."""


class Published(NamedTuple):
  """A published result: its seeds' scores on the whole official validation set, after test-time training."""

  name: str
  source: str
  seeds: tuple[int, ...]
  bpb: tuple[float, ...]
  loss: tuple[float, ...]
  targets: int
  text_bytes: int


REFERENCE = Published(
  name="PyTorch reference, 8 × H100",
  source="github.com/openai/parameter-golf, pull request 2140",
  seeds=(42, 0, 314),
  bpb=(1.05590816, 1.05838308, 1.05676598),
  loss=(2.31072442, 2.31614048, 2.31260166),
  targets=47_853_343,
  text_bytes=151_080_645,
)


class Summary(NamedTuple):
  """Mean, standard deviation (n − 1) and half the width of the 95 % interval of the mean (t); None for one value."""

  count: int
  mean: float
  deviation: float | None
  half_width: float | None


def summary(values: Sequence[float]) -> Summary:
  """Returns the summary of at least one value."""
  values = np.asarray(values, np.float64)
  count, mean = len(values), float(np.mean(values))
  if count < 2:
    return Summary(count, mean, None, None)
  deviation = float(np.std(values, ddof=1))
  return Summary(count, mean, deviation, float(stats.t.ppf(0.975, count - 1)) * deviation / math.sqrt(count))


class Difference(NamedTuple):
  """How much higher the second group's values are than the first's.

  Attributes:
    mean: mean of the second less mean of the first.
    p: two-sided.
    p_lower: one-sided, that the second is lower.
    half_width: half the 95 % interval of `mean`.
    count: pairs, or values of both groups together.
  """

  mean: float
  p: float | None
  p_lower: float | None
  half_width: float | None
  count: int


def welch(first: Sequence[float], second: Sequence[float], margin: float = 0.0) -> Difference:
  """Returns Welch's t-test of two groups; p is None where a group has one value only or nothing varies.

  Args:
    margin: the p-values are those of `second + margin` against `first`: that it is lower by more than the margin.
  """
  first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
  mean, count = float(second.mean() - first.mean()), len(first) + len(second)
  if min(len(first), len(second)) < 2 or max(np.ptp(first), np.ptp(second)) == 0:
    return Difference(mean, None, None, None, count)
  test = stats.ttest_ind(second + margin, first, equal_var=False)
  lower = stats.ttest_ind(second + margin, first, equal_var=False, alternative="less")
  low, high = test.confidence_interval(0.95)
  return Difference(mean, float(test.pvalue), float(lower.pvalue), float(high - low) / 2, count)


def paired(first: Sequence[float], second: Sequence[float]) -> Difference:
  """Returns the paired t-test of two sets of values, entry by entry; p is None for fewer than two pairs."""
  first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
  mean, count = float(np.mean(second - first)), len(first)
  if count < 2 or np.ptp(second - first) == 0:
    return Difference(mean, None, None, None, count)
  test = stats.ttest_rel(second, first)
  low, high = test.confidence_interval(0.95)
  p_lower = float(stats.ttest_rel(second, first, alternative="less").pvalue)
  return Difference(mean, float(test.pvalue), p_lower, float(high - low) / 2, count)


class Ratio(NamedTuple):
  """A ratio of two sums, its standard error and Student's two-sided p that it is 0; None for one pair."""

  value: float
  error: float | None
  p: float | None


def ratio(part_n: Sequence[float], whole_n: Sequence[float]) -> Ratio:
  """Returns Σ part / Σ whole over independent pairs, such as the bits and the bytes of documents.

  The error is that of the mean residual, part − ratio · whole, over the mean of the whole (the delta method).
  """
  part_n, whole_n = np.asarray(part_n, np.float64), np.asarray(whole_n, np.float64)
  count, value = len(part_n), float(part_n.sum() / whole_n.sum())
  if count < 2:
    return Ratio(value, None, None)
  error = float(np.std(part_n - value * whole_n, ddof=1)) * math.sqrt(count) / float(whole_n.sum())
  return Ratio(value, error, float(2 * stats.t.sf(abs(value) / error, count - 1)) if error > 0 else float(value == 0))


class Rules(NamedTuple):
  """The field's rules for a new record over a baseline.

  Attributes:
    gain: nats per token by which the challenger is better on average.
    p_margin: one-sided Welch p that it is better by more than 0.005 nats.
    p_better: one-sided Welch p that it is better at all.
  """

  gain: float
  p_margin: float | None
  p_better: float | None

  @property
  def holds(self) -> bool:
    """Whether the challenger beats the baseline by 0.005 nats at p < 0.01."""
    return self.p_margin is not None and self.p_margin < RULE_P

  @property
  def holds_later(self) -> bool:
    """Whether it is better at p < 0.25, as the organisers asked for later."""
    return self.p_better is not None and self.p_better < LATER_RULE_P


def rules(baseline_loss: Sequence[float], loss: Sequence[float]) -> Rules:
  """Returns what the rules say of a challenger's losses, in nats per token, one a seed."""
  margin, better = welch(baseline_loss, loss, RULE_NATS), welch(baseline_loss, loss)
  return Rules(-better.mean, margin.p_lower, better.p_lower)


def interpolated(points: Sequence[tuple[float, float]], size: float, loss: float) -> tuple[float | None, float | None]:
  """Returns (loss at a size, size at a loss) on the line through points (size, logarithm of the loss).

  Points without a loss above 0 are left out, and so are losses no lower than at a smaller size, which are noise. None
  stands for what lies outside the points; a size up to 0.1 % above the largest takes that one's loss.
  """
  line: list[tuple[float, float]] = []
  for x, y in sorted(points):
    if y > 0 and (not line or math.log(y) < line[-1][1]):
      line.append((x, math.log(y)))
  if not line or loss <= 0:
    return None, None
  sizes, logs = np.array(line).T
  at_size = math.exp(np.interp(size, sizes, logs)) if sizes[0] <= size <= 1.001 * sizes[-1] else None
  is_within = logs[-1] <= math.log(loss) <= logs[0]
  return at_size, float(np.interp(math.log(loss), logs[::-1], sizes[::-1])) if is_within else None
