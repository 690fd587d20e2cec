"""The frame of an artifact's file: what stands around its streams.

Layout, little-endian:

  magic "PGOLFJAX" | u16 version | u16 codec | u32 header bytes | 16-byte BLAKE2b of all that follows it and of the
  16 bytes before it | header | streams, one after the other

The header is JSON under Zstandard: `config` (any JSON object), `tensors` (the table: form, name, shape and what else
the form needs), `streams` (bytes of each). Which arrays lie in which stream follows from the table; see streams.py.
"""

import hashlib
import json
import struct
from typing import NamedTuple

from pgolf_jax.errors import ArtifactError
from pgolf_jax.quantize.artifact.codecs import NAMES, zstd
from pgolf_jax.quantize.artifact.streams import check_entry, parameter_count

MAGIC = b"PGOLFJAX"
VERSION = 1
MAX_PARAMETERS = 2**28  # 1 GiB of fp32 weights
PREFIX = struct.Struct("<8sHHI")
_DIGEST = 16
_MAX_HEADER = 1 << 20  # bytes of JSON
START = PREFIX.size + _DIGEST
"""Bytes before the header."""


class Frame(NamedTuple):
  """A file taken apart; its streams are not decoded yet."""

  codec: str
  header: dict
  header_bytes: int  # from the beginning of the file to the streams
  streams: bytes


def pack(codec: str, header: dict, streams: list[bytes]) -> bytes:
  """Returns the bytes of a file. Raises ArtifactError if the header is too large."""
  text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
  if len(text) > _MAX_HEADER:
    raise ArtifactError(f"The artifact's config and table take {len(text)} bytes; at most {_MAX_HEADER} are allowed.")
  packed = zstd.compress(text)
  prefix = PREFIX.pack(MAGIC, VERSION, NAMES.index(codec), len(packed))
  body = b"".join([packed, *streams])
  return prefix + _digest(prefix, body) + body


def unpack(data: bytes) -> Frame:
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
  return Frame(NAMES[codec], _checked_header(body[:size]), START + size, body[size:])


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
