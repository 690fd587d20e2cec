"""How many bytes a token can stand for, from its piece alone, and what the official validation split adds up to.

Where text is published without a sidecar, what its pieces spell makes one, as in the challenge's own script.

A lossless tokenizer's token stands for the bytes of its piece. A normalising one's may stand for more, since it dropped
or shortened characters (white space, full-width letters); how much is natural was measured on web pages.
"""

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, Integer
from sentencepiece import sentencepiece_model_pb2

from pgolf_jax.data import caseops
from pgolf_jax.data.shards import BOS, iter_documents, list_shards, read_count, shard_path, write_shard
from pgolf_jax.data.tokenizer import SPACE, Tokenizer
from pgolf_jax.errors import UserError

PUBLISHED_TOKENIZER = "97754754561f20def5edd99765ca0668f880bd94e67316d54aa10ab25f45cc4d"
"""SHA-256 of the tokenizer of the published CaseOps data."""

OFFICIAL_DOCUMENTS, OFFICIAL_TOKENS, OFFICIAL_BYTES = 50_000, 47_853_344, 151_080_645
"""Of the official validation split, under the published tokenizer."""

# Of what a normalising tokenizer dropped; under the published one, 8,291 web pages with their line breaks have 0.011 %,
# 0.41 % and 0.09 %; the worst of their seven sources has 1.4 % of bytes.
_MOST_TOKENS = 0.02  # of those without white space: may stand for more bytes than their pieces spell
_MOST_SPACES = 0.10  # of those with white space
_MOST_BYTES = 0.03  # of all bytes counted


@dataclasses.dataclass
class Total:
  """Sums over the documents of a validation split.

  Attributes:
    documents: how many.
    counted: bytes of the sidecar.
    beyond: those that the pieces do not spell.
    tokens: how many; without and with white space.
    more: those that stand for more bytes than their pieces spell.
  """

  documents: int = 0
  counted: int = 0
  beyond: int = 0
  tokens: Int[np.ndarray, "2"] = dataclasses.field(default_factory=lambda: np.zeros(2, np.int64))
  more: Int[np.ndarray, "2"] = dataclasses.field(default_factory=lambda: np.zeros(2, np.int64))

  def add(self, bytes_N: Int[np.ndarray, "N"], spelt_N: Int[np.ndarray, "N"], has_space_N: Bool[np.ndarray, "N"]):
    """Adds a document: its sidecar, what its pieces spell, and which of them have white space."""
    self.documents += 1
    self.counted += int(bytes_N.sum())
    self.beyond += int(np.maximum(bytes_N - spelt_N, 0).sum())
    self.tokens += np.bincount(has_space_N, minlength=2)
    self.more += np.bincount(has_space_N, weights=bytes_N > spelt_N, minlength=2).astype(np.int64)

  def fault(self, tokenizer_sha256: str) -> str | None:
    """Returns what is wrong with the sums: too much beyond the pieces, or other totals than the official ones."""
    limits = (("without white space", _MOST_TOKENS), ("with white space", _MOST_SPACES))
    for (what, limit), tokens, more in zip(limits, self.tokens, self.more, strict=True):
      if more > max(limit * tokens, _FEW):
        return f"{more:,} of {tokens:,} tokens {what} stand for more bytes than they spell, at most {limit:.0%} may"
    if self.beyond > max(_MOST_BYTES * self.counted, _FEW):
      return (
        f"{self.beyond:,} of {self.counted:,} bytes are beyond what the tokens spell, at most {_MOST_BYTES:.0%} may be"
      )
    if not self.is_official(tokenizer_sha256):
      return None
    official = {"documents": OFFICIAL_DOCUMENTS, "tokens": OFFICIAL_TOKENS, "bytes": OFFICIAL_BYTES}
    sums = {"documents": self.documents, "tokens": int(self.tokens.sum()), "bytes": self.counted}
    wrong = [
      f"{sums[what]:,} {what}, the official split has {official[what]:,}"
      for what in sums
      if sums[what] != official[what]
    ]
    return wrong[0] if wrong else None

  def is_official(self, tokenizer_sha256: str) -> bool:
    """Whether this is, or says it is, the official split under the published tokenizer."""
    has_size = self.documents == OFFICIAL_DOCUMENTS or self.tokens.sum() == OFFICIAL_TOKENS
    return tokenizer_sha256 == PUBLISHED_TOKENIZER and bool(has_size)

  @property
  def finding(self) -> str:
    """What the pieces spell of it."""
    if not self.beyond:
      return "the tokens spell each of them"
    return f"{self.beyond / self.counted:.2%} of them beyond what the tokens spell, as dropped white space is"


