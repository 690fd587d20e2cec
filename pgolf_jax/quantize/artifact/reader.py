"""Reading an artifact: from a file's bytes to its tensors, its weights and its settings.

Layout, little-endian:

  magic "PGOLFJAX" | u16 version | u16 codec | u32 header bytes | 16-byte BLAKE2b of all that follows it and of the
  16 bytes before it | header | streams, one after the other | tokenizer, if it is embedded

The header is JSON under Zstandard: `config` (any JSON object), `tensors` (the table) and `origin` as in header.py,
`streams` (bytes of each), `tokenizer` (bytes of the embedded one, 0 without one). Which arrays lie in which stream
follows from the table. The tokenizer is its SentencePiece model under Zstandard.
Version 1 had neither origin nor tokenizer, version 2 no integers with steps by row and column; both are read as well,
and a file has the lowest version that its tensors need.

Reading takes any bytes and either returns what was written or raises ArtifactError: the claims in the header are
checked against each other, against the model of the settings in it (`load`) and against a bound on parameters before
memory is taken for them. Whatever the bytes, reading holds at most twice what the file and its fp32 weights take, and
`WORKING_BYTES`. Weights are computed with NumPy alone, so that they do not depend on JAX's version or backend.
"""

import dataclasses
import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pgolf_jax.errors import ArtifactError, UserError
from pgolf_jax.model import params as parameters
from pgolf_jax.quantize.artifact.codecs import NAMES, Content, entropy, zstd
from pgolf_jax.quantize.artifact.codecs.integers import LIMIT, Steps
from pgolf_jax.quantize.artifact.header import (
  UNKNOWN,
  Entry,
  Origin,
  Stream,
  assemble,
  check_entry,
  least_version,
  parameter_count,
  split,
)
from pgolf_jax.quantize.artifact.tensors import MAX_STEP, Quantized, rebank, unbank
from pgolf_jax.runtime.files import parse_json
from pgolf_jax.runtime.log import progress
from pgolf_jax.settings import ModelConfig, Settings, check
from pgolf_jax.settings.check import MAX_PARAMETERS
from pgolf_jax.settings.load import from_dict

Buffer = bytes | memoryview

MAGIC = b"PGOLFJAX"
VERSION = 3
_PARTS = {1: ["config", "streams", "tensors"], 2: ["config", "origin", "streams", "tensors", "tokenizer"]}
_PARTS |= {3: _PARTS[2]}
"""Format version → the names in its header."""
MAX_TOKENIZER = 1 << 22
"""Bytes of a tokenizer's model that may be embedded; one of 65,536 pieces has about a million."""
WORKING_BYTES = 1 << 25
"""Memory that reading takes whatever the size of the artifact: the header as Python objects, slabs, distributions."""
PREFIX = struct.Struct("<8sHHI")
_DIGEST = 16
_MAX_HEADER = 1 << 18  # bytes of JSON, which take up to a hundred times as much memory once it is parsed
_MAX_FILE = 1 << 30  # bytes; more than `MAX_PARAMETERS` can take
# Values that an artifact may hold whatever its size, and for each of its bytes: a trained matrix takes 3 bits a value.
_FREE_VALUES, _VALUES_PER_BYTE = 1 << 22, 1 << 10
_BOUNDS = {"row_M": (-MAX_STEP, MAX_STEP), "column_N": (-MAX_STEP, MAX_STEP), "trellis_N": (0, 1), "trellis_M": (0, 1)}
START = PREFIX.size + _DIGEST
"""Bytes before the header."""


@dataclasses.dataclass(frozen=True)
class Artifact:
  """What a file holds."""

  config: dict  # the JSON object that travels with the weights
  tensors: dict[str, Quantized]  # by matrix name
  codec: str
  stream_bytes: dict[str, int]  # compressed bytes by stream, in file order; all before the streams under "header"
  origin: Origin = UNKNOWN
  tokenizer: bytes | None = None  # the embedded SentencePiece model

  def params(self) -> dict[str, np.ndarray]:
    """Returns fp32 parameters under their bank names, the same bits on every machine.

    Raises:
      ArtifactError: a bank's matrices are incomplete or differ in shape.
    """
    try:
      return rebank(self.tensors)
    except (KeyError, ValueError) as error:
      raise ArtifactError(f"The artifact's matrices do not make up whole banks ({error}): it is damaged.") from error


