"""SentencePiece tokenizers: training, loading, text to tokens and back, and the text that each token covers.

Tokens here are pieces of *coded* text, which CaseOps makes of a document; the bos in front of a document is added where
documents are laid end to end.

Surfaces, the stretches of text that pieces cover, come from the lengths of the pieces and from
`normalize(with_offsets=True)`, which every SentencePiece from 0.2.0 has; the immutable proto that older preparation
scripts read them from ended with 0.2.2.

Encoding is cached by word. SentencePiece's BPE merges two neighbours when together they are a piece. Where no piece
has a space behind another character, no merge crosses the front of a space, so the pieces of a text are those of its
words one after the other, and each word need be encoded only once.
"""

import array
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece
from jaxtyping import Int, Integer, UInt16
from sentencepiece import sentencepiece_model_pb2

from pgolf_jax.data import caseops
from pgolf_jax.data.shards import BOS
from pgolf_jax.data.tokenizer_model import MAX_BYTES, MAX_PIECES, SPACE, gives_texts_back, parse
from pgolf_jax.errors import UserError


def train_tokenizer(coded_texts: Iterable[str], vocab_size: int, *, is_caseops: bool = True) -> "Tokenizer":
  """Returns a lossless BPE tokenizer trained on `coded_texts`, one document each; the same texts give the same model.

  Pad is 0, bos 1, eos 2, unk 3; the CaseOps markers, if any, are 4 to 7; then 256 byte pieces, merges, characters.
  Text is not normalised and all white space is retained, so that decoding gives the text back byte for byte.

  Raises:
    UserError: the texts do not yield `vocab_size` pieces, or that many do not fit in 16 bits.
  """
  markers = list(caseops.MARKERS) if is_caseops else []
  least = 4 + len(markers) + 256 + 1
  if not least <= vocab_size <= MAX_PIECES:
    raise UserError(
      f"a vocabulary of {vocab_size}: choose from {least} (bytes and symbols alone) to {MAX_PIECES} pieces"
    )
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(coded_texts),
      model_writer=model,
      model_type="bpe",
      vocab_size=vocab_size,
      character_coverage=0.999,
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,
      byte_fallback=True,
      split_digits=True,
      pad_id=0,
      bos_id=BOS,
      eos_id=2,
      unk_id=3,
      user_defined_symbols=markers,
      max_sentence_length=2**30,  # a document counts as one sentence, and none is left out for its length
      minloglevel=2,
    )
  except (RuntimeError, OSError, ValueError) as error:
    # The last sentence of SentencePiece's message, without its source location.
    reason = str(error).strip().splitlines()[-1].rpartition("] ")[2] or type(error).__name__
    raise UserError(
      f"no tokenizer of {vocab_size} pieces can be trained on this text ({reason}); "
      "give more text or ask for a vocabulary of another size"
    ) from error
  return Tokenizer(model.getvalue(), name="the tokenizer just trained")


