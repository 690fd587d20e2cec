"""The `entropy` codec: an ANS coder under a model of what each kind of array holds.

Grids are coded under the models of grids.py, matrices of integers of any size and other arrays of them under those of
integers.py. An fp16 value is split into a high part (sign, exponent, leading digits), which is coded under the counts
of those before it, and a low part, which is nearly noise and stored as it is. Integers of 8 bits are coded under
counts. All distributions are built from whole numbers alone.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from pgolf_jax.errors import ArtifactError
from pgolf_jax.quantize.artifact.codecs import Content, zstd
from pgolf_jax.quantize.artifact.codecs.ans import (
  SLAB,
  Reader,
  Writer,
  distribution,
  joined,
  parts,
  put_counted,
  take_counted,
)
from pgolf_jax.quantize.artifact.codecs.grids import put_grids, take_grids
from pgolf_jax.quantize.artifact.codecs.integers import (
  Steps,
  put_integers,
  put_matrices,
  take_integers,
  take_matrices,
)

_LOW_BITS = 6  # of a float16, stored as they are
_LOW = distribution(np.ones(1 << _LOW_BITS))
_HIGH_ALPHABET = 1 << (16 - _LOW_BITS)
_COUNTED, _ZSTD = 0, 1  # first byte of a stream that holds no grids


def encode(content: Content, arrays: Sequence[np.ndarray], models: Sequence = (), steps: Sequence[Steps] = ()) -> bytes:
  """Encodes the arrays of one stream.

  Args:
    models: what arrays of content "grid", "matrix" or "integers" are stored under, as search.py chooses it.
    steps: of each matrix, for content "matrix".
  """
  match content:
    case "grid":
      return _written(put_grids, arrays, models)
    case "matrix":
      return _written(put_matrices, arrays, steps, models)
    case "integers":
      return _written(put_integers, arrays, models)
  # Zstandard is smaller for a model that has hardly been trained: rows of equal norm and scales still at 1 repeat.
  counted = bytes([_COUNTED]) + _written(_put_halves if content == "half" else _put_small, arrays)
  return min(counted, bytes([_ZSTD]) + zstd.encode(content, arrays), key=len)


def decode(
  content: Content, data: bytes, shapes: Sequence[tuple[int, ...]], steps: Sequence[Steps] = ()
) -> list[np.ndarray]:
  """Returns arrays of exactly these shapes. Raises ArtifactError if `data` cannot hold them."""
  match content:
    case "grid":
      return _read(take_grids, data, shapes)
    case "matrix":
      return _read(take_matrices, data, shapes, steps)
    case "integers":
      return _read(take_integers, data, shapes)
  method = bytes(data[:1])
  if method == bytes([_ZSTD]):
    return zstd.decode(content, data[1:], shapes)
  if method != bytes([_COUNTED]):
    raise ArtifactError("A stream of the artifact names a method that does not exist: it is damaged.")
  return _read(_take_halves if content == "half" else _take_small, data[1:], shapes)


def _written(put: Callable, *what: Sequence) -> bytes:
  writer = Writer()
  put(writer, *what)
  return writer.finish()


def _read(take: Callable, data: bytes, *what: Sequence) -> list[np.ndarray]:
  reader = Reader(data)
  arrays = take(reader, *what)
  reader.finish()
  return arrays


def _put_halves(writer: Writer, arrays: Sequence[np.ndarray]) -> None:
  bits = joined([a.astype(np.float16).reshape(-1).view(np.uint16) for a in arrays])
  put_counted(writer, bits >> _LOW_BITS, _HIGH_ALPHABET)
  writer.put(bits & ((1 << _LOW_BITS) - 1), _LOW)


def _take_halves(reader: Reader, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
  bits = take_counted(reader, sum(map(math.prod, shapes)), _HIGH_ALPHABET).view(np.uint16)
  bits <<= _LOW_BITS
  for start in range(0, len(bits), SLAB):
    part = bits[start : start + SLAB]
    part |= reader.take(len(part), _LOW).astype(np.uint16)
  return parts(bits.view(np.float16), shapes)


def _put_small(writer: Writer, arrays: Sequence[np.ndarray]) -> None:
  put_counted(writer, joined([a.reshape(-1) for a in arrays]) + 128, 256)


def _take_small(reader: Reader, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
  values = take_counted(reader, sum(map(math.prod, shapes)), 256)
  values -= 128
  return parts(values.astype(np.int8), shapes)
