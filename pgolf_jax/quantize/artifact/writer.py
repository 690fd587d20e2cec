"""Writing an artifact: from tensors to the bytes of a file."""

from collections.abc import Mapping, Sequence

import numpy as np

from pgolf_jax.quantize.artifact.codecs import Content, entropy, search, zstd
from pgolf_jax.quantize.artifact.reader import describe, field_of, pack, require_finite, split
from pgolf_jax.quantize.artifact.tensors import Quantized


def write(config: Mapping[str, object], tensors: Mapping[str, Quantized], codec: str = "entropy") -> bytes:
  """Returns the bytes of a file; the same for the same arguments.

  Args:
    config: JSON object that travels with the weights, such as `to_dict(settings)`.
    tensors: the model, by matrix name, as `quantize` returns it.
    codec: one of codecs.NAMES.

  Raises:
    ArtifactError: a step or an fp16 parameter is not finite.
  """
  table = [describe(name, tensor) for name, tensor in tensors.items()]
  streams = []
  for stream in split(table):
    arrays = [field_of(tensors[name], field) for name, field, _ in stream.arrays]
    require_finite(stream, arrays)
    streams.append(encode_stream(codec, stream.content, arrays))
  header = {"config": dict(config), "streams": [len(stream) for stream in streams], "tensors": table}
  return pack(codec, header, streams)


def encode_stream(codec: str, content: Content, arrays: Sequence[np.ndarray]) -> bytes:
  """Returns the bytes of one stream; `reader.decode_stream` is the inverse."""
  if codec == "zstd":
    return zstd.encode(content, arrays)
  return entropy.encode(content, arrays, search.fit_all(arrays) if content == "grid" else ())