def load(path: Path) -> tuple[Settings, dict[str, np.ndarray]]:
  """Returns the settings that an artifact's file carries, and its fp32 parameters under their bank names.

  Raises:
    UserError: there is no such file, it is not an artifact, or its parameters do not match its settings.
  """
  frame = _unpack(_bytes_of(path))
  settings = from_dict(frame.header["config"], where=f"the config in {path}")
  try:
    check.check(settings)
  except UserError as error:
    raise UserError(f"The config in {path} cannot work: {error}") from error
  _check_shapes(settings.model, frame.header["tensors"], path)
  with progress("reading the artifact"):
    return settings, _decode(frame).params()


def _bytes_of(path: Path) -> bytes:
  if not path.is_file():
    raise UserError(f"There is no artifact {path}; `pgolf run` or `pgolf quantize` makes one.")
  if (size := path.stat().st_size) > _MAX_FILE:
    raise ArtifactError(f"{path} has {size} bytes; an artifact has at most {_MAX_FILE}.")
  return path.read_bytes()


def read_origin(path: Path) -> tuple[Origin, bytes | None]:
  """Returns where an artifact comes from, and its tokenizer if it is embedded; the weights are not decoded.

  Raises:
    UserError: there is no such file, or it is not an artifact.
  """
  frame = _unpack(_bytes_of(path))
  return frame.origin, _tokenizer(frame)


def _tokenizer(frame: "_Frame") -> bytes | None:
  size = frame.header.get("tokenizer", 0)
  if not size:
    return None
  model = zstd.decompress(frame.streams[-size:], 1, MAX_TOKENIZER)
  if hashlib.sha256(model).hexdigest() != frame.origin.tokenizer:
    raise ArtifactError("The artifact's tokenizer is not the one that its origin names: it is damaged.")
  return model


def _check_shapes(config: ModelConfig, table: list[Entry], path: Path) -> None:
  """Raises ArtifactError unless the table's tensors are those of a model of this config."""
  views = {name: np.broadcast_to(np.int8(0), shape) for name, shape in parameters.shapes(config).items()}
  wanted = {name: view.shape for name, view in unbank(views).items()}
  shapes = {name: tuple(shape) for _, name, shape, *_ in table}
  for name in sorted(wanted.keys() | shapes.keys()):
    if wanted.get(name) != shapes.get(name):
      stored, needed = (f"shape {s[name]}" if name in s else "none" for s in (shapes, wanted))
      raise ArtifactError(f"{path}: {name} has {stored}, and the artifact's own config gives {needed}: it is damaged.")


def read(data: bytes) -> Artifact:
  """Returns what `writer.write` was given. Raises ArtifactError on anything that it did not make."""
  return _decode(_unpack(data))


def _decode(frame: "_Frame") -> Artifact:
  codec, header, header_bytes, body, origin = frame
  table, lengths = header["tensors"], header["streams"]
  streams = split(table)
  tokenizer_bytes = header.get("tokenizer", 0)
  if len(lengths) != len(streams) or sum(lengths) + tokenizer_bytes != len(body):
    raise ArtifactError("The artifact's streams are not those of its table: it is damaged.")
  decoded: dict[tuple[str, str], np.ndarray] = {}
  ends = np.cumsum([0, *lengths]).tolist()
  # Steps come first: the integers of a matrix are coded under laws that its steps predict.
  for i, stream in sorted(enumerate(streams), key=lambda item: item[1].content == "matrix"):
    shapes = [shape for *_, shape in stream.arrays]
    arrays = decode_stream(codec, stream.content, body[ends[i] : ends[i + 1]], shapes, steps_of(stream, decoded))
    check_values(stream, arrays)
    decoded |= {(name, field): array for (name, field, _), array in zip(stream.arrays, arrays, strict=True)}
  tensors = {entry[1]: assemble(entry, decoded) for entry in table}
  sizes = {"header": header_bytes} | {stream.name: size for stream, size in zip(streams, lengths, strict=True)}
  sizes |= {"tokenizer": tokenizer_bytes} if tokenizer_bytes else {}
  return Artifact(header["config"], tensors, codec, sizes, origin, _tokenizer(frame))


def steps_of(stream: Stream, arrays: Mapping[tuple[str, str], np.ndarray]) -> list[Steps]:
  """Returns the steps of a stream's matrices, by which their integers are coded; empty for other streams.

  Args:
    arrays: steps by (tensor, field).
  """
  names = [name for name, *_ in stream.arrays if stream.content == "matrix"]
  return [Steps(*(arrays.get((name, field)) for field in Steps._fields)) for name in names]


def decode_stream(
  codec: str, content: Content, data: Buffer, shapes: Sequence[tuple[int, ...]], steps: Sequence[Steps] = ()
) -> list[np.ndarray]:
  """Returns a stream's arrays, of exactly these shapes. Raises ArtifactError if `data` cannot hold them.

  Args:
    steps: of each matrix, for content "matrix".
  """
  if codec == "zstd":
    return zstd.decode(content, data, shapes)
  return entropy.decode(content, data, shapes, steps)