_FEW = 64  # tokens, bytes: of a small folder this is no share


class PieceBytes:
  """The UTF-8 bytes that the pieces of a tokenizer spell, and whether they spell white space.

  Args:
    tokenizer: gives the pieces.
    is_caseops: whether its text is rewritten by CaseOps, whose markers stand for no bytes.
  """

  def __init__(self, tokenizer: Tokenizer, *, is_caseops: bool):
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)
    pieces, self._has_prefix = model.pieces, model.normalizer_spec.add_dummy_prefix
    self._unknown = [i for i, p in enumerate(pieces) if p.type == p.UNKNOWN]
    self._bytes_V = np.array([_spelt(piece) for piece in pieces], np.int64)
    self._byte_V = np.array([int(p.piece[1:-1], 16) if p.type == p.BYTE else -1 for p in pieces])
    self._has_space_V = np.array([SPACE in p.piece or p.type == p.UNKNOWN for p in pieces])
    self._is_marker_V = np.array([is_caseops and p.piece in caseops.MARKERS for p in pieces])
    self._esc = [i for i, p in enumerate(pieces) if is_caseops and p.piece == caseops.ESC]

  def without_text(self, tokens_N: Integer[np.ndarray, "N"]) -> Bool[np.ndarray, "N"]:
    """Tells of each token of a document whether it is a bos or a CaseOps marker that is not escaped.

    Raises:
      UserError: a token lies outside the vocabulary.
    """
    if (highest := tokens_N.max(initial=0)) >= len(self._bytes_V):
      raise UserError(f"token {highest} lies outside {len(self._bytes_V)} pieces; name the data's own tokenizer")
    is_marker_N = self._is_marker_V[tokens_N]
    if is_marker_N.any():
      # Every other ESC of a row of them is itself escaped.
      place_N = np.arange(len(tokens_N))
      last_other_N = np.maximum.accumulate(np.where(np.isin(tokens_N, self._esc), -1, place_N))
      is_marker_N[1:] &= (place_N[:-1] - last_other_N[:-1]) % 2 == 0
    return (tokens_N == BOS) | is_marker_N

  def spelt(self, tokens_N: Integer[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
    """Returns the bytes that each token of a document spells; those of a character in bytes belong to the last one."""
    is_without_N = self.without_text(tokens_N)
    bytes_N, byte_N = np.where(is_without_N, 0, self._bytes_V[tokens_N]), self._byte_V[tokens_N]
    continues_N = (byte_N & 0xC0) == 0x80
    continues_N &= byte_N >= 0
    starts = np.flatnonzero(~continues_N | (np.arange(len(tokens_N)) == 0))
    if len(starts) == len(tokens_N):
      return bytes_N
    sums, result_N = np.add.reduceat(bytes_N, starts), np.zeros(len(tokens_N), np.int64)
    result_N[np.append(starts[1:], len(tokens_N)) - 1] = sums
    return result_N

  def counted(self, tokens_N: Integer[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
    """Returns the bytes of text under each token as far as it spells them, without a space that was put in front."""
    bytes_N = np.where(np.isin(tokens_N, self._unknown), 0, self.spelt(tokens_N))
    if self._has_prefix and len(tokens_N) > 1 and bytes_N[1]:
      bytes_N[1] -= self._has_space_V[tokens_N[1]]
    return bytes_N

  def has_space(self, tokens_N: Integer[np.ndarray, "N"]) -> Bool[np.ndarray, "N"]:
    """Tells of each token whether white space may have been dropped under it."""
    return self._has_space_V[tokens_N]


def write_sidecar(folder: Path, tokenizer: Tokenizer) -> None:
  """Writes the sidecar of validation shards whose text is without CaseOps, from their pieces.

  Raises:
    UserError: there are no validation shards, one is damaged, or a token lies outside the vocabulary.
  """
  pieces, paths, at = PieceBytes(tokenizer, is_caseops=False), list_shards(folder, "val"), 0
  bytes_N = np.concatenate([pieces.counted(document.tokens_N) for document in iter_documents(paths)])
  for path in paths:
    count = read_count(path)
    write_shard(shard_path(folder, "val_bytes", int(path.stem.rpartition("_")[2])), bytes_N[at : at + count])
    at += count


def _spelt(piece: sentencepiece_model_pb2.ModelProto.SentencePiece) -> int:
  if piece.type in (piece.CONTROL, piece.UNUSED):
    return 0
  return 1 if piece.type == piece.BYTE else len(piece.piece.replace(SPACE, " ").encode())
