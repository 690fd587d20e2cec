"""The search for clips: it fills the budget, in few attempts."""

import numpy as np
import pytest

from pgolf_jax.errors import UserError
from pgolf_jax.quantize.make import fit
from pgolf_jax.settings import QuantizeConfig


def sized(bytes_at_one: float, parameters: int):
  """Returns an `attempt` whose artifacts are nearly as long as expected, and the list of multipliers it was given."""
  tried = []

  def attempt(config: QuantizeConfig) -> bytes:
    multiplier = config.mlp_clip_sigmas / QuantizeConfig().mlp_clip_sigmas
    tried.append(multiplier)
    return bytes(int(bytes_at_one - 0.9 * parameters / 8 * np.log2(multiplier)))

  return attempt, tried


@pytest.mark.parametrize("budget", [300_000, 410_000, 520_000])
def test_fit_fills_the_budget(budget):
  attempt, tried = sized(400_000, 800_000)
  config, data = fit(QuantizeConfig(), attempt, budget, 800_000)
  assert 0.9995 * budget <= len(data) <= budget
  assert len(attempt(config)) == len(data)
  assert len(tried) <= 6


def test_fit_takes_the_finest_grids_where_all_fit_and_refuses_where_none_does():
  attempt, _ = sized(400_000, 800_000)
  config, _ = fit(QuantizeConfig(), attempt, 10**7, 800_000)
  assert config.mlp_clip_sigmas == pytest.approx(0.2 * QuantizeConfig().mlp_clip_sigmas)
  with pytest.raises(UserError, match="below 50,000 bytes"):
    fit(QuantizeConfig(), attempt, 50_000, 800_000)
