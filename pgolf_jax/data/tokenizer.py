"""SentencePiece tokenizers: loading, telling the lossless kind from the normalising, text to tokens and back.

Tokens here are pieces of *coded* text (what CaseOps makes of a document); the bos that opens a document is put in
front by whoever lays documents end to end.

Surfaces, the stretches of input that pieces cover, come from the lengths of the pieces and from
`normalize(with_offsets=True)`, which every SentencePiece from 0.2.0 has; the immutable proto that older
preparation scripts read them from ended with 0.2.2.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece
from jaxtyping import Int, Integer, UInt16
from sentencepiece import sentencepiece_model_pb2

from pgolf_jax.data import caseops
from pgolf_jax.data.shards import BOS
from pgolf_jax.data.words import SPACE, WordPieces, words_are_separate
from pgolf_jax.errors import UserError

MAX_PIECES = 1 << 16


class Tokenizer:
  """One SentencePiece model.

  Attributes:
    kind: "lossless" if decoding gives every text back byte for byte (identity normalisation, white space kept, byte
      fallback), else "normalising".
    vocab_size: number of pieces V.
    model: the serialised model.
    has_caseops: whether the four CaseOps markers are pieces of their own.
  """

  def __init__(self, model: bytes, name: str = "tokenizer"):
    """Loads a serialised model; `name` stands for it in messages.

    Raises:
      UserError: not a SentencePiece model, more pieces than 16 bits can hold, or a bos other than 1.
    """
    self.model, self._name = model, name
    try:
      self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
      proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    except Exception as error:  # the type differs between releases of SentencePiece and protobuf
      raise UserError(f"{name}: not a SentencePiece model; give the .model file of a tokenizer") from error
    self.vocab_size = len(proto.pieces)
    if self.vocab_size > MAX_PIECES:
      raise UserError(f"{name}: {self.vocab_size} pieces, but a shard's tokens are of 16 bits (at most {MAX_PIECES})")
    if self._sp.bos_id() != BOS:
      raise UserError(f"{name}: bos is {self._sp.bos_id()}; documents start with {BOS}, use a tokenizer that has it so")
    spec = proto.normalizer_spec
    byte_fallback = sum(piece.type == piece.BYTE for piece in proto.pieces) == 256
    lossless = (
      byte_fallback
      and spec.escape_whitespaces
      and not (
        spec.precompiled_charsmap
        or spec.add_dummy_prefix
        or spec.remove_extra_whitespaces
        or proto.denormalizer_spec.precompiled_charsmap
      )
    )
    self.kind: Literal["lossless", "normalising"] = "lossless" if lossless else "normalising"
    own = {piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED}
    self.has_caseops = own.issuperset(caseops.MARKERS)
    self._unk = self._sp.unk_id()
    self._length_V = np.array([_length(piece) for piece in proto.pieces])
    self._byte_V = np.array([int(p.piece[1:-1], 16) if p.type == p.BYTE else -1 for p in proto.pieces])
    byte_ids = {int(byte): token for token, byte in enumerate(self._byte_V) if byte >= 0}
    # A literal ▁ would come back as the space that SentencePiece writes so: spell it in bytes.
    self._literal_space = [byte_ids[byte] for byte in SPACE.encode()] if lossless else None
    self._dummy_prefix = spec.add_dummy_prefix
    self._letter_a = self._sp.piece_to_id("a")
    self._words = WordPieces(self._encode_word) if words_are_separate(proto) else None

  @classmethod
  def load(cls, path: Path, vocab_size: int | None = None) -> "Tokenizer":
    """Reads a .model file.

    Raises:
      UserError: as the constructor; or the file cannot be read, or `vocab_size` is given and is not its size.
    """
    path = Path(path)
    try:
      tokenizer = cls(path.read_bytes(), name=str(path))
    except OSError as error:
      raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a .model file") from error
    if vocab_size is not None and tokenizer.vocab_size != vocab_size:
      raise UserError(
        f"{path}: a tokenizer of {tokenizer.vocab_size} pieces where {vocab_size} were asked for; "
        f"use another tokenizer or set the vocabulary size to {tokenizer.vocab_size}"
      )
    return tokenizer

  def __reduce__(self):
    return Tokenizer, (self.model, self._name)

  @property
  def sha256(self) -> str:
    return hashlib.sha256(self.model).hexdigest()

  def encode(self, coded: str) -> UInt16[np.ndarray, "N"]:
    """The pieces of `coded`, as SentencePiece's own `encode` gives them, only faster.

    A lossless tokenizer differs from it in one thing: a literal ▁ becomes its three bytes.
    """
    if self._words is not None:
      text = coded if self._literal_space else self._sp.normalize(coded)
      tokens_N = self._words.encode(text, " " if self._literal_space else SPACE)
      if tokens_N is not None:
        return tokens_N
    return np.array(self._encode_text(coded), np.uint16)

  def decode(self, tokens_N: Sequence[int] | Integer[np.ndarray, "N"]) -> str:
    """The coded text that `tokens_N` stand for; bos, eos and padding stand for nothing.

    Raises:
      UserError: a token outside the vocabulary.
    """
    tokens_N = np.asarray(tokens_N, np.int64)
    if tokens_N.size and not 0 <= tokens_N.min() <= tokens_N.max() < self.vocab_size:
      at = int(np.flatnonzero((tokens_N < 0) | (tokens_N >= self.vocab_size))[0])
      raise UserError(
        f"token {tokens_N[at]} at {at} lies outside the vocabulary of {self.vocab_size}; use the data's own tokenizer"
      )
    return self._sp.decode(tokens_N.tolist())

  def surfaces(
    self, coded: str, tokens_N: Integer[np.ndarray, "N"]
  ) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
    """First character in `coded` of each piece's surface, and the one after its last.

    Where a character is spelt in bytes, the last of them has it. A normalising tokenizer's surfaces include the
    white space that it dropped, except at the very start and end of the text.

    Raises:
      UserError: `tokens_N` are not the pieces of `coded`.
    """
    if self.kind == "lossless":
      normal, offset_C = coded, np.arange(len(coded) + 1)
    else:
      normal, offsets = self._sp.normalize(coded, with_offsets=True)
      offset_C = np.array(offsets, np.int64)
    end_N = np.cumsum(self._lengths(coded, np.asarray(tokens_N, np.int64)))
    begin_N = np.concatenate([[0], end_N[:-1]]) if end_N.size else end_N
    if (end_N[-1] if end_N.size else 0) != len(normal):
      raise UserError("these tokens are not this tokenizer's pieces of this text; prepare the data again")
    return offset_C[begin_N], offset_C[end_N]

  def _lengths(self, coded: str, tokens_N: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
    """Characters of normalised text that each piece covers."""
    if self._unk in tokens_N:  # only without byte fallback: then the strings alone know how long a piece is
      return np.array([len(piece) for piece in self._sp.encode(coded, out_type=str)], np.int64)
    length_N, byte_N = self._length_V[tokens_N], self._byte_V[tokens_N]
    continues_N = (byte_N[1:] & 0xC0) == 0x80  # in UTF-8, bytes 10xxxxxx go on with a character; −1 is 11…1
    length_N[:-1] -= (byte_N[:-1] >= 0) & continues_N
    return length_N

  def _encode_text(self, text: str) -> list[int]:
    if self._literal_space is None or SPACE not in text:
      return self._sp.encode(text)
    first, *rest = map(self._sp.encode, text.split(SPACE))
    return sum(([*self._literal_space, *part] for part in rest), first)

  def _encode_word(self, word: str) -> list[int] | None:
    """Pieces of one word out of normalised text; None where only the whole text would tell."""
    if self._literal_space is not None:
      return self._encode_text(word)
    if self._dummy_prefix:
      return self._sp.encode(word[1:]) if self._sp.normalize(word[1:]) == word else None
    if not word.startswith(SPACE):
      return self._sp.encode(word) if self._sp.normalize(word) == word else None
    # Taken alone, the word would lose the space in front of it: let a letter come first.
    text = f"a{word}"
    first, *rest = self._sp.encode(text)
    return rest if self._sp.normalize(text) == text and first == self._letter_a else None


def _length(piece: sentencepiece_model_pb2.ModelProto.SentencePiece) -> int:
  if piece.type == piece.CONTROL:
    return 0
  return 1 if piece.type == piece.BYTE else len(piece.piece)
