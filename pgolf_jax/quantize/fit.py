"""The search for clips with which an artifact fills its budget."""

import dataclasses
import math
from collections.abc import Callable

from pgolf_jax.errors import UserError
from pgolf_jax.settings.config import QuantizeConfig

_CLIPS = ("matrix_clip_sigmas", "attn_clip_sigmas", "mlp_clip_sigmas", "embed_clip_sigmas")
_CLOSE = 0.0005  # share of the budget that may stay unused
_TRIES = 8
_LEAST, _MOST = 0.2, 8.0  # multiplier of the clips


def scaled(config: QuantizeConfig, multiplier: float) -> QuantizeConfig:
  """Returns the config with every clip multiplied: the larger, the coarser the grids and the fewer the bytes."""
  return dataclasses.replace(config, **{name: round(getattr(config, name) * multiplier, 4) for name in _CLIPS})


def fit(
  config: QuantizeConfig, attempt: Callable[[QuantizeConfig], bytes], budget: int, parameters: int
) -> tuple[QuantizeConfig, bytes]:
  """Finds the finest grids whose artifact has at most `budget` bytes, by one multiplier of all clips.

  Halving a grid's step costs every value one bit: bytes ≈ b − parameters/8 · log2(multiplier). Each attempt corrects b;
  once one attempt is too large and another is not, the next lies between them.

  Args:
    config: with the clips that multiplier 1 stands for.
    attempt: makes the artifact of a config.
    budget: bytes.
    parameters: of the model.

  Returns:
    The config with its clips, and the artifact's bytes.

  Raises:
    UserError: even the coarsest grids are too large.
  """
  low, high = _LEAST, _MOST  # the multiplier sought lies between them
  multiplier, best = 1.0, None
  for _ in range(_TRIES):
    tried = scaled(config, multiplier)
    data = attempt(tried)
    if len(data) <= budget:
      if best is None or len(data) > len(best[1]):
        best = tried, data
      if len(data) >= budget * (1 - _CLOSE) or multiplier <= _LEAST:
        break
      high = min(high, multiplier)
    else:
      if multiplier >= _MOST:
        break
      low = max(low, multiplier)
    aim = budget * (1 - _CLOSE / 2)
    guess = multiplier * 2 ** ((len(data) - aim) * 8 / parameters)
    bracketed = low > _LEAST and high < _MOST
    multiplier = guess if low < guess < high else math.sqrt(low * high) if bracketed else min(max(guess, low), high)
  if best is None:
    raise UserError(
      f"No clip up to {_MOST:g} times the configured ones brings the artifact below {budget:,} bytes "
      f"(the last try took {len(data):,}); lower quantize.matrix_bits or train a smaller model."
    )
  return best
