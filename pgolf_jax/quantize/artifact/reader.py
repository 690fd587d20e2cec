"""Reading an artifact: from a file's bytes to its tensors, its weights and its settings.

Layout, little-endian:

  magic "PGOLFJAX" | u16 version | u16 codec | u32 header bytes | 16-byte BLAKE2b of all that follows it and of the
  16 bytes before it | header | streams, one after the other | tokenizer, if it is embedded

The header is JSON under Zstandard: `config` (any JSON object), `tensors` (the table: form, name, shape and what else
the form needs), `streams` (bytes of each), `origin` (see origin.py), `tokenizer` (bytes of the embedded one, 0 without
one). Which arrays lie in which stream follows from the table. The tokenizer is its SentencePiece model under Zstandard.
Version 1 had neither origin nor tokenizer, and is read as well.

Reading takes any bytes and either returns what was written or raises ArtifactError: the claims in the header are
checked against each other, against the model of the settings in it (`load`) and against a bound on parameters before
memory is taken for them. Whatever the bytes, reading holds at most twice what the file and its fp32 weights take, and
`WORKING_BYTES`. Weights are computed with NumPy alone, so that they do not depend on JAX's version or backend.

A table entry is [form, name, shape, …]:

  ["half", name, shape]                      fp16 of any shape
  ["rows", name, [M, N]]                     int8 with a step per row
  ["grid", name, [M, N], fine, low_rank]     int8 on the grids of the rows;
      fine: null or [columns of a group, [first columns]]; low_rank: null or [rank, steps of A, steps of B]

Arrays of one kind share statistics and therefore a stream: the integers of one kind of matrix from all layers; all
steps; large fp16 parameters by kind; all other fp16 parameters.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pgolf_jax.errors import ArtifactError, UserError
from pgolf_jax.model import params as parameters
from pgolf_jax.quantize.artifact.codecs import NAMES, Content, entropy, zstd
from pgolf_jax.quantize.artifact.origin import UNKNOWN, Origin
from pgolf_jax.quantize.artifact.tensors import BANKS, Grid, Half, LowRank, Quantized, Rows, kind, rebank, unbank
from pgolf_jax.runtime.files import parse_json
from pgolf_jax.runtime.log import progress
from pgolf_jax.settings import ModelConfig, Settings, check
from pgolf_jax.settings.check import MAX_PARAMETERS
from pgolf_jax.settings.load import from_dict

_LARGE = 4096  # fp16 values; a kind with at least as many gets a stream of its own
_MAX_SIDE = 1 << 20  # rows or columns of a grid
_MAX_RANK = 64  # of a correction
_MAX_DIMENSIONS = 4
_NAME = re.compile(r"(?!blocks\.)[A-Za-z_][A-Za-z0-9_.]{0,99}|blocks\.(0|[1-9][0-9]{0,3})\.[A-Za-z0-9_.]{1,88}")

Buffer = bytes | memoryview

Entry = list
"""One line of the table, as JSON has it."""

Array = tuple[str, str, tuple[int, ...]]
"""(tensor, field of its dataclass, with a dot for a nested one, shape)."""


@dataclasses.dataclass(frozen=True)
class Stream:
  name: str
  content: Content
  arrays: list[Array]


def describe(name: str, tensor: Quantized) -> Entry:
  """Returns the table entry of a tensor."""
  match tensor:
    case Half():
      return ["half", name, list(tensor.values.shape)]
    case Rows():
      return ["rows", name, list(tensor.q_MxN.shape)]
    case Grid():
      factors = tensor.low_rank
      fine = [tensor.fine_size, list(tensor.fine_starts)] if tensor.fine_starts else None
      low_rank = None if factors is None else [factors.b_RxN.shape[0], factors.a_step.size, factors.b_step.size]
      return ["grid", name, list(tensor.q_MxN.shape), fine, low_rank]


def split(table: list[Entry]) -> list[Stream]:
  """Returns all arrays of the table's tensors, each in one stream; empty streams are left out."""
  arrays: dict[tuple[str, Content], list[Array]] = {}

  def add(stream: str, content: Content, *array) -> None:
    arrays.setdefault((stream, content), []).append(array)

  half_size: dict[str, int] = {}
  for form, name, shape, *_ in table:
    if form == "half":
      half_size[kind(name)] = half_size.get(kind(name), 0) + math.prod(shape)
  for form, name, shape, *more in table:
    shape = tuple(shape)
    if form == "half":
      large = half_size[kind(name)] >= _LARGE
      add(f"half/{kind(name)}" if large else "half", "half", name, "values", shape)
      continue
    if form == "rows":
      add("gates", "small", name, "q_MxN", shape)
      add("steps", "half", name, "step_M", shape[:1])
      continue
    fine, low_rank = more
    add(f"grid/{kind(name)}", "grid", name, "q_MxN", shape)
    add("steps", "half", name, "step_M", shape[:1])
    if fine is not None:
      add("steps", "half", name, "fine_step_M", shape[:1])
    if low_rank is not None:
      rank, a_steps, b_steps = low_rank
      add("low_rank/a", "small", name, "low_rank.a_MxR", (shape[0], rank))
      add("low_rank/b", "small", name, "low_rank.b_RxN", (rank, shape[1]))
      add("low_rank/steps", "half", name, "low_rank.a_step", (a_steps,))
      add("low_rank/steps", "half", name, "low_rank.b_step", (b_steps,))
  return [Stream(name, content, members) for (name, content), members in sorted(arrays.items())]


