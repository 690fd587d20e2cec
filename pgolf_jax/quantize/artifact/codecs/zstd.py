"""The `zstd` codec: the bytes of every stream, laid out so that neighbours resemble each other, through Zstandard."""

import math
from collections.abc import Sequence

import numpy as np
import zstandard

from pgolf_jax.errors import ArtifactError
from pgolf_jax.quantize.artifact.codecs import Content

_LEVEL = 19
# Rounded noise has no repeats: on matrices from the quantiser the fastest level is as small as the slowest, 600 times
# as fast, and 10 % smaller than the levels between them, which take chance repeats for matches.
_GRID_LEVEL = 1
_MATRICES = ("grid", "matrix")
_TYPES = {"half": "<f2", "matrix": "<i4", "integers": "<i4"}  # others are int8


def encode(content: Content, arrays: Sequence[np.ndarray]) -> bytes:
  """Encodes the arrays of one stream."""
  level = _GRID_LEVEL if content in _MATRICES else _LEVEL
  return compress(b"".join(_laid_out(content, a) for a in arrays), level)


def decode(content: Content, data: bytes, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
  """Returns arrays of exactly these shapes. Raises ArtifactError if `data` does not hold them."""
  dtype = np.dtype(_TYPES.get(content, "i1"))
  sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
  raw = decompress(data, sum(sizes), sum(sizes))
  ends = np.cumsum([0, *sizes]).tolist()
  return [
    _restored(content, raw[start:end], shape, dtype)
    for start, end, shape in zip(ends[:-1], ends[1:], shapes, strict=True)
  ]


def compress(raw: bytes, level: int = _LEVEL) -> bytes:
  """Returns one Zstandard frame that states its size and has no checksum."""
  return zstandard.ZstdCompressor(level=level, write_checksum=False).compress(raw)


def decompress(data: bytes, least: int, most: int) -> bytes:
  """Returns what a frame holds. Raises ArtifactError unless it states a size from `least` to `most` and has it."""
  try:
    # The stated size decides how much memory is taken, so it is checked first.
    stated = zstandard.frame_content_size(data)
    if not least <= stated <= most:
      raise ArtifactError(
        f"A part of the artifact claims {stated} bytes where {least} to {most} are possible: it is damaged."
      )
    return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
  except zstandard.ZstdError as error:
    raise ArtifactError(f"A part of the artifact cannot be decompressed ({error}): it is damaged.") from error


def _laid_out(content: Content, array: np.ndarray) -> bytes:
  """Matrices by column, whose values are of one size; wider types as all low bytes, then all those above them."""
  if content in _MATRICES:
    array = array.T
  if content not in _TYPES:
    return np.ascontiguousarray(array).tobytes()
  values = np.ascontiguousarray(array, _TYPES[content]).reshape(-1)
  if content != "half":
    values = values << 1 ^ values >> 31  # the sign as lowest bit, so that the upper bytes of small values are 0
  return values.view(np.uint8).reshape(-1, values.itemsize).T.tobytes()


def _restored(content: Content, raw: bytes, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  if content not in _TYPES:
    values = np.frombuffer(raw, dtype)
  else:
    values = np.empty(math.prod(shape), dtype)
    values.view(np.uint8).reshape(-1, dtype.itemsize)[...] = np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, -1).T
    if content != "half":
      sign = values & 1
      values >>= 1
      values &= 0x7FFFFFFF
      values ^= np.negative(sign, out=sign)
  if content in _MATRICES:
    return np.ascontiguousarray(values.reshape(shape[::-1]).T)
  return values.reshape(shape).astype(dtype.newbyteorder("="), copy=False)
