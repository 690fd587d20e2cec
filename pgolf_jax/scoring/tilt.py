"""The tilt of a distribution towards a hint. Recipe section 6."""

import numpy as np
from jaxtyping import Bool, Float, Float32, Integer


def tilt(
  nll_N: Float[np.ndarray, "*N"],
  hint_logp_N: Float[np.ndarray, "*N"],
  hits_N: Bool[np.ndarray, "*N"],
  gate_N: Bool[np.ndarray, "*N"],
  boost: float,
) -> Float32[np.ndarray, "*N"]:
  """NLL − β·[target = hint] + log(1 + q(e^β − 1)) where the gate is open, with q the hint's probability; in float32.

  Whatever token the hint is, the tilted probabilities of all tokens sum to 1.

  Args:
    nll_N: nats of each target before the tilt.
    hint_logp_N: log q.
    hits_N: whether the target is the hint.
    boost: β, in nats.
  """
  beta = np.float32(boost)
  q_N = np.exp(np.minimum(hint_logp_N, 0).astype(np.float32))
  tilted_N = nll_N - beta * hits_N.astype(np.float32) + np.log1p(q_N * np.expm1(beta))
  return np.where(gate_N, tilted_N, nll_N).astype(np.float32)


def tilt_distribution(
  logp_NxV: Float[np.ndarray, "N V"], hint_N: Integer[np.ndarray, "N"], gate_N: Bool[np.ndarray, "N"], boost: float
) -> Float32[np.ndarray, "N V"]:
  """Log-probabilities of all tokens after the tilt."""
  hint_logp = np.take_along_axis(logp_NxV, hint_N[:, None], axis=1)
  hits = np.arange(logp_NxV.shape[1]) == hint_N[:, None]
  return -tilt(-logp_NxV, np.broadcast_to(hint_logp, logp_NxV.shape), hits, gate_N[:, None], boost)
