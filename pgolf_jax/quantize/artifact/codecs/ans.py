"""Symbols to bytes and back through constriction's ANS coder, in pieces, each coded under one distribution, and the
laws of a matrix's noise: the distributions of rounded values by the width, shape and phase of their density.

An ANS coder is a stack: what is written last is read first. The writer therefore collects all pieces and codes them in
reverse, so that they are read in the order in which they were given. Distributions are built from whole numbers held in
float64: the coder then rounds them the same way on every machine.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from decimal import Context, Decimal

import constriction
import numpy as np

from pgolf_jax.errors import ArtifactError

_Stack = constriction.stream.stack.AnsCoder
Distribution = constriction.stream.model.Categorical

SLAB = 1 << 16  # symbols that are held in a wider type at a time
_FIRST_CHUNK = 16
COUNT_WEIGHT = 32  # of one observed symbol, against the 1 that every symbol starts with


def distribution(weights: np.ndarray) -> Distribution:
  """Returns the distribution over 0 … len(weights) − 1 in proportion to whole numbers; no symbol is impossible."""
  return Distribution(np.asarray(weights, np.float64), perfect=False)


class Writer:
  """Collects pieces in the order in which a `Reader` will return them."""

  def __init__(self):
    self._pieces: list[tuple[np.ndarray, Distribution]] = []

  def put(self, symbols: np.ndarray, model: Distribution) -> None:
    self._pieces.append((np.ascontiguousarray(symbols, np.int32).reshape(-1), model))

  def finish(self) -> bytes:
    coder = _Stack()
    for symbols, model in reversed(self._pieces):
      coder.encode_reverse(symbols, model)
    return coder.get_compressed().astype("<u4").tobytes()


class Reader:
  """Returns the pieces that a Writer collected.

  Any bytes decode to some symbols; `finish` raises ArtifactError if they are not exactly what a Writer wrote.
  """

  def __init__(self, data: bytes):
    if len(data) % 4:
      raise ArtifactError("A stream of the artifact is not a whole number of 32-bit words: it is damaged.")
    words = np.frombuffer(data, "<u4").astype(np.uint32)
    if len(words) and words[-1] == 0:
      raise ArtifactError("A stream of the artifact ends in a word that no encoder writes: it is damaged.")
    self._coder = _Stack(words)

  def take(self, count: int, model: Distribution) -> np.ndarray:
    """Returns the next `count` symbols, int32."""
    return self._coder.decode(model, count) if count else np.zeros(0, np.int32)

  def finish(self) -> None:
    if not self._coder.is_empty():
      raise ArtifactError("A stream of the artifact has bytes left over: it is damaged.")


_RAW_BITS = 8  # stored at once
RAW = [distribution(np.ones(max(2, 1 << bits))) for bits in range(_RAW_BITS + 1)]
"""Uniform distributions by number of bits."""
_LENGTH = distribution(np.ones(33))


def put_bits(writer: Writer, values: np.ndarray, bits: int) -> None:
  """Writes the lowest bits of each value as they are."""
  for first in range(0, bits, _RAW_BITS):
    count = min(_RAW_BITS, bits - first)
    writer.put(values >> first & ((1 << count) - 1), RAW[count])


def take_bits(reader: Reader, count: int, bits: int) -> np.ndarray:
  """Reads what `put_bits` wrote, int32."""
  values = np.zeros(count, np.int32)
  for first in range(0, bits, _RAW_BITS):
    values |= reader.take(count, RAW[min(_RAW_BITS, bits - first)]) << first
  return values


def put_number(writer: Writer, number: int) -> None:
  """Writes a whole number below 2^31 in size: the bits that it takes, and these."""
  zigzag = number * 2 if number >= 0 else -2 * number - 1
  writer.put(np.array([zigzag.bit_length()]), _LENGTH)
  put_bits(writer, np.array([zigzag]), zigzag.bit_length())


def take_number(reader: Reader) -> int:
  bits = int(reader.take(1, _LENGTH)[0])
  zigzag = int(take_bits(reader, 1, bits)[0]) & 0xFFFFFFFF
  return -(zigzag + 1 >> 1) if zigzag & 1 else zigzag >> 1


def put_counted(writer: Writer, symbols: np.ndarray, alphabet: int) -> None:
  """Writes symbols of 0 … alphabet − 1 in growing chunks, each under the counts of all before it."""
  counts = np.zeros(alphabet, np.int64)
  for start, end in chunks(len(symbols)):
    writer.put(symbols[start:end], distribution(1 + COUNT_WEIGHT * counts))
    _add_counts(counts, symbols[start:end])


def take_counted(reader: Reader, count: int, alphabet: int) -> np.ndarray:
  """Reads what `put_counted` wrote, as 16-bit numbers so that they take less memory than the weights."""
  symbols = np.zeros(count, np.int16)
  counts = np.zeros(alphabet, np.int64)
  for start, end in chunks(count):
    symbols[start:end] = reader.take(end - start, distribution(1 + COUNT_WEIGHT * counts))
    _add_counts(counts, symbols[start:end])
  return symbols


def _add_counts(counts: np.ndarray, symbols: np.ndarray) -> None:
  for start in range(0, len(symbols), SLAB):  # `bincount` makes 64-bit numbers of what it counts
    counts += np.bincount(symbols[start : start + SLAB], minlength=len(counts))


def chunks(count: int) -> list[tuple[int, int]]:
  """Returns bounds that cut `count` into chunks, each a quarter of all before it, but at least 16."""
  bounds = [0]
  while bounds[-1] < count:
    bounds.append(min(count, bounds[-1] + max(_FIRST_CHUNK, bounds[-1] // 4)))
  return list(itertools.pairwise(bounds))


def joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
  """Returns all values in one int32 row."""
  return np.concatenate([np.zeros(0, np.int32), *arrays]).astype(np.int32)


def parts(values: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
  """Cuts the row into arrays of these shapes."""
  ends = np.cumsum([0, *map(math.prod, shapes)]).tolist()
  return [values[a:b].reshape(shape) for a, b, shape in zip(ends[:-1], ends[1:], shapes, strict=True)]


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
