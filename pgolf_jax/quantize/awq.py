"""AWQ-lite: the few groups of input columns that matter most to the model's outputs get a finer grid.

Salience as in Lin et al., "AWQ" (2023), https://arxiv.org/abs/2306.00978, without its rescaling: activation size times
weight size. M outputs, N inputs.
"""

from collections.abc import Mapping

import numpy as np


def group_scores(weight_MxN: np.ndarray, act_rms_N: np.ndarray, group: int) -> np.ndarray:
  """Σ over each `group` neighbouring columns, from column 0, of rms_j · mean|W_·j|; left-over columns are in none."""
  salience_N = act_rms_N.astype(np.float64) * np.mean(np.abs(weight_MxN), axis=0, dtype=np.float64)
  groups = len(salience_N) // group
  return salience_N[: groups * group].reshape(groups, group).sum(axis=1)


def choose_groups(
  weights: Mapping[str, np.ndarray], act_rms: Mapping[str, np.ndarray], *, group: int, top_k: int
) -> dict[str, list[int]]:
  """First columns of the `top_k` best groups over all matrices, by matrix name; ties fall to the earlier one."""
  scored = [
    (-score, order, index * group, name)
    for order, (name, weight_MxN) in enumerate(weights.items())
    for index, score in enumerate(group_scores(weight_MxN, act_rms[name], group))
  ]
  chosen: dict[str, list[int]] = {}
  for _, _, start, name in sorted(scored)[:top_k]:
    chosen.setdefault(name, []).append(start)
  return {name: sorted(starts) for name, starts in chosen.items()}
