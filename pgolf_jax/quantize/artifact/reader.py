"""Reading an artifact: from a file's bytes to its tensors, its weights and its settings.

Reading takes any bytes and either returns what was written or raises ArtifactError: the claims in the header are
checked against each other and against a bound on parameters before memory is taken for them. Weights are computed with
NumPy alone, so that they do not depend on JAX's version or backend.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pgolf_jax.errors import ArtifactError, UserError
from pgolf_jax.model import params as parameters
from pgolf_jax.quantize.artifact import frame
from pgolf_jax.quantize.artifact.codecs import Content, entropy, zstd
from pgolf_jax.quantize.artifact.streams import Stream, assemble, split
from pgolf_jax.quantize.artifact.tensors import Quantized, rebank
from pgolf_jax.settings import Settings
from pgolf_jax.settings.load import from_dict


@dataclasses.dataclass(frozen=True)
class Artifact:
  """What a file holds."""

  config: dict  # the JSON object that travels with the weights
  tensors: dict[str, Quantized]  # by matrix name
  codec: str
  stream_bytes: dict[str, int]  # compressed bytes by stream, in file order; all before the streams under "header"

  def params(self) -> dict[str, np.ndarray]:
    """Returns fp32 parameters under their bank names, the same bits on every machine.

    Raises:
      ArtifactError: a bank's matrices are incomplete or differ in shape.
    """
    try:
      return rebank(self.tensors, lambda name: self.tensors[name].dequantize())
    except (KeyError, ValueError) as error:
      raise ArtifactError(f"The artifact's matrices do not make up whole banks ({error}): it is damaged.") from error


def load(path: Path) -> tuple[Settings, dict[str, np.ndarray]]:
  """Returns the settings that an artifact's file carries, and its fp32 parameters under their bank names.

  Raises:
    UserError: there is no such file, it is not an artifact, or its parameters do not match its settings.
  """
  if not path.is_file():
    raise UserError(f"There is no artifact {path}; `pgolf run` or `pgolf quantize` makes one.")
  artifact = read(path.read_bytes())
  settings = from_dict(artifact.config, where=f"the config in {path}")
  params = artifact.params()
  parameters.check(settings.model, params, where=str(path))
  return settings, params


def read(data: bytes) -> Artifact:
  """Returns what `writer.write` was given. Raises ArtifactError on anything that it did not make."""
  codec, header, header_bytes, body = frame.unpack(data)
  table, lengths = header["tensors"], header["streams"]
  streams = split(table)
  if len(lengths) != len(streams) or sum(lengths) != len(body):
    raise ArtifactError("The artifact's streams are not those of its table: it is damaged.")
  decoded: dict[tuple[str, str], np.ndarray] = {}
  start = 0
  for stream, length in zip(streams, lengths, strict=True):
    shapes = [shape for *_, shape in stream.arrays]
    arrays = decode_stream(codec, stream.content, body[start : start + length], shapes)
    require_finite(stream, arrays)
    decoded |= {(name, field): array for (name, field, _), array in zip(stream.arrays, arrays, strict=True)}
    start += length
  tensors = {entry[1]: assemble(entry, decoded) for entry in table}
  sizes = dict(zip([stream.name for stream in streams], lengths, strict=True))
  return Artifact(header["config"], tensors, codec, {"header": header_bytes, **sizes})


def decode_stream(codec: str, content: Content, data: bytes, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
  """Returns a stream's arrays, of exactly these shapes. Raises ArtifactError if `data` cannot hold them."""
  return {"zstd": zstd, "entropy": entropy}[codec].decode(content, data, shapes)


def require_finite(stream: Stream, arrays: list[np.ndarray]) -> None:
  """Raises ArtifactError if an fp16 value is infinite or not a number."""
  if stream.content == "half":
    for (name, *_), array in zip(stream.arrays, arrays, strict=True):
      if not np.isfinite(array).all():
        raise ArtifactError(f"{name} holds values that are not finite in fp16, which no artifact may hold.")
