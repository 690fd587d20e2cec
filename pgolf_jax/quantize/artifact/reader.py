"""Reading an artifact: from a file's bytes to its tensors, its weights and its settings.

Layout, little-endian:

  magic "PGOLFJAX" | u16 version | u16 codec | u32 header bytes | 16-byte BLAKE2b of all that follows it and of the
  16 bytes before it | header | streams, one after the other

The header is JSON under Zstandard: `config` (any JSON object), `tensors` (the table: form, name, shape and what else
the form needs), `streams` (bytes of each). Which arrays lie in which stream follows from the table; see streams.py.

Reading takes any bytes and either returns what was written or raises ArtifactError: the claims in the header are
checked against each other and against a bound on parameters before memory is taken for them. Weights are computed with
NumPy alone, so that they do not depend on JAX's version or backend.
"""

import dataclasses
import hashlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pgolf_jax.errors import ArtifactError, UserError
from pgolf_jax.model import params as parameters
from pgolf_jax.quantize.artifact.banks import rebank
from pgolf_jax.quantize.artifact.codecs import NAMES, Content, entropy, zstd
from pgolf_jax.quantize.artifact.streams import Stream, assemble, check_entry, parameter_count, split
from pgolf_jax.quantize.artifact.tensors import Quantized
from pgolf_jax.settings import Settings
from pgolf_jax.settings.load import from_dict

MAGIC = b"PGOLFJAX"
VERSION = 1
MAX_PARAMETERS = 2**28  # 1 GiB of fp32 weights
PREFIX = struct.Struct("<8sHHI")
_DIGEST = 16
_MAX_HEADER = 1 << 20  # bytes of JSON
START = PREFIX.size + _DIGEST
"""Bytes before the header."""


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
  codec, header, header_bytes, body = _unpack(data)
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


def pack(codec: str, header: dict, streams: list[bytes]) -> bytes:
  """Returns the bytes of a file. Raises ArtifactError if the header is too large."""
  text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
  if len(text) > _MAX_HEADER:
    raise ArtifactError(f"The artifact's config and table take {len(text)} bytes; at most {_MAX_HEADER} are allowed.")
  packed = zstd.compress(text)
  prefix = PREFIX.pack(MAGIC, VERSION, NAMES.index(codec), len(packed))
  body = b"".join([packed, *streams])
  return prefix + _digest(prefix, body) + body


class _Frame(NamedTuple):
  """A file taken apart; its streams are not decoded yet."""

  codec: str
  header: dict
  header_bytes: int  # from the beginning of the file to the streams
  streams: bytes


def _unpack(data: bytes) -> _Frame:
  """Takes a file apart, with its checksum verified and every claim of its header within bounds.

  Raises:
    ArtifactError: `pack` did not make these bytes.
  """
  if len(data) < START:
    raise ArtifactError(f"The file has {len(data)} bytes, fewer than an artifact's first {START}: it is truncated.")
  magic, version, codec, size = PREFIX.unpack_from(data)
  if magic != MAGIC:
    raise ArtifactError("The file is not an artifact of this program: it does not begin with PGOLFJAX.")
  if version != VERSION:
    raise ArtifactError(f"The artifact has format version {version}, this program reads {VERSION}; write it anew.")
  body = data[START:]
  if _digest(data[: PREFIX.size], body) != data[PREFIX.size : START]:
    raise ArtifactError("The artifact's checksum does not match its content: it is truncated or damaged.")
  if codec >= len(NAMES) or size > len(body):
    raise ArtifactError("The artifact's first bytes contradict its content: it is damaged.")
  return _Frame(NAMES[codec], _checked_header(body[:size]), START + size, body[size:])


def _digest(prefix: bytes, body: bytes) -> bytes:
  digest = hashlib.blake2b(prefix, digest_size=_DIGEST)
  digest.update(body)
  return digest.digest()


def _checked_header(packed: bytes) -> dict:
  text = zstd.decompress(packed, 0, _MAX_HEADER)
  try:
    header = json.loads(text, parse_constant=_refuse_constant)
  except (ValueError, RecursionError) as error:
    raise ArtifactError(f"The artifact's header is not JSON ({error}): it is damaged.") from error
  if not isinstance(header, dict) or sorted(header) != ["config", "streams", "tensors"]:
    raise ArtifactError("The artifact's header lacks its three parts: it is damaged.")
  config, lengths, table = header["config"], header["streams"], header["tensors"]
  if not isinstance(config, dict) or not isinstance(lengths, list) or not isinstance(table, list):
    raise ArtifactError("The artifact's header has parts of the wrong type: it is damaged.")
  if not all(type(n) is int and n >= 0 for n in lengths):
    raise ArtifactError("The artifact's header claims streams of impossible length: it is damaged.")
  for entry in table:
    check_entry(entry)
  names = [entry[1] for entry in table]
  if len(set(names)) != len(names):
    raise ArtifactError("The artifact's table names a tensor twice: it is damaged.")
  count = sum(parameter_count(entry) for entry in table)
  if count > MAX_PARAMETERS:
    raise ArtifactError(f"The artifact claims {count} parameters; this program reads at most {MAX_PARAMETERS}.")
  return header


def _refuse_constant(name: str):
  raise ValueError(f"{name} is no number")
