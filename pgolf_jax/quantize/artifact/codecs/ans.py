"""Symbols to bytes and back through constriction's ANS coder, in pieces, each coded under one distribution.

An ANS coder is a stack: what is written last is read first. The writer therefore collects all pieces and codes them in
reverse, so that they are read in the order in which they were given. Distributions are built from whole numbers held in
float64: the coder then rounds them the same way on every machine.
"""

import itertools
import math
from collections.abc import Sequence

import constriction
import numpy as np

from pgolf_jax.errors import ArtifactError

_Stack = constriction.stream.stack.AnsCoder
Distribution = constriction.stream.model.Categorical

_FIRST_CHUNK = 16
_COUNT_WEIGHT = 32  # of one observed symbol, against the 1 that every symbol starts with


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


def put_counted(writer: Writer, symbols: np.ndarray, alphabet: int) -> None:
  """Writes symbols of 0 … alphabet − 1 in growing chunks, each under the counts of all before it."""
  for start, end in _chunks(len(symbols)):
    writer.put(symbols[start:end], _counted(symbols[:start], alphabet))


def take_counted(reader: Reader, count: int, alphabet: int) -> np.ndarray:
  """Reads what `put_counted` wrote."""
  symbols = np.zeros(count, np.int32)
  for start, end in _chunks(count):
    symbols[start:end] = reader.take(end - start, _counted(symbols[:start], alphabet))
  return symbols


def _counted(seen: np.ndarray, alphabet: int) -> Distribution:
  return distribution(1 + _COUNT_WEIGHT * np.bincount(seen, minlength=alphabet))


def _chunks(count: int) -> list[tuple[int, int]]:
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
