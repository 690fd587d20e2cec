"""How the arrays of an artifact become bytes: one codec for a whole file, chosen by name."""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

Content = Literal["grid", "small", "half"]
"""What a stream holds: int8 matrices of one kind from the quantiser, other int8 arrays, or float16 arrays."""


class Codec(Protocol):
  """Both ways, with the same bits on every machine.

  `decode` is given what the artifact's table says: it returns arrays of exactly those shapes or raises ArtifactError,
  whatever the bytes.
  """

  def encode(self, content: Content, arrays: Sequence[np.ndarray]) -> bytes: ...

  def decode(self, content: Content, data: bytes, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]: ...


NAMES = ("zstd", "entropy")


def codec(name: str) -> Codec:
  """The codec of that name, one of NAMES."""
  from pgolf_jax.quantize.artifact.codecs import entropy, plain

  return {"zstd": plain, "entropy": entropy}[name]