def field_of(tensor: Quantized, field: str) -> np.ndarray:
  """Returns the array that an `Array`'s field names."""
  for name in field.split("."):
    tensor = getattr(tensor, name)
  return tensor


def assemble(entry: Entry, arrays: Mapping[tuple[str, str], np.ndarray]) -> Quantized:
  """Returns the tensor of a checked entry, from decoded arrays by (tensor, field)."""
  form, name, _, *more = entry
  if form == "half":
    return Half(arrays[name, "values"])
  if form == "rows":
    return Rows(arrays[name, "q_MxN"], arrays[name, "step_M"])
  fine, low_rank = more
  size, starts = (0, []) if fine is None else fine
  correction = None
  if low_rank is not None:
    correction = LowRank(*(arrays[name, f"low_rank.{f.name}"] for f in dataclasses.fields(LowRank)))
  fine_step_M = None if fine is None else arrays[name, "fine_step_M"]
  return Grid(arrays[name, "q_MxN"], arrays[name, "step_M"], tuple(starts), size, fine_step_M, correction)


def parameter_count(entry: Entry) -> int:
  """Returns the number of values in all of the entry's arrays, steps and factors included."""
  return sum(math.prod(shape) for stream in split([entry]) for *_, shape in stream.arrays)


def check_entry(entry: object) -> None:
  """Raises ArtifactError unless the entry is one that `describe` could have made."""

  def number(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high

  def require(condition: bool, what: str) -> None:
    if not condition:
      raise ArtifactError(f"The artifact's table has {what}: it is damaged.")

  require(isinstance(entry, list) and len(entry) >= 3, "an entry of the wrong type")
  form, name, shape, *more = entry
  require(isinstance(name, str) and _NAME.fullmatch(name) is not None, "an impossible name")
  require(name not in BANKS, "a whole bank, which is stored by its matrices")
  require(isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS, f"an impossible shape for {name}")
  least = 0 if form == "half" else 1  # a model of one layer has no skips, and [0, D] of their weights
  require(all(number(size, least, MAX_PARAMETERS) for size in shape), f"an impossible shape for {name}")
  if form == "half":
    require(not more, f"too many fields for {name}")
    return
  require(len(shape) == 2, f"an impossible shape for {name}")
  if form == "rows":
    require(not more, f"too many fields for {name}")
    return
  require(form == "grid" and len(more) == 2, f"an unknown form for {name}")
  require(max(shape) <= _MAX_SIDE, f"an impossible shape for {name}")
  (rows, columns), (fine, low_rank) = shape, more
  if fine is not None:
    require(isinstance(fine, list) and len(fine) == 2 and isinstance(fine[1], list), f"odd groups for {name}")
    size, starts = fine
    require(number(size, 1, columns) and 0 < len(starts) <= columns, f"odd groups for {name}")
    require(all(number(start, 0, columns - size) for start in starts), f"odd groups for {name}")
    require(all(a + size <= b for a, b in itertools.pairwise(starts)), f"odd groups for {name}")
  if low_rank is not None:
    require(isinstance(low_rank, list) and len(low_rank) == 3, f"odd factors for {name}")
    rank, a_steps, b_steps = low_rank
    require(number(rank, 1, min(rows, columns, _MAX_RANK)) and a_steps in (1, rows), f"odd factors for {name}")
    require(number(b_steps, 1, rank * columns) and rank * columns % b_steps == 0, f"odd factors for {name}")
    require(type(a_steps) is int, f"odd factors for {name}")


MAGIC = b"PGOLFJAX"
VERSION = 2
_PARTS = {1: ["config", "streams", "tensors"], 2: ["config", "origin", "streams", "tensors", "tokenizer"]}
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
  start = 0
  for stream, length in zip(streams, lengths, strict=True):
    shapes = [shape for *_, shape in stream.arrays]
    arrays = decode_stream(codec, stream.content, body[start : start + length], shapes)
    require_finite(stream, arrays)
    decoded |= {(name, field): array for (name, field, _), array in zip(stream.arrays, arrays, strict=True)}
    start += length
  tensors = {entry[1]: assemble(entry, decoded) for entry in table}
  sizes = {"header": header_bytes} | {stream.name: size for stream, size in zip(streams, lengths, strict=True)}
  sizes |= {"tokenizer": tokenizer_bytes} if tokenizer_bytes else {}
  return Artifact(header["config"], tensors, codec, sizes, origin, _tokenizer(frame))


def decode_stream(codec: str, content: Content, data: Buffer, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
  """Returns a stream's arrays, of exactly these shapes. Raises ArtifactError if `data` cannot hold them."""
  return {"zstd": zstd, "entropy": entropy}[codec].decode(content, data, shapes)


def require_finite(stream: Stream, arrays: list[np.ndarray]) -> None:
  """Raises ArtifactError if an fp16 value is infinite or not a number."""
  if stream.content == "half":
    for (name, *_), array in zip(stream.arrays, arrays, strict=True):
      if not np.isfinite(array).all():
        raise ArtifactError(f"{name} holds values that are not finite in fp16, which no artifact may hold.")


def pack(codec: str, header: dict, streams: list[bytes]) -> bytes:
  """Returns the bytes of a file. Raises ArtifactError if the header is too large. Last of the streams: a tokenizer."""
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
  return header, Origin.from_json(header.get("origin", {}))
