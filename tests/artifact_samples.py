"""A small model in its stored form, with every kind of tensor, and a way to forge what an artifact says of itself."""

import hashlib
import json

import numpy as np
import zstandard

from pgolf_jax.quantize.artifact import Origin, reader
from pgolf_jax.quantize.artifact.tensors import Even, Grid, Half, LogGrid, LowRank, Rows

TOKENIZER = bytes(range(256)) * 20
ORIGIN = Origin("0.1.0", "0.10.2", 320, hashlib.sha256(TOKENIZER).hexdigest(), "μ-texts", "a" * 64, "b" * 64)
CONFIG = {"model": {"num_layers": 2, "rope_base": 10000.0}, "note": "μ"}


def sample_tensors(seed: int = 0) -> dict:
  """Two layers, 32 wide: grids with and without an AWQ group and factors of both kinds, gates, fp16."""
  rng = np.random.default_rng(seed)

  def half(*shape):
    return rng.standard_normal(shape).astype(np.float16)

  def integers(bound, *shape):
    return np.clip(np.rint(rng.standard_normal(shape) * bound / 5), -bound, bound).astype(np.int8)

  def steps(count):
    return (0.01 + 0.02 * rng.random(count)).astype(np.float16)

  tensors = {}
  for i in range(2):
    tensors[f"blocks.{i}.attn.c_q.weight"] = Grid(integers(31, 32, 32), steps(32))
    tensors[f"blocks.{i}.attn.proj.weight"] = Grid(integers(31, 32, 32), steps(32), (8,), 8, steps(32))
    tensors[f"blocks.{i}.attn.c_k.weight"] = Half(half(16, 32))
    tensors[f"blocks.{i}.attn.c_v.weight"] = Half(half(16, 32))
    factors = LowRank(integers(7, 64, 2), steps(64), integers(7, 2, 32), steps(2))
    tensors[f"blocks.{i}.mlp.fc.weight"] = Grid(integers(31, 64, 32), steps(64), low_rank=factors)
    tensors[f"blocks.{i}.mlp.proj.weight"] = Grid(integers(31, 32, 64), steps(32))
    tensors[f"blocks.{i}.attn_scale"] = Half(half(32))
    tensors[f"blocks.{i}.attn.attn_gate_w"] = Rows(integers(127, 4, 12), steps(4))
  group = LowRank(integers(1, 96, 2), steps(1), integers(7, 2, 32), steps(8))
  common = np.outer(rng.standard_normal(96) * 3, rng.standard_normal(32) * 3)
  q = np.clip(np.rint(common + rng.standard_normal((96, 32))), -63, 63).astype(np.int8)
  tensors["tok_emb.weight"] = Grid(q, steps(96), (0, 24), 8, steps(96), group)
  tensors["softcap_pos"] = Half(np.float16(30).reshape(()))
  return tensors


def rate_tensors(seed: int = 0) -> dict:
  """The same model in the forms of the rate quantiser: integers of all sizes, an embedding with a mean."""
  rng = np.random.default_rng(seed)

  def matrix(rows, columns, mean_MxN=0.0, *trellis):
    row_M = np.rint(2 * rng.standard_normal(rows) - 24).astype(np.int32)
    column_N = np.rint(3 * rng.standard_normal(columns) - 6).astype(np.int32)
    column_N[:2] -= 40  # two columns of tiny steps
    scale_MxN = 0.3 * np.exp2(-(row_M[:, None] + column_N + 30) / 4)
    q_MxN = np.rint((rng.standard_normal((rows, columns)) + mean_MxN) * scale_MxN)
    return LogGrid(q_MxN.astype(np.int32), row_M, column_N, *trellis)

  def even(step, *shape):
    return Even(np.rint(300 + 30 * rng.standard_normal(shape)).astype(np.int32), step)

  tensors = {}
  for i in range(2):
    for name, rows, columns in (("c_q", 32, 32), ("proj", 32, 32), ("c_k", 16, 32), ("c_v", 16, 32)):
      tensors[f"blocks.{i}.attn.{name}.weight"] = matrix(rows, columns)
    tensors[f"blocks.{i}.mlp.fc.weight"] = matrix(64, 32, 0.0, np.arange(32) < 24, np.ones(64, bool))
    tensors[f"blocks.{i}.mlp.proj.weight"] = matrix(32, 64)
    tensors[f"blocks.{i}.attn_scale"] = even(-32, 32)
    tensors[f"blocks.{i}.attn.attn_gate_w"] = even(-40, 4, 12)
  common = np.outer(rng.standard_normal(96) * 3, rng.standard_normal(32) * 3)
  tensors["tok_emb.weight"] = matrix(96, 32, common, np.arange(32) % 2 == 0, np.arange(96) % 5 > 0)
  tensors["skip_weights"] = Even(np.zeros((0, 32), np.int32), 0)
  tensors["softcap_pos"] = Even(np.full((), 15 << 10, np.int32), -36)
  return tensors


def sealed(data: bytes) -> bytes:
  """The bytes with a checksum that fits them."""
  prefix, body = data[: reader.PREFIX.size], data[reader.START :]
  return prefix + hashlib.blake2b(prefix + body, digest_size=16).digest() + body


def with_header(data: bytes, change) -> bytes:
  """The artifact with its header passed through `change` (which may edit in place or give another), sealed anew."""
  magic, version, number, size = reader.PREFIX.unpack_from(data)
  body = data[reader.START :]
  header = json.loads(zstandard.ZstdDecompressor().decompress(body[:size]))
  changed = change(header)
  header = header if changed is None else changed
  packed = zstandard.ZstdCompressor().compress(header if isinstance(header, bytes) else json.dumps(header).encode())
  return sealed(reader.PREFIX.pack(magic, version, number, len(packed)) + bytes(16) + packed + body[size:])
