"""Checks of a serialised SentencePiece model before the library loads it, and the proof that it loses no text.

The library trusts its models: a damaged normalisation table makes it read memory that is not its own. What is checked
here is all that it follows without looking.
"""

from collections.abc import Callable, Sequence

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from pgolf_jax.data import caseops

Proto = sentencepiece_model_pb2.ModelProto

MAX_BYTES = 1 << 26  # of a model; 65,536 pieces take about a megabyte
MAX_PIECES = 1 << 16
SPACE = "\u2581"  # ▁, which SentencePiece writes for a space


def parse(model: bytes) -> Proto:
  """Returns a model whose parts are safe to load.

  Raises:
    ValueError: it is no model, or one that the library would not survive; says which part is at fault.
  """
  _require(len(model) <= MAX_BYTES, f"{len(model)} bytes, more than {MAX_BYTES}")
  try:
    proto = Proto.FromString(model)
    pieces = [piece.piece for piece in proto.pieces]
  except Exception as error:  # the type differs between releases of protobuf
    raise ValueError("not a SentencePiece model") from error
  _require(1 <= len(pieces) <= MAX_PIECES, f"{len(pieces)} pieces, but a shard's tokens number 1 to {MAX_PIECES}")
  _require(len(set(pieces)) == len(pieces), "two pieces of the same text")
  _require(all(pieces) and not any("\0" in piece for piece in pieces), "an empty piece, or one with a zero byte")
  _require(bool(np.isfinite([piece.score for piece in proto.pieces]).all()), "a score that is not finite")
  types = [piece.type for piece in proto.pieces]
  _require(types.count(Proto.SentencePiece.UNKNOWN) == 1, "not exactly one unknown piece")
  # The library would make a control piece of such a character in a text, and so a bos inside a document.
  control = [piece for piece, kind in zip(pieces, types, strict=True) if kind == Proto.SentencePiece.CONTROL]
  _require(all(len(piece) > 1 for piece in control), "a control piece of one character")
  kinds = (proto.trainer_spec.BPE, proto.trainer_spec.UNIGRAM, proto.trainer_spec.CHAR)
  _require(proto.trainer_spec.model_type in kinds, "a kind of model other than BPE, unigram and characters")
  for spec in (proto.normalizer_spec, proto.denormalizer_spec):
    _check_table(spec.precompiled_charsmap)
  return proto


def _require(condition: bool, fault: str) -> None:
  if not condition:
    raise ValueError(fault)


def _check_table(table: bytes) -> None:
  """Raises ValueError unless looking any text up in a normalisation table stays inside it.

  The table is the size of a double array in bytes, its 32-bit units (Darts), and the strings that its values point to,
  each ended by a zero. From unit p the library goes to unit p ^ offset ^ (a byte), as long as that one's label is
  this byte, and a unit with a leaf has its value at p ^ offset.
  """
  if not table:
    return
  size = int.from_bytes(table[:4], "little")
  _require(len(table) >= 4 and size % 1024 == 0 and 0 < size < len(table) - 4, "a damaged normalisation table")
  unit_P = np.frombuffer(table, "<u4", size // 4, 4).astype(np.int64)
  strings = table[4 + size :]
  next_P = np.arange(len(unit_P)) ^ ((unit_P >> 10) << ((unit_P & (1 << 9)) >> 6))
  is_node_P = unit_P < 1 << 31  # others hold values, and are never a label
  # Blocks of 256 units are whole, so that a byte does not lead out of one.
  _require(bool((next_P[is_node_P] < len(unit_P)).all()), "a damaged normalisation table")
  has_leaf_P = is_node_P & ((unit_P >> 8) & 1 == 1)
  values = unit_P[next_P[has_leaf_P]] & (2**31 - 1)
  _require(bool((values < len(strings)).all()) and strings.endswith(b"\0"), "a damaged normalisation table")
  try:
    strings.decode()
  except UnicodeDecodeError as error:
    raise ValueError("a damaged normalisation table") from error


def gives_texts_back(proto: Proto, there_and_back: Callable[[Sequence[str]], Sequence[str]]) -> bool:
  """Tells whether texts come back from a tokenizer, among them all that a model can treat in a way of its own.

  Where normalisation does nothing, decoding joins what the single pieces stand for. A text is therefore given back if
  every piece stands for its own text and every byte for itself. That is tried for each piece alone, between others and
  at the ends of a text, for each byte in the characters that hold it, and for what normalising would change.

  Args:
    there_and_back: encodes and decodes texts.
  """
  pieces = [piece.piece for piece in proto.pieces]
  pieces += [piece.replace(SPACE, " ") for piece in pieces]
  # Every byte that UTF-8 has: all characters of one and two bytes, and one for each first byte of longer ones.
  points = [*range(0x800), *range(0x800, 0xD800, 0x7F1), *range(0xE000, 0x10FFFF, 0xFFF1), 0xFFFD, 0xFFFF, 0x10FFFF]
  alone = [*pieces, *map(chr, points), *_TEXTS]
  fifties = [alone[i : i + 50] for i in range(0, len(alone), 50)]
  joined = [joint.join(some) for some in fifties for joint in ("", " x", SPACE)]
  texts = [*alone, *joined, *(f" {text} " for text in _TEXTS)]
  return list(there_and_back(texts)) == texts


_TEXTS = [
  *(" " * n for n in (1, 2, 3, 17, 300)),
  *(f"{space}a{space}{space}b{space}" for space in (" ", "\t", "\n", "\r\n", "\v\f", "\0", SPACE, "\u00a0", "\u3000")),
  *(f"a {mark}b{mark} " for mark in caseops.MARKERS),
  "e\u0301 \u0301\u0323 \u1e9b\u0323 \ufb01\u00bd\u2460\u212b\uff21\ufdfa \u0344 \uac00\u1100\u1161",  # NFC, NFKC
  "\ufeff\u200b\u200d\u00ad\u2028\u2029\u0085\x1b\x7f\u0080",  # marks without width, ends of lines, controls
  "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd",
  "\ue000\ue005\uf8ff\U000f0000\U0010fffd\ufffe\U0001fffe",
  "<s></s><unk><pad><0x41><0x00>▁<0xE2> \u2047 ",
  "x" * 5000,
  "ab " * 3000,
]
