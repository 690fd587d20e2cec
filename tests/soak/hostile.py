"""Mutated artifacts, tokenizers, shards, manifests, corpora and settings, each read in a child process.

`python tests/soak/hostile.py --count 30000 --seed 0` reads that many artifacts, a sixth as many tokenizers and a
fifteenth of each other kind. Every case is made from its number, so that one that fails can be repeated with
`--only KIND:NUMBER`. Mutations know the formats: checksums and lengths are made right again, so that they reach the
code behind. A case may be refused by a UserError or be read; what is read must be what its own bytes say. The table has
a line for each kind; the exit status is 1 if any of its columns after `refused` and before `peak` is not 0.
"""

import argparse
import collections
import contextlib
import io
import json
import math
import os
import random
import resource
import selectors
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import sentencepiece
import zstandard
from sentencepiece import sentencepiece_model_pb2

sys.path.insert(0, str(Path(__file__).parents[1]))
from artifact_samples import ORIGIN, TOKENIZER, rate_tensors, sample_tensors, sealed, with_header

from pgolf_jax.data.corpus import JsonLines, Position, open_corpus
from pgolf_jax.data.manifest import MANIFEST, File, Manifest, Split
from pgolf_jax.data.shards import load_validation, read_shard, write_shard
from pgolf_jax.data.tokenizer import Tokenizer, train_tokenizer
from pgolf_jax.errors import UserError
from pgolf_jax.model import params as parameters
from pgolf_jax.quantize.artifact import load, read, read_origin, reader
from pgolf_jax.quantize.artifact.tensors import Grid, Half, unbank
from pgolf_jax.quantize.artifact.writer import write
from pgolf_jax.runtime.memory import process_bytes
from pgolf_jax.settings import ModelConfig, Settings, check
from pgolf_jax.settings.load import flattened, from_toml, to_dict

VECTORS = Path(__file__).parents[1] / "quantize" / "vectors"
SECONDS = 60  # a case that takes longer hangs
BATCH = 200  # cases of a child process
ADDRESS_SPACE = 3 << 30  # bytes that a child may have beside what it starts with
MIB = 1 << 20


class WrongResultError(Exception):
  """Something was read that its bytes do not say."""


class OverMemoryError(Exception):
  """Reading held more than the bound."""


def require(condition: bool, what: str) -> None:
  if not condition:
    raise WrongResultError(what)


class Memory:
  """The most memory that a block held beside what there was before it, in bytes."""

  peak = 0

  def __enter__(self):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    self._before = process_bytes("VmRSS")
    return self

  def __exit__(self, *_):
    self.peak = max(0, process_bytes("VmHWM") - self._before)


ODD = [
  *(None, True, False, 0, 1, -1, 2, 7, 8, 63, 64, 255, 256, 4096, 2**20, 2**28, 2**31, 2**32, 2**53, 2**63, 2**64),
  *(10**30, 0.0, -0.5, 1e-40, 1e30, 1e308, "", "x", "x" * 1000, "\0", "../../x", "blocks.99999999.attn.c_q.weight"),
  *([], {}, [1], [[]], {"a": 1}, [2**28], [0, 0], [1 << 14, 1 << 14], "é\u2581", "NaN", "1e999", "2@0.5", "1024@nan"),
]
RAW = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, '"\\ud800"', "tru", "\x00"]
RAW += ["[" * 5000 + "]" * 5000, '{"a":' * 1000]


def places(value, path=()):
  """Yields the path of every value inside a JSON value."""
  for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
    yield (*path, key)
    yield from places(inner, (*path, key))


