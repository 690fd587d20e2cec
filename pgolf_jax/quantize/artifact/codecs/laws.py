"""The distributions of rounded weights: generalised normal laws on a ladder of widths, in whole numbers.

f(x) ∝ exp(−|x / α|^β) with standard deviation σ; β = 2 is the normal law. Values are computed in decimal arithmetic,
which is specified to the last digit, so they are the same on every machine; `exp` of the C library may differ.
"""

import functools
from decimal import Context, Decimal

import numpy as np

STEPS = 8  # widths per octave
CENTRE = 32  # class of σ = 1
CLASSES = 96  # σ from 2^-4 to 2^8
PHASE_BITS = 3
PHASES = 1 << PHASE_BITS  # fractions of a unit that a mean may have

# β and α/σ = √(Γ(1/β)/Γ(3/β)).
SHAPES = (
  ("2", 1.4142135623730951),
  ("1.5", 1.1636657335448184),
  ("1", 0.7071067811865476),
  ("2.5", 1.5543010419188799),
)
_NODES = 16  # samples of the density per unit; a multiple of PHASES
_TOTAL = 1 << 26
_DECIMAL = Context(prec=17)
_FINE = 256  # samples of `_master` per unit of |x/α|


def sigma(width: int) -> float:
  """Returns the standard deviation of a class, from a table for one octave, without `exp` of the C library."""
  octave, step = divmod(width - CENTRE, STEPS)
  return _ROOTS[step] * 2.0**octave


# 2^(i/8), i = 0 … 7.
_ROOTS = (
  1.0,
  1.0905077326652577,
  1.189207115002721,
  1.2968395546510096,
  1.4142135623730951,
  1.5422108254079407,
  1.681792830507429,
  1.8340080864093424,
)


@functools.lru_cache(maxsize=1024)
def weights(width: int, shape: int, phase: int, low: int, high: int) -> np.ndarray:
  """Returns whole-number weights of the values low … high, at least 1: their share of the density around the mean.

  Args:
    width: class of the standard deviation, 0 … CLASSES − 1.
    shape: index into SHAPES.
    phase: mean in units of 1/PHASES, 0 … PHASES − 1.
    low, high: first and last value.
  """
  density = _density(width, shape)
  reach = (len(density) - 1) // _NODES + 1
  weight = np.ones(high - low + 1, np.float64)
  first, last = max(low, -reach), min(high, reach)
  if first > last:
    return weight
  # Trapezoids over [v − ½, v + ½] − mean, in nodes from 0; the density is even.
  centre = np.arange(first, last + 1) * _NODES - phase * (_NODES // PHASES)
  node = np.abs(centre[:, None] + np.arange(-_NODES // 2, _NODES // 2 + 1))
  sample = density[np.minimum(node, len(density) - 1)]
  sample[:, [0, -1]] *= 0.5
  # Sums of _NODES + 1 whole numbers below 2^40: exact in any order.
  mass = sample.sum(axis=1)
  weight[first - low : last - low + 1] += np.floor(mass * (_TOTAL / max(mass.sum(), 1.0)))
  return weight


@functools.lru_cache(maxsize=CLASSES)
def _density(width: int, shape: int) -> np.ndarray:
  """The density at 0, 1/_NODES, 2/_NODES … until it vanishes, as whole numbers of at most 2^32.

  Interpolated linearly in `_master` by single IEEE operations, which give the same bits on every machine.
  """
  master = _master(shape)
  scale = _FINE / (SHAPES[shape][1] * sigma(width) * _NODES)
  place = np.arange(int(min((len(master) - 2) / scale, _NODES * 260)) + 1) * scale
  index = place.astype(np.int64)
  return np.concatenate([np.rint(master[index] + (master[index + 1] - master[index]) * (place - index)), [0.0]])


@functools.lru_cache(maxsize=len(SHAPES))
def _master(shape: int) -> np.ndarray:
  """2^32 · exp(−t^β) at t = 0, 1/_FINE, 2/_FINE … until it rounds to 0."""
  beta = Decimal(SHAPES[shape][0])
  density = [1 << 32]
  while density[-1] > 0:
    power = _DECIMAL.power(Decimal(len(density)) / _FINE, beta)
    density.append(int(_DECIMAL.multiply(_DECIMAL.exp(-power), Decimal(1 << 32))))
  return np.array([*density, 0], np.float64)
