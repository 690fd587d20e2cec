"""The `entropy` codec: an ANS coder under models of what each kind of array holds.

Grids under the model of grids.py; fp16 values as a counted high part (sign, exponent, leading digits) and a low part,
which is as good as noise; small integers counted. Every model is derived from whole numbers alone.
"""

import math
from collections.abc import Sequence

import numpy as np

from pgolf_jax.errors import ArtifactError
from pgolf_jax.quantize.artifact.codecs import Content, plain
from pgolf_jax.quantize.artifact.codecs.ans import Reader, Writer, joined, parts, put_counted, table, take_counted
from pgolf_jax.quantize.artifact.codecs.grids import put_grids, take_grids

_LOW_BITS = 6  # of a float16, stored as they are
_LOW = table(np.ones(1 << _LOW_BITS))
_HIGH_ALPHABET = 1 << (16 - _LOW_BITS)
_COUNTED, _ZSTD = 0, 1  # first byte of a stream that is no grid's


def encode(content: Content, arrays: Sequence[np.ndarray]) -> bytes:
  if content == "grid":
    return _coded(put_grids, arrays)
  # A model that has hardly been trained repeats values (rows of equal norm, scales still at 1): Zstandard finds them.
  coded = bytes([_COUNTED]) + _coded(_put_halves if content == "half" else _put_small, arrays)
  return min(coded, bytes([_ZSTD]) + plain.encode(content, arrays), key=len)


def decode(content: Content, data: bytes, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
  if content == "grid":
    return _decoded(take_grids, data, shapes)
  if data[:1] == bytes([_ZSTD]):
    return plain.decode(content, data[1:], shapes)
  if data[:1] != bytes([_COUNTED]):
    raise ArtifactError("A stream of the artifact names a method that does not exist: it is damaged.")
  return _decoded(_take_halves if content == "half" else _take_small, data[1:], shapes)


def _coded(put, arrays: Sequence[np.ndarray]) -> bytes:
  writer = Writer()
  put(writer, arrays)
  return writer.finish()


def _decoded(take, data: bytes, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
  reader = Reader(data)
  arrays = take(reader, shapes)
  reader.finish()
  return arrays


def _put_halves(writer: Writer, arrays: Sequence[np.ndarray]) -> None:
  bits = joined([a.astype(np.float16).reshape(-1).view(np.uint16) for a in arrays])
  put_counted(writer, bits >> _LOW_BITS, _HIGH_ALPHABET)
  writer.put(bits & ((1 << _LOW_BITS) - 1), _LOW)


def _take_halves(reader: Reader, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
  count = sum(map(math.prod, shapes))
  # In 16 bits at once, so that no more is held than the values will take as fp32.
  bits = take_counted(reader, count, _HIGH_ALPHABET).astype(np.uint16)
  bits <<= _LOW_BITS
  bits |= reader.take(count, _LOW).astype(np.uint16)
  return parts(bits.view(np.float16), shapes)


def _put_small(writer: Writer, arrays: Sequence[np.ndarray]) -> None:
  put_counted(writer, joined([a.reshape(-1) for a in arrays]) + 128, 256)


def _take_small(reader: Reader, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
  values = take_counted(reader, sum(map(math.prod, shapes)), 256)
  values -= 128
  return parts(values.astype(np.int8), shapes)