class Tokenizer:
  """One SentencePiece model.

  Attributes:
    kind: "lossless" if decoding gives every text back byte for byte (identity normalisation, white space retained,
      byte fallback, and no text among thousands of awkward ones that is not given back), else "normalising".
    vocab_size: number of pieces V.
    model: the serialised model.
    has_caseops: whether each of the four CaseOps markers is a piece.
  """

  def __init__(self, model: bytes, name: str = "tokenizer"):
    """Loads a serialised model; `name` stands for it in messages.

    Raises:
      UserError: it is not a SentencePiece model, is damaged, has more pieces than 16 bits can number, or a bos other
        than 1.
    """
    self.model, self._name = model, name
    try:
      proto = parse(model)
      # As it was parsed, so that the library cannot read other things into the bytes than those that were checked.
      self._sp = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    except ValueError as error:
      raise UserError(f"{name}: {error}; give the .model file of a tokenizer") from error
    except Exception as error:  # the type differs between releases of SentencePiece
      raise UserError(f"{name}: not a SentencePiece model; give the .model file of a tokenizer") from error
    self.vocab_size = len(proto.pieces)
    if self._sp.bos_id() != BOS:
      raise UserError(
        f"{name}: bos is {self._sp.bos_id()}, but documents start with {BOS}; use a tokenizer whose bos is {BOS}"
      )
    spec = proto.normalizer_spec
    may_be_lossless = (
      sum(piece.type == piece.BYTE for piece in proto.pieces) == 256
      and spec.escape_whitespaces
      and not (
        spec.precompiled_charsmap
        or spec.add_dummy_prefix
        or spec.remove_extra_whitespaces
        or proto.denormalizer_spec.precompiled_charsmap
      )
    )
    user_defined = {piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED}
    self.has_caseops = user_defined.issuperset(caseops.MARKERS)
    self._unk = self._sp.unk_id()
    self._length_V = np.array([_length(piece) for piece in proto.pieces])
    self._byte_V = np.array([int(p.piece[1:-1], 16) if p.type == p.BYTE else -1 for p in proto.pieces])
    byte_ids = {int(byte): token for token, byte in enumerate(self._byte_V) if byte >= 0}
    # SentencePiece would decode a literal ▁ as a space: it is spelt in bytes instead.
    self._literal_space = [byte_ids[byte] for byte in SPACE.encode()] if may_be_lossless else None
    self._dummy_prefix = spec.add_dummy_prefix
    self._letter_a = self._sp.piece_to_id("a")
    self._words = None
    if may_be_lossless and not gives_texts_back(proto, self._there_and_back):
      self._literal_space = None
    self.kind: Literal["lossless", "normalising"] = "normalising" if self._literal_space is None else "lossless"
    self._words = _WordCache(self._encode_word) if _words_are_separate(proto) else None

  @classmethod
  def load(cls, path: Path, vocab_size: int | None = None) -> "Tokenizer":
    """Reads a .model file.

    Raises:
      UserError: as the constructor; or the file cannot be read, or has not `vocab_size` pieces.
    """
    path = Path(path)
    try:
      if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: {path.stat().st_size} bytes, more than a tokenizer's {MAX_BYTES}; give a .model file")
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
    """SHA-256 of the model, in hexadecimal."""
    return hashlib.sha256(self.model).hexdigest()

  def encode(self, coded: str) -> UInt16[np.ndarray, "N"]:
    """Returns the pieces of `coded`, the same as SentencePiece's `encode` but faster.

    A lossless tokenizer differs from it in one thing: a literal ▁ becomes its three bytes.
    """
    if self._words is not None:
      text = coded if self._literal_space else self._sp.normalize(coded)
      tokens_N = self._words.encode(text, " " if self._literal_space else SPACE)
      if tokens_N is not None:
        return tokens_N
    return np.array(self._encode_text(coded), np.uint16)

  def decode(self, tokens_N: Sequence[int] | Integer[np.ndarray, "N"]) -> str:
    """Returns the coded text that `tokens_N` stand for; bos, eos and padding stand for nothing.

    Raises:
      UserError: a token lies outside the vocabulary.
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
    """Returns, for each piece's surface, its first character in `coded` and the one after its last.

    A character that is spelt in bytes belongs to the last of them. A normalising tokenizer's surfaces include the
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
    """Returns how many characters of normalised text each piece covers."""
    if self._unk in tokens_N:  # only without byte fallback: then the strings alone tell how long a piece is
      return np.array([len(piece) for piece in self._sp.encode(coded, out_type=str)], np.int64)
    length_N, byte_N = self._length_V[tokens_N], self._byte_V[tokens_N]
    continues_N = (byte_N[1:] & 0xC0) == 0x80  # in UTF-8, bytes 10xxxxxx continue a character; −1 is 11…1
    length_N[:-1] -= (byte_N[:-1] >= 0) & continues_N
    return length_N

  def _encode_text(self, text: str) -> list[int]:
    if self._literal_space is None or SPACE not in text:
      return self._sp.encode(text)
    first, *rest = map(self._sp.encode, text.split(SPACE))
    return sum(([*self._literal_space, *part] for part in rest), first)

  def _there_and_back(self, texts: Sequence[str]) -> list[str]:
    return self._sp.decode([self._encode_text(text) for text in texts])

  def _encode_word(self, word: str) -> list[int] | None:
    """Returns the pieces of one word of normalised text; None where they depend on the rest of the text."""
    if self._literal_space is not None:
      return self._encode_text(word)
    if self._dummy_prefix:
      return self._sp.encode(word[1:]) if self._sp.normalize(word[1:]) == word else None
    if not word.startswith(SPACE):
      return self._sp.encode(word) if self._sp.normalize(word) == word else None
    # Encoded alone, the word would lose the space in front of it; a letter in front prevents that.
    text = f"a{word}"
    first, *rest = self._sp.encode(text)
    return rest if self._sp.normalize(text) == text and first == self._letter_a else None


def _length(piece: sentencepiece_model_pb2.ModelProto.SentencePiece) -> int:
  if piece.type == piece.CONTROL:
    return 0
  return 1 if piece.type == piece.BYTE else len(piece.piece)


_SPACE_INSIDE = re.compile(f"[^{SPACE}]{SPACE}")


def _words_are_separate(model: sentencepiece_model_pb2.ModelProto) -> bool:
  """Tells whether the pieces of a text are the pieces of its words, in order."""
  return (
    model.trainer_spec.model_type == model.trainer_spec.BPE
    and model.normalizer_spec.escape_whitespaces
    and not any(_SPACE_INSIDE.search(piece.piece) for piece in model.pieces)
  )


class _WordCache:
  """Encodes text word by word and caches the first few hundred thousand different words.

  On web text 94 of 100 words are in the cache; evicting old ones for new ones would give 93.
  """

  CAPACITY = 1 << 18  # words, about 50 MB
  MAX_LENGTH = 64  # characters of a word that is cached

  def __init__(self, encode_word: Callable[[str], list[int] | None]):
    """Makes an empty cache.

    Args:
      encode_word: returns the pieces of a word, the spaces in front of it included, or None if it cannot tell.
    """
    self._pieces = _WordPieces(encode_word)
    self._patterns = {space: re.compile(f"{space}*[^{space}]+|{space}+") for space in (" ", SPACE)}

  def __len__(self) -> int:
    return len(self._pieces)

  def encode(self, text: str, space: str) -> UInt16[np.ndarray, "N"] | None:
    """Returns the pieces of `text`, in which `space` is written for a space; None if a word cannot be encoded."""
    try:
      return np.frombuffer(b"".join(map(self._pieces.__getitem__, self._patterns[space].findall(text))), np.uint16)
    except _CannotTellError:
      return None


class _CannotTellError(Exception):
  pass


class _WordPieces(dict):
  """Word → its pieces as packed 16-bit numbers, computed when first asked for."""

  def __init__(self, encode_word: Callable[[str], list[int] | None]):
    super().__init__()
    self._encode_word = encode_word

  def __missing__(self, word: str) -> bytes:
    pieces = self._encode_word(word)
    if pieces is None:
      raise _CannotTellError
    packed = array.array("H", pieces).tobytes()
    if len(word) <= _WordCache.MAX_LENGTH and len(self) < _WordCache.CAPACITY:
      self[word] = packed
    return packed
