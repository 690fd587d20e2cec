"""The artifact: one file with everything needed to rebuild the weights, and nothing that could run.

Layout, little-endian:

  magic "PGOLFJAX" | u16 version | u16 codec | u32 header bytes | 16-byte BLAKE2b of all that follows it and of the
  16 bytes before it | header | streams, one after the other

The header is JSON under Zstandard: `config` (any JSON object), `tensors` (the table: form, name, shape and what else
the form needs), `streams` (bytes of each). Which arrays lie in which stream follows from the table (streams.py).

Reading takes any bytes and either returns what `write` was given or raises ArtifactError: the claims in the header are
checked against each other and against `MAX_PARAMETERS` before memory is taken for them. Reading needs NumPy alone, not
JAX, so that the weights do not depend on JAX's version or backend.
"""

import dataclasses
import hashlib
import json
import struct
from collections.abc import Mapping

import numpy as np

from pgolf_jax.errors import ArtifactError
from pgolf_jax.quantize.artifact.codecs import NAMES, codec, plain
from pgolf_jax.quantize.artifact.names import rebank
from pgolf_jax.quantize.artifact.streams import Stream, assemble, check_entry, describe, parameter_count, part, split
from pgolf_jax.quantize.artifact.tensors import Quantized

MAGIC = b"PGOLFJAX"
VERSION = 1
MAX_PARAMETERS = 2**28  # more are refused: 1 GiB of fp32 weights
_PREFIX = struct.Struct("<8sHHI")
_DIGEST = 16
_MAX_HEADER = 1 << 20  # bytes of JSON
_START = _PREFIX.size + _DIGEST


@dataclasses.dataclass(frozen=True)
class Artifact:
  """What a file holds. `stream_bytes`: compressed bytes by stream, in file order, the header's under "header"."""

  config: dict
  tensors: dict[str, Quantized]
  codec: str
  stream_bytes: dict[str, int]

  def params(self) -> dict[str, np.ndarray]:
    """fp32 parameters under their bank names, the same bits on every machine."""
    return rebank(self.tensors, lambda name: self.tensors[name].dequantize())


def write(config: Mapping[str, object], tensors: Mapping[str, Quantized], codec_name: str = "entropy") -> bytes:
  """The file's bytes; the same for the same arguments.

  Args:
    config: JSON object that travels with the weights, such as `to_dict(settings)`.
    tensors: the model, by matrix name, as `quantize` gives it.
    codec_name: one of codecs.NAMES.

  Raises:
    ArtifactError: a step or an fp16 parameter is not finite.
  """
  table = [describe(name, tensor) for name, tensor in tensors.items()]
  parts = []
  for stream in split(table):
    arrays = [part(tensors[name], field) for name, field, _ in stream.arrays]
    _require_finite(stream, arrays)
    parts.append(codec(codec_name).encode(stream.content, arrays))
  header = {"config": dict(config), "streams": [len(part) for part in parts], "tensors": table}
  text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
  if len(text) > _MAX_HEADER:
    raise ArtifactError(f"The artifact's config and table take {len(text)} bytes; at most {_MAX_HEADER} are allowed.")
  packed = plain.compress(text)
  prefix = _PREFIX.pack(MAGIC, VERSION, NAMES.index(codec_name), len(packed))
  body = b"".join([packed, *parts])
  return prefix + _digest(prefix, body) + body


def read(data: bytes) -> Artifact:
  """The inverse of `write`. Raises ArtifactError on anything that `write` did not make."""
  codec_name, packed, body = _opened(data)
  header = _header(packed)
  table = header["tensors"]
  streams = split(table)
  lengths = header["streams"]
  if len(lengths) != len(streams) or sum(lengths) != len(body):
    raise ArtifactError("The artifact's streams are not those of its table: it is damaged.")
  found: dict[tuple[str, str], np.ndarray] = {}
  at = 0
  for stream, length in zip(streams, lengths, strict=True):
    arrays = codec(codec_name).decode(stream.content, body[at : at + length], [shape for *_, shape in stream.arrays])
    _require_finite(stream, arrays)
    found |= {(name, field): array for (name, field, _), array in zip(stream.arrays, arrays, strict=True)}
    at += length
  tensors = {entry[1]: assemble(entry, found) for entry in table}
  sizes = dict(zip([s.name for s in streams], lengths, strict=True))
  return Artifact(header["config"], tensors, codec_name, {"header": _START + len(packed), **sizes})


def dequantize(data: bytes) -> tuple[dict, dict[str, np.ndarray]]:
  """(config, fp32 parameters under their bank names) of an artifact's bytes. Raises ArtifactError."""
  artifact = read(data)
  try:
    return artifact.config, artifact.params()
  except (KeyError, ValueError) as error:
    raise ArtifactError(f"The artifact's matrices do not make up whole banks ({error}): it is damaged.") from error


def _require_finite(stream: Stream, arrays: list[np.ndarray]) -> None:
  if stream.content == "half":
    for (name, *_), array in zip(stream.arrays, arrays, strict=True):
      if not np.isfinite(array).all():
        raise ArtifactError(f"{name} holds values that are not finite in fp16, which no artifact may hold.")


def _digest(prefix: bytes, body: bytes) -> bytes:
  digest = hashlib.blake2b(prefix, digest_size=_DIGEST)
  digest.update(body)
  return digest.digest()


def _opened(data: bytes) -> tuple[str, bytes, bytes]:
  """(codec, packed header, streams), with the frame around them checked."""
  if len(data) < _START:
    raise ArtifactError(f"The file has {len(data)} bytes, fewer than an artifact's first {_START}: it is truncated.")
  magic, version, number, size = _PREFIX.unpack_from(data)
  if magic != MAGIC:
    raise ArtifactError("The file is not an artifact of this program: it does not begin with PGOLFJAX.")
  if version != VERSION:
    raise ArtifactError(f"The artifact has format version {version}, this program reads {VERSION}; write it anew.")
  body = data[_START:]
  if _digest(data[: _PREFIX.size], body) != data[_PREFIX.size : _START]:
    raise ArtifactError("The artifact's checksum does not match its content: it is truncated or damaged.")
  if number >= len(NAMES) or size > len(body):
    raise ArtifactError("The artifact's first bytes contradict its content: it is damaged.")
  return NAMES[number], body[:size], body[size:]


def _header(packed: bytes) -> dict:
  """The JSON header with every field of the right type and every claim within bounds."""
  text = plain.decompress(packed, 0, _MAX_HEADER)
  try:
    header = json.loads(text, parse_constant=_no_constant)
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


def _no_constant(name: str):
  raise ValueError(f"{name} is no number")