def check_values(stream: Stream, arrays: list[np.ndarray]) -> None:
  """Raises ArtifactError if an fp16 value is infinite or not a number, or an integer too large."""
  for (name, field, _), array in zip(stream.arrays, arrays, strict=True):
    if stream.content == "half" and not np.isfinite(array).all():
      raise ArtifactError(f"{name} holds values that are not finite in fp16, which no artifact may hold.")
    if stream.content in ("matrix", "integers"):
      least, most = _BOUNDS.get(field, (1 - LIMIT, LIMIT - 1))
      if not least <= array.min(initial=0) <= array.max(initial=0) <= most:
        raise ArtifactError(f"{name} holds integers beyond {least} … {most}, which no artifact may hold.")


def pack(codec: str, header: dict, streams: list[bytes]) -> bytes:
  """Returns the bytes of a file. Raises ArtifactError if the header is too large. Last of the streams: a tokenizer."""
  text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
  if len(text) > _MAX_HEADER:
    raise ArtifactError(f"The artifact's config and table take {len(text)} bytes; at most {_MAX_HEADER} are allowed.")
  packed = zstd.compress(text)
  prefix = PREFIX.pack(MAGIC, max(2, least_version(header["tensors"])), NAMES.index(codec), len(packed))
  body = b"".join([packed, *streams])
  return prefix + _digest(prefix, body) + body


class _Frame(NamedTuple):
  """A file taken apart; its streams are not decoded yet."""

  codec: str
  header: dict
  header_bytes: int  # from the beginning of the file to the streams
  streams: memoryview  # and the tokenizer after them
  origin: Origin


def _unpack(whole: bytes) -> _Frame:
  """Takes a file apart, with its checksum verified and every claim of its header within bounds.

  Raises:
    ArtifactError: `pack` did not make these bytes.
  """
  data = memoryview(whole)
  if len(data) < START:
    raise ArtifactError(f"The file has {len(data)} bytes, fewer than an artifact's first {START}: it is truncated.")
  magic, version, codec, size = PREFIX.unpack_from(data)
  if magic != MAGIC:
    raise ArtifactError("The file is not an artifact of this program: it does not begin with PGOLFJAX.")
  if version not in _PARTS:
    raise ArtifactError(f"The artifact has format version {version}, this program reads 1 to {VERSION}; write it anew.")
  body = data[START:]
  if _digest(data[: PREFIX.size], body) != data[PREFIX.size : START]:
    raise ArtifactError("The artifact's checksum does not match its content: it is truncated or damaged.")
  if codec >= len(NAMES) or size > len(body):
    raise ArtifactError("The artifact's first bytes contradict its content: it is damaged.")
  header, origin = _checked_header(body[:size], version)
  count = sum(map(parameter_count, header["tensors"]))
  most = min(MAX_PARAMETERS, _FREE_VALUES + _VALUES_PER_BYTE * len(data))
  if count > most:
    raise ArtifactError(f"The artifact claims {count} parameters; {len(data)} bytes may hold at most {most}.")
  return _Frame(NAMES[codec], header, START + size, body[size:], origin)


def _digest(prefix: bytes, body: bytes) -> bytes:
  digest = hashlib.blake2b(prefix, digest_size=_DIGEST)
  digest.update(body)
  return digest.digest()


def _checked_header(packed: Buffer, version: int) -> tuple[dict, Origin]:
  try:
    header = parse_json(zstd.decompress(packed, 0, _MAX_HEADER).decode())
  except ValueError as error:
    raise ArtifactError(f"The artifact's header is not JSON ({error}): it is damaged.") from error
  if not isinstance(header, dict) or sorted(header) != _PARTS[version]:
    raise ArtifactError(f"The artifact's header has not the parts of version {version}: it is damaged.")
  config, lengths, table = header["config"], header["streams"], header["tensors"]
  if not isinstance(config, dict) or not isinstance(lengths, list) or not isinstance(table, list):
    raise ArtifactError("The artifact's header has parts of the wrong type: it is damaged.")
  if not all(type(n) is int and n >= 0 for n in (*lengths, header.get("tokenizer", 0))):
    raise ArtifactError("The artifact's header claims parts of impossible length: it is damaged.")
  for entry in table:
    check_entry(entry)
  names = [entry[1] for entry in table]
  if len(set(names)) != len(names):
    raise ArtifactError("The artifact's table names a tensor twice: it is damaged.")
  if version < least_version(table):
    raise ArtifactError(f"The artifact's table has forms that version {version} does not know: it is damaged.")
  return header, Origin.from_json(header.get("origin", {}))
