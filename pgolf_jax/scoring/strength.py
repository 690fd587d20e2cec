"""How strongly each distribution is tilted towards its hint, learnt online from the targets scored before it.

Every expert of a grid has an opinion of the strength: where the model gives a hint the log-odds L, the expert (a, b)
gives it aL + b. The experts' distributions are mixed by Bayes' rule: an expert's weight is in proportion to the
probability that it has given to the targets so far, which is the exponentially weighted forecaster with learning rate 1
under log loss. No sequence of targets makes the mixture more than log(number of experts) nats worse in all than the
best expert. Hints of different kinds have weights of their own (`scoring.hints.kind`). Sources: Cesa-Bianchi & Lugosi,
Prediction, Learning, and Games (2006), chapter 9; for mixing log-odds, Mahoney, PAQ (2005).

With q' = Σ w q'(expert), the mixture gives the hint q' and multiplies every other probability by (1 − q') / (1 − q).
That is a tilt by the strength β = log-odds(q') − log-odds(q), which does not depend on the target.

Letters: M targets with a hint, E experts.
"""

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Integer

SLOPES = (0.4, 0.7, 1.0)
SHIFTS = (-0.5, 0.0, 0.5, 1.0, 1.5, 2.5)
"""The grid of a and b. With (1, 0) the model is left as it is; an a below 1 trusts it less the surer it is."""

_SLOPE_E, _SHIFT_E = (x.ravel() for x in np.meshgrid(SLOPES, SHIFTS, indexing="ij"))
_LARGEST = 16.0  # log-odds; beyond, 1 − q has no digits in float32


class Strengths:
  """The experts' weights. A target's strength comes from the targets before it.

  Args:
    kinds: number of kinds of hints.
  """

  def __init__(self, kinds: int):
    self._log_weight_KxE = np.zeros((kinds, len(_SLOPE_E)))  # up to a constant for each kind

  def learn(
    self, hint_nll_M: Float[np.ndarray, "M"], is_right_M: Bool[np.ndarray, "M"], kind_M: Integer[np.ndarray, "M"]
  ) -> Float32[np.ndarray, "M"]:
    """Returns the strength β of the next targets' tilts, in nats, each learnt from those before it.

    The result is the same to rounding for every division of the targets into calls.

    Args:
      hint_nll_M: −log q, the model's nats of the hints.
      is_right_M: whether a hint is the target; it changes the strengths of later targets only.
      kind_M: kind of the hint, below `kinds`.
    """
    boost_M = np.empty(len(kind_M), np.float32)
    for kind in np.unique(kind_M):
      at = np.flatnonzero(kind_M == kind)
      odds_m = log_odds(hint_nll_M[at])
      wrong_mxE = np.exp(-(_SLOPE_E * odds_m[:, None] + _SHIFT_E))
      right_mxE = 1 / (1 + wrong_mxE)  # q'
      wrong_mxE *= right_mxE  # 1 − q'
      # The model's own q and 1 − q are the same for every expert and leave the weights as they are.
      told_mxE = np.log(np.where(is_right_M[at][:, None], right_mxE, wrong_mxE))
      after_mxE = self._log_weight_KxE[kind] + np.cumsum(told_mxE, axis=0)
      weight_mxE = np.concatenate([self._log_weight_KxE[kind][None], after_mxE[:-1]])
      weight_mxE = np.exp(weight_mxE - weight_mxE.max(axis=1, keepdims=True))
      mixed_m = np.vecdot(weight_mxE, right_mxE) / np.vecdot(weight_mxE, wrong_mxE)
      boost_M[at] = np.log(mixed_m) - odds_m
      self._log_weight_KxE[kind] = after_mxE[-1] - after_mxE[-1].max()
    return boost_M


def log_odds(nll: Float[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
  """Returns log(p / (1 − p)) of p = e^−nll, within ±16."""
  nll = np.maximum(nll.astype(np.float64), np.exp(-_LARGEST))  # rounding can leave it at 0 or a little below
  return np.maximum(-nll - np.log(-np.expm1(-nll)), -_LARGEST)


def tilted(
  nll: Float[np.ndarray, "M"],
  hint_nll: Float[np.ndarray, "M"],
  is_hint: Bool[np.ndarray, "M"],
  boost: Float[np.ndarray, "M"],
) -> Float32[np.ndarray, "M"]:
  """Returns what `scoring.hints.tilt` does where the gate is open, on the host.

  Args:
    nll: −log p of tokens under the model, nats.
    hint_nll: that of the hint in their place.
    is_hint: whether a token is the hint.
    boost: β of each tilt, nats.
  """
  hint_nll, boost = np.maximum(hint_nll.astype(np.float64), 1e-12), boost.astype(np.float64)
  log_normalizer = np.logaddexp(np.log(-np.expm1(-hint_nll)), boost - hint_nll)
  return (nll - np.where(is_hint, boost, 0.0) + log_normalizer).astype(np.float32)