def mutate_json(value, rng: random.Random):
  """Changes values, keys and order somewhere inside a JSON value, in place; returns JSON text."""
  raw = None
  for _ in range(rng.randint(1, 3)):
    *way, last = rng.choice(list(places(value)) or [()]) or [None]
    if last is None:
      break
    place = value
    for step in way:
      place = place[step]
    match rng.randrange(8):
      case 0 | 1 | 2:
        place[last] = rng.choice(ODD)
      case 3 if isinstance(place[last], int | float) and not isinstance(place[last], bool):
        place[last] = rng.choice([place[last] * 2, place[last] + 1, -place[last], place[last] // 2, str(place[last])])
      case 4:
        del place[last]
      case 5 if isinstance(place, list):
        place.insert(rng.randrange(len(place) + 1), rng.choice([place[last], rng.choice(ODD)]))
      case 6 if isinstance(place, dict):
        place[rng.choice(["x", "", "a" * 1000, last + "_"])] = place[last]
      case 7:
        place[last], raw = "RAW", rng.choice(RAW)
      case _:
        place[last] = rng.choice(ODD)
  text = json.dumps(value)
  return text if raw is None else text.replace('"RAW"', raw, 1)


def mutate_bytes(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
  """Flips, cuts, inserts, repeats and splices."""
  data = bytearray(data)
  for _ in range(rng.choice([1, 1, 2, 5])):
    at = rng.randrange(len(data)) if data else 0
    match rng.randrange(8):
      case 0 | 1 | 2 if data:
        data[at] ^= 1 << rng.randrange(8)
      case 3 if data:
        data[at : at + rng.randint(1, 8)] = rng.randbytes(rng.randint(0, 8))
      case 4:
        del data[at:]
      case 5:
        data[at:at] = data[at : at + rng.randint(1, 64)]
      case 6:
        other = rng.choice(others)
        start = rng.randrange(len(other))
        data[at : at + rng.randint(0, 200)] = other[start : start + rng.randint(1, 200)]
      case 7 if len(data) >= 4:
        at = min(at, len(data) - 4)
        data[at : at + 4] = rng.choice([0, 1, 2**16, 2**28, 2**31 - 1, 2**32 - 1, len(data)]).to_bytes(4, "little")
  return bytes(data)


class Artifacts:
  """Artifacts of both codecs, with and without the settings that `load` needs."""

  share = 1.0

  def __init__(self, folder: Path):
    self._path = folder / "artifact.pgolf"
    self._settings = Settings(model=SMALL)
    rng = np.random.default_rng(0)
    views = {n: np.broadcast_to(np.float32(0), s) for n, s in parameters.shapes(SMALL).items()}
    tensors = {}
    for name, view in unbank(views).items():
      is_grid = len(view.shape) == 2 and view.size >= 1024
      half = (0.02 * rng.standard_normal(view.shape[:1] if is_grid else view.shape)).astype(np.float16)
      q = np.clip(np.rint(rng.standard_normal(view.shape) * 9), -31, 31).astype(np.int8) if is_grid else None
      tensors[name] = Grid(q, np.abs(half)) if is_grid else Half(np.reshape(half, view.shape))
    self._whole = [write(to_dict(self._settings), tensors, codec) for codec in ("zstd", "entropy")]
    self._whole += [write({"note": 1}, sample_tensors(), codec, ORIGIN, TOKENIZER) for codec in ("zstd", "entropy")]
    self._whole += [write({"note": 2}, rate_tensors(), codec, ORIGIN, TOKENIZER) for codec in ("zstd", "entropy")]
    self._whole += [path.read_bytes() for path in sorted(VECTORS.glob("*.pgolf"))]  # of all versions

  def case(self, rng: random.Random) -> str:
    original = rng.choice(self._whole)
    data = self._mutated(original, rng)
    data = sealed(data) if rng.random() < 0.9 and len(data) > reader.START else data
    try:
      frame = reader._unpack(data)
      declared = sum(map(reader.parameter_count, frame.header["tensors"]))
      require(sealed(data) == data, "bytes whose checksum is wrong were read")
    except UserError:
      declared = 0
    bound = 2 * (4 * declared + len(data)) + reader.WORKING_BYTES
    self._path.write_bytes(data)
    error, params = None, {}
    with Memory() as memory:
      try:
        read_origin(self._path)
        params = load(self._path)[1] if rng.random() < 0.5 else read(data).params()
      except UserError as refusal:
        error = refusal
    if memory.peak > bound:
      raise OverMemoryError(f"{memory.peak / MIB:.0f} MiB where {bound / MIB:.0f} are allowed")
    if error is not None:
      raise error
    return self._compared(data, params)

  def _compared(self, data: bytes, params: dict) -> str:
    artifact = read(data)
    for name, value in params.items():
      require(value.dtype == np.float32 and bool(np.isfinite(value).all()), f"{name} is not finite fp32")
    shapes = {entry[1]: tuple(entry[2]) for entry in reader._unpack(data).header["tensors"]}
    matrices = unbank(params)
    require(matrices.keys() == shapes.keys(), "other tensors than the table's")
    for name, value in matrices.items():
      require(value.shape == shapes[name], f"{name} has another shape than the table's")
      require(np.array_equal(value, artifact.tensors[name].dequantize()), f"{name} differs between two readings")
    again = read(write(artifact.config, artifact.tensors, artifact.codec, artifact.origin, artifact.tokenizer))
    require(again.config == artifact.config, "the config does not come back")
    require((again.origin, again.tokenizer) == (artifact.origin, artifact.tokenizer), "the origin does not come back")
    for name, tensor in artifact.tensors.items():
      require(np.array_equal(tensor.dequantize(), again.tensors[name].dequantize()), f"{name} does not come back")
    return "read"

  def _mutated(self, whole: bytes, rng: random.Random) -> bytes:
    size = reader.PREFIX.unpack_from(whole)[3]
    streams = reader.START + size
    match rng.randrange(10):
      case 0:
        return mutate_bytes(whole, rng, self._whole)
      case 1 | 2 | 3:
        return whole[:streams] + mutate_bytes(whole[streams:], rng, self._whole)[: len(whole) - streams].ljust(
          len(whole) - streams, b"\0"
        )
      case 4 | 5:
        return with_header(whole, lambda header: mutate_json(header, rng).encode())
      case 6:
        forged = with_header(whole, lambda header: self._claiming(header, rng) | rng.choice([{}, {"tokenizer": 0}]))
        return forged[: streams + rng.randrange(400)]
      case 7:
        return self._zstd_streams(whole, rng)
      case 8:
        packed = self._frame(rng)
        magic, version, codec, _ = reader.PREFIX.unpack_from(whole)
        return reader.PREFIX.pack(magic, version, codec, len(packed)) + bytes(16) + packed + whole[streams:]
      case _:
        magic, version, codec, _ = reader.PREFIX.unpack_from(whole)
        version, codec = rng.choice([(version, 1 - codec), (version, codec), (rng.randrange(5), rng.randrange(4))])
        claimed = rng.choice([size, size + 1, size - 1, 0, 2**32 - 1, rng.randrange(len(whole))])
        return reader.PREFIX.pack(magic, version, codec, claimed) + whole[reader.PREFIX.size :]

  def _claiming(self, header: dict, rng: random.Random) -> dict:
    """A table of one to three tensors of large or odd shapes, whose streams are short."""
    table = []
    for _ in range(rng.randint(1, 3)):
      a, b = (1 << rng.randrange(21) for _ in range(2))
      name = rng.choice(["w", "tok_emb.weight", f"blocks.{rng.choice([0, 1, 9999, 10**8])}.mlp.fc.weight"])
      fine = rng.choice([None, [max(1, b // 4), [0]], [1, list(range(min(b, 2000)))]])
      rank = rng.choice([1, 4, 64])
      factors = rng.choice([None, [rank, rng.choice([1, a]), rng.choice([rank, 1, rank * b])]])
      flat = [[form, name, shape] for form, shape in (("half", [a, b]), ("half", [a * b]), ("rows", [a, b]))]
      rate = [["log", name, [a, b], rng.random() < 0.5], ["even", name, [a, b], rng.randint(-400, 400)]]
      table.append(rng.choice([*flat, *rate, ["grid", name, [a, b], fine, factors]]))
    with contextlib.suppress(Exception):
      count = len(reader.split(table))
      lengths = [4 * rng.randrange(20) for _ in range(count)]
      return header | {"config": rng.choice([header["config"], {}]), "streams": lengths, "tensors": table}
    return header | {"config": {}, "streams": [], "tensors": table}

  def _zstd_streams(self, whole: bytes, rng: random.Random) -> bytes:
    """Streams whose contents are mutated under frames that are right again, or replaced by bombs."""
    frame = reader._unpack(self._whole[rng.choice([0, 2, 4])])
    at, parts = 0, []
    for length in frame.header["streams"]:
      stream, at = bytes(frame.streams[at : at + length]), at + length
      if rng.random() < 0.4:
        raw = bytearray(zstandard.ZstdDecompressor().decompress(stream))
        for _ in range(rng.randint(1, 9)):
          raw[rng.randrange(len(raw))] = rng.choice([0, 0x7C, 0x7F, 0xFC, 0xFF, rng.randrange(256)])
        stream = rng.choice([zstandard.ZstdCompressor().compress(bytes(raw)), self._frame(rng)])
      parts.append(stream)
    parts.append(bytes(frame.streams[at:]))  # the tokenizer
    header = frame.header | {"streams": [len(part) for part in parts[:-1]]}
    packed = zstandard.ZstdCompressor().compress(json.dumps(header).encode())
    prefix = reader.PREFIX.pack(reader.MAGIC, reader.VERSION, 0, len(packed))
    return prefix + bytes(16) + packed + b"".join(parts)

  def _frame(self, rng: random.Random) -> bytes:
    """A zstd frame that stands for much, is damaged, claims another size or asks for a large window."""
    inner = rng.choice([b" " * 2**18, b"[" * 2**17, b"[" + b"[]," * 80_000 + b"[]]", bytes(2**24), b"{}", b"1" * 2**17])
    frame = zstandard.ZstdCompressor(level=1).compress(inner)
    return rng.choice([frame, mutate_bytes(frame, rng, [frame]), b"\x28\xb5\x2f\xfd\xe0" + b"\xff" * 8 + frame[5:]])


SMALL = ModelConfig(
  vocab_size=64, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, mlp_mult=2.0, num_loops=1, loop_start=0,
  loop_end=1, parallel_start_layer=0, rope_dims=4, xsa_last_n=2,
)  # fmt: skip

TEXTS = [
  "", " ", "  a  b ", "a\r\n\tb\n\n", "\u2581a\u2581\u2581 \u2581", "\0\x1f\x7f", "e\u0301\ufb01\uff21\u212b",
  "\ue001\ue002x\ue003\ue004", "😀👩\u200d👧 日本語", "<s></s><unk><0x41>", "The Congress of 1898 WAR.", "x" * 300,
  " " * 300, "\ufffd\U0010ffff\ud7ff\ue000",
]  # fmt: skip


class Tokenizers:
  """Models of four kinds, mutated as bytes and as protobufs."""

  share = 1 / 6

  def __init__(self, folder: Path):
    words = ["the", "of", "Congress", "and", "war", "peace", "1898", "State", "Union", "people", "é", "日本"]
    rng = random.Random(0)
    texts = [" ".join(rng.choices(words, k=40)) + ".\n" for _ in range(100)]
    self._models = [train_tokenizer(texts, 300).model] * 3
    for options in ({"model_type": "bpe", "byte_fallback": True}, {"model_type": "unigram"}, {"model_type": "bpe"}):
      model = io.BytesIO()
      size = 320 if "byte_fallback" in options else 60
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=size, hard_vocab_limit=False, minloglevel=2,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, **options,
      )  # fmt: skip
      self._models.append(model.getvalue())
    self._path = folder / "tokenizer.model"

  def case(self, rng: random.Random) -> str:
    model = rng.choice(self._models)
    model = mutate_bytes(model, rng, self._models) if rng.random() < 0.3 else self._mutated(model, rng)
    self._path.write_bytes(model)
    with Memory() as memory:
      tokenizer = Tokenizer.load(self._path)
    if memory.peak > 64 * MIB:
      raise OverMemoryError(f"{memory.peak / MIB:.0f} MiB")
    return self._used(tokenizer, rng)

  def _used(self, tokenizer: Tokenizer, rng: random.Random) -> str:
    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)
    pieces = [piece.piece for piece in proto.pieces]
    texts = list(TEXTS)
    for _ in range(60):
      ends = rng.choices([(0, 0x80), (0, 0xD800), (0xE000, 0x110000)], k=9)
      parts = [*(chr(rng.randrange(*pair)) for pair in ends), *rng.choices(pieces, k=9), " ", "\u2581", "\n"]
      texts.append("".join(rng.choices(parts, k=rng.randint(1, 30))))
    texts += [piece.replace("\u2581", " ") for piece in pieces]
    for text in texts:
      tokens_N = tokenizer.encode(text)
      require(tokens_N.max(initial=0) < tokenizer.vocab_size, "a token outside the vocabulary")
      back = tokenizer.decode(tokens_N)
      require(1 not in tokens_N.tolist(), f"a bos inside {text!r}")
      if tokenizer.kind == "lossless":
        require(back == text, f"called lossless, but {text!r} becomes {back!r}")
        begin_N, end_N = tokenizer.surfaces(text, tokens_N)
        require("".join(text[a:b] for a, b in zip(begin_N, end_N, strict=True)) == text, f"surfaces of {text!r}")
      else:
        with contextlib.suppress(UserError):
          tokenizer.surfaces(text, tokens_N)
    return "lossless" if tokenizer.kind == "lossless" else "read"

  def _mutated(self, model: bytes, rng: random.Random) -> bytes:
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for _ in range(rng.choice([1, 1, 2, 4])):
      piece = rng.choice(proto.pieces)
      spec = rng.choice([proto.normalizer_spec, proto.normalizer_spec, proto.denormalizer_spec])
      match rng.randrange(14):
        case 0 | 1 | 2:
          piece.type = rng.choice([1, 2, 3, 4, 5, 6])
        case 3 | 4:
          odd = ["", "\0", "a", "e", " ", "a b", "\u2581", "\u2581\u2581", "a\u2581", "<0x41>", "<s>", "\n", "\ufb01"]
          odd.append("x" * 3000)
          piece.piece = rng.choice([*odd, chr(rng.randrange(0x800)), rng.choice(proto.pieces).piece + "a"])
        case 5:
          piece.score = rng.choice([math.nan, math.inf, -math.inf, 0.0, 1e30, -1e30])
        case 6:
          del proto.pieces[rng.randrange(len(proto.pieces))]
        case 7:
          proto.pieces.add().CopyFrom(piece)
        case 8:
          name = rng.choice(["add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"])
          setattr(spec, name, not getattr(spec, name))
        case 9 | 10:
          table = spec.precompiled_charsmap or self._table()
          spec.precompiled_charsmap = mutate_bytes(table, rng, [table])
        case 11:
          name = rng.choice(["byte_fallback", "treat_whitespace_as_suffix", "split_by_whitespace", "split_digits"])
          setattr(proto.trainer_spec, name, not getattr(proto.trainer_spec, name))
        case 12:
          proto.trainer_spec.model_type = rng.choice([1, 2, 3, 4])
        case 13:
          name = rng.choice(["bos_piece", "unk_piece", "pad_piece", "unk_surface"])
          setattr(proto.trainer_spec, name, rng.choice(["", "a", "<s>", "the", "\u2581"]))
    return proto.SerializeToString()

  def _table(self) -> bytes:
    return sentencepiece_model_pb2.ModelProto.FromString(self._models[3]).normalizer_spec.precompiled_charsmap


class Shards:
  """Token shards and a validation folder."""

  share = 1 / 15

  def __init__(self, folder: Path):
    self._folder = folder / "shards"
    self._folder.mkdir()
    write_shard(self._folder / "whole.bin", np.arange(500))
    self._whole = (self._folder / "whole.bin").read_bytes()

  def case(self, rng: random.Random) -> str:
    head = mutate_bytes(self._whole[:16], rng, [self._whole]).ljust(16, b"\0")[:16]
    data = rng.choice([head + self._whole[16:], mutate_bytes(self._whole, rng, [self._whole])])
    for split in ("val", "val_bytes"):
      (self._folder / f"fineweb_{split}_000000.bin").write_bytes(rng.choice([self._whole, data]))
    path = self._folder / "fineweb_val_000000.bin"
    path.write_bytes(data)
    tokens = read_shard(path)
    require(len(data) == 1024 + 2 * len(tokens), "another number of tokens than the file has")
    require(np.array_equal(tokens, np.frombuffer(data, "<u2", offset=1024)), "other tokens than the file's")
    load_validation(self._folder)
    return "read"


class Manifests:
  """Manifests of a data folder, as JSON and as text."""

  share = 1 / 15

  def __init__(self, folder: Path):
    self._folder = folder / "manifest"
    self._folder.mkdir()
    split = Split(2, 100, 90, 0, (File("fineweb_train_000000.bin", 50, "0" * 64),))
    Manifest("identity", "0" * 64, "lossless", 600, None, "2", "0" * 64, split, split, {"a": [1]}).write(self._folder)
    self._text = (self._folder / MANIFEST).read_bytes()

  def case(self, rng: random.Random) -> str:
    text = mutate_bytes(self._text, rng, [self._text])
    if rng.random() < 0.7:
      text = mutate_json(json.loads(self._text), rng).encode()
    (self._folder / MANIFEST).write_bytes(text)
    manifest = Manifest.read(self._folder)
    if manifest is None:
      return "none"
    for file in manifest.files():
      require("/" not in file.name and type(file.tokens) is int and file.tokens >= 0, "a file of odd fields")
    require(type(manifest.train.tokens) is int and type(manifest.vocab_size) is int, "odd counts")
    manifest.write(self._folder)
    require(Manifest.read(self._folder) == manifest, "what was read does not come back")
    return "read"


class Corpora:
  """Documents as JSON lines, plain and under zstd, with bombs and endless lines among them."""

  share = 1 / 15

  def __init__(self, folder: Path):
    self._folder = folder
    lines = [json.dumps({"text": f"document {i} é" * (i % 5 + 1)}) for i in range(60)]
    self._lines = "\n".join(lines).encode() + b"\n"

  def case(self, rng: random.Random) -> str:
    data = self._lines
    match rng.randrange(5):
      case 0 | 1:
        data = mutate_bytes(data, rng, [data])
      case 2:
        data += rng.choice(RAW).encode(errors="surrogatepass") + b"\n"
      case 3:
        data += rng.choice([b" ", b"\n", b"x", b'{"text": "']) * rng.choice([2**16, 2**20, 2**22])
    path = self._folder / "corpus.jsonl"
    is_packed = rng.random() < 0.7
    if is_packed:
      path = path.with_suffix(".jsonl.zst")
      packed = zstandard.ZstdCompressor(level=3).compress(data)
      packed += rng.choice([b"", b"", packed, self._bomb(rng)])
      data = mutate_bytes(packed, rng, [packed]) if rng.random() < 0.5 else packed
    path.write_bytes(data)
    corpus = JsonLines(path, 1 << 20) if rng.random() < 0.8 else open_corpus(path, 1 << 12)
    texts = 0
    with Memory() as memory:
      try:
        for _, document, _ in corpus.read(Position()):
          require(bool(document.text()), "an empty text")
          texts += 1
      finally:
        memory.__exit__()
        if memory.peak > 64 * MIB:
          raise OverMemoryError(f"{memory.peak / MIB:.0f} MiB")
    return "read"

  def _bomb(self, rng: random.Random) -> bytes:
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    piece = rng.choice([b" ", b"x", b"\n"]) * MIB
    return b"".join([*(compressor.compress(piece) for _ in range(rng.choice([8, 64]))), compressor.flush()])


class Configs:
  """Settings as TOML with odd values."""

  share = 1 / 15

  def __init__(self, folder: Path):
    self._path = folder / "config.toml"
    self._settings = flattened(Settings())

  def case(self, rng: random.Random) -> str:
    lines = []
    for name in rng.sample(list(self._settings), rng.randint(1, 4)):
      if isinstance(self._settings[name], int | float) and rng.random() < 0.6:
        lines.append(f"{name} = {json.dumps(rng.choice([0, 0.5, 1, 1, 2, 8]) * self._settings[name])}")
        continue
      odd = rng.choice([*ODD, *RAW, math.nan, math.inf, 9, 1, "nan@0.5", "1024@1e999", "256:0", "{a=" * 2000])
      shown = odd if isinstance(odd, str) and rng.random() < 0.5 else json.dumps(odd)
      lines.append(f"{name} = {shown.replace('null', 'nan').replace('NaN', 'nan').replace('Infinity', 'inf')}")
    text = "\n".join(lines).encode(errors="surrogatepass")
    self._path.write_bytes(mutate_bytes(text, rng, [text]) if rng.random() < 0.2 else text)
    settings = from_toml(self._path)
    check.check(settings)
    for name, value in flattened(settings).items():
      require(not isinstance(value, float) or math.isfinite(value), f"{name} is {value}")
    require(parameters.count(settings.model) < 2 * check.MAX_PARAMETERS, "a model of too many parameters")
    return "read"


KINDS = {
  "artifact": Artifacts,
  "tokenizer": Tokenizers,
  "shard": Shards,
  "manifest": Manifests,
  "corpus": Corpora,
  "settings": Configs,
}
FAULTS = ("wrong", "memory", "hang", "crash", "foreign")


def outcome_of(kind, seed: int) -> tuple[str, str]:
  """(how a case ended, what there is to say of it)."""
  try:
    return kind.case(random.Random(seed)), ""
  except UserError as error:
    message = str(error)
    return ("refused", "") if message and "\n" not in message.strip() and len(message) < 2000 else ("foreign", message)
  except WrongResultError as error:
    return "wrong", str(error)
  except (OverMemoryError, MemoryError) as error:
    return "memory", repr(error)
  except Exception:
    return "foreign", traceback.format_exc(limit=-3)


class Child:
  """A process that goes through cases, and says of each when it begins and how it ended."""

  def __init__(self, kind, seeds: list[int]):
    self.seeds, self.buffer, self.began = seeds, b"", time.monotonic()
    self.pipe, write_end = os.pipe()
    self.pid = os.fork()
    if self.pid == 0:
      os.close(self.pipe)
      space = ADDRESS_SPACE + process_bytes("VmSize")
      resource.setrlimit(resource.RLIMIT_AS, (space, space))
      resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
      with os.fdopen(write_end, "w") as out:
        for seed in seeds:
          print(json.dumps([seed, *outcome_of(kind, seed), process_bytes("VmHWM")]), file=out, flush=True)
      os._exit(0)
    os.close(write_end)

  def results(self) -> list[list] | None:
    """What came since the last call; None when the process is at its end."""
    data = os.read(self.pipe, 1 << 16)
    *lines, self.buffer = (self.buffer + data).split(b"\n")
    found = [json.loads(line) for line in lines]
    self.seeds = self.seeds[len(found) :]
    if found:
      self.began = time.monotonic()
    return found if data or found else None

  def end(self, fault: str) -> list[list]:
    """Ends the process; returns the case that it was at, if any, as `fault`."""
    if fault == "hang":
      os.kill(self.pid, signal.SIGKILL)
    status = os.waitpid(self.pid, 0)[1]
    os.close(self.pipe)
    if not self.seeds:
      return []
    seed, self.seeds = self.seeds[0], self.seeds[1:]
    return [[seed, fault, f"wait status {status}", 0]]


def run_all(kind, seeds: list[int], jobs: int):
  """Yields [seed, outcome, detail, peak] of every case."""
  batches = collections.deque(seeds[i : i + BATCH] for i in range(0, len(seeds), BATCH))
  with selectors.DefaultSelector() as selector:
    children: set[Child] = set()
    while batches or children:
      while batches and len(children) < jobs:
        child = Child(kind, batches.popleft())
        children.add(child)
        selector.register(child.pipe, selectors.EVENT_READ, child)
      ended = {}
      for key, _ in selector.select(timeout=1.0):
        found = key.data.results()
        if found is None:
          ended[key.data] = "crash"
        else:
          yield from found
      ended |= {child: "hang" for child in children if child not in ended and time.monotonic() - child.began > SECONDS}
      for child, fault in ended.items():
        selector.unregister(child.pipe)
        yield from child.end(fault)
        children.remove(child)
        if child.seeds:
          batches.append(child.seeds)


def main() -> int:
  options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  options.add_argument("--count", type=int, default=30_000, help="artifacts; other kinds have a share of it")
  options.add_argument("--seed", type=int, default=0)
  options.add_argument("--jobs", type=int, default=os.cpu_count())
  options.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
  options.add_argument("--only", help="KIND:NUMBER, to repeat one case here and see its traceback")
  arguments = options.parse_args()
  folder = Path(tempfile.mkdtemp(prefix="hostile"))
  faults = []
  try:
    if arguments.only:
      kind, _, seed = arguments.only.partition(":")
      print(outcome_of(KINDS[kind](folder), int(seed)))
      return 0
    _print_line("kind", ["count", "read", "refused", *FAULTS, "peak MiB", "seconds"])
    for name in arguments.kinds:
      began, kind = time.monotonic(), InOwnFolder(KINDS[name], folder / name)
      first = arguments.seed * 10**9
      seeds = [first + i for i in range(math.ceil(arguments.count * KINDS[name].share))]
      counts, peak = collections.Counter(), 0
      for seed, outcome, detail, held in run_all(kind, seeds, arguments.jobs):
        counts[outcome] += 1
        peak = max(peak, held)
        if outcome in FAULTS:
          faults.append(f"{name}:{seed} {outcome}: {detail}")
      faulty = [counts[fault] for fault in FAULTS]
      done = sum(counts.values()) - counts["refused"] - sum(faulty)
      seconds = round(time.monotonic() - began)
      _print_line(name, [sum(counts.values()), done, counts["refused"], *faulty, round(peak / MIB), seconds])
  finally:
    shutil.rmtree(folder, ignore_errors=True)
  for fault in faults[:20]:
    print(fault)
  return int(bool(faults))


def _print_line(name: str, cells: list) -> None:
  print(f"{name:<10}" + "".join(f"{cell:>9}" for cell in cells), flush=True)


class InOwnFolder:
  """A kind whose cases write to a folder of each process's own."""

  def __init__(self, make, folder: Path):
    self._kind, self._folder, self._pid = None, folder, None
    self._make = make

  def case(self, rng: random.Random) -> str:
    if self._pid != os.getpid():
      own = self._folder / str(os.getpid())
      own.mkdir(parents=True)
      self._kind, self._pid = self._make(own), os.getpid()
    return self._kind.case(rng)


if __name__ == "__main__":
  sys.exit(main())
