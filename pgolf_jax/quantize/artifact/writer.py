"""Writing an artifact: from tensors to the bytes of a file."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from pgolf_jax.errors import ArtifactError
from pgolf_jax.quantize.artifact.codecs import Content, entropy, search, zstd
from pgolf_jax.quantize.artifact.codecs.integers import Steps
from pgolf_jax.quantize.artifact.header import UNKNOWN, Origin, check_entry, describe, field_of, split
from pgolf_jax.quantize.artifact.reader import MAX_TOKENIZER, check_values, pack, steps_of
from pgolf_jax.quantize.artifact.tensors import Quantized


def write(
  config: Mapping[str, object],
  tensors: Mapping[str, Quantized],
  codec: str = "entropy",
  origin: Origin = UNKNOWN,
  tokenizer: bytes | None = None,
) -> bytes:
  """Returns the bytes of a file; the same for the same arguments.

  Args:
    config: JSON object that travels with the weights, such as `to_dict(settings)`.
    tensors: the model, by matrix name, as `quantize` returns it.
    codec: one of codecs.NAMES.
    origin: what made it.
    tokenizer: SentencePiece model to embed; its hash becomes the origin's.

  Raises:
    ArtifactError: a step or an fp16 parameter is not finite, a name, a shape, a step or an integer is beyond what a
      file may hold, or the tokenizer is too large to embed.
  """
  table = [describe(name, tensor) for name, tensor in tensors.items()]
  for entry in table:
    check_entry(entry)
  layout = split(table)
  fields = {(name, field): field_of(tensors[name], field) for stream in layout for name, field, _ in stream.arrays}
  streams = []
  for stream in layout:
    arrays = [fields[name, field] for name, field, _ in stream.arrays]
    check_values(stream, arrays)
    streams.append(encode_stream(codec, stream.content, arrays, steps_of(stream, fields)))
  packed = b""
  if tokenizer is not None:
    if len(tokenizer) > MAX_TOKENIZER:
      raise ArtifactError(f"The tokenizer has {len(tokenizer):,} bytes; at most {MAX_TOKENIZER:,} can be embedded.")
    origin = dataclasses.replace(origin, tokenizer=hashlib.sha256(tokenizer).hexdigest())
    packed = zstd.compress(tokenizer)
  header = {
    "config": dict(config),
    "origin": origin.to_json(),
    "streams": [len(stream) for stream in streams],
    "tensors": table,
    "tokenizer": len(packed),
  }
  return pack(codec, header, [*streams, packed])


def encode_stream(codec: str, content: Content, arrays: Sequence[np.ndarray], steps: Sequence[Steps] = ()) -> bytes:
  """Returns the bytes of one stream; `reader.decode_stream` is the inverse.

  Args:
    steps: of each matrix, for content "matrix".
  """
  if codec == "zstd":
    return zstd.encode(content, arrays)
  match content:
    case "grid":
      models = search.fit_grids(arrays)
    case "matrix":
      models = search.fit_matrices(arrays, steps)
    case "integers":
      models = search.fit_integers(arrays)
    case _:
      models = ()
  return entropy.encode(content, arrays, models, steps)
