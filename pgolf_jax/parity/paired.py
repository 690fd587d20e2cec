"""Means of paired differences, how sure they are, and Student's test of them."""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

BLOCKS = 20
"""Into which a series is cut for the error of its mean."""


class Paired(NamedTuple):
  """A mean of paired differences, B less A, with its standard error and Student's two-sided p; None for one pair."""

  mean: float
  error: float | None
  count: int
  p: float | None


def paired(difference_N: np.ndarray) -> Paired:
  """Returns the mean of at least one difference."""
  count, mean = len(difference_N), float(np.mean(difference_N))
  if count < 2:
    return Paired(mean, None, count, None)
  return tested(mean, float(np.std(difference_N, ddof=1)) / math.sqrt(count), count)


def tested(mean: float, error: float, count: int) -> Paired:
  """Returns a mean with Student's test of it."""
  p = float(2 * stats.t.sf(abs(mean) / error, count - 1)) if error > 0 else float(mean == 0)
  return Paired(mean, error, count, p)


def paired_blocks(difference_N: np.ndarray) -> Paired:
  """Returns the mean of a series; its error comes from the means of blocks, since neighbours are not independent."""
  if len(difference_N) < 2 * BLOCKS:
    return paired(difference_N)
  block_means = np.array([part.mean() for part in np.array_split(difference_N, BLOCKS)])
  return paired(block_means)._replace(mean=float(difference_N.mean()))
