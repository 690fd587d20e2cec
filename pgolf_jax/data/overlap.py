"""Finds validation text in training text: by the share of a document's n-grams of words that occur there.

Words are runs of letters and digits of the decoded text, normalised by NFKC and folded in case; n-grams are 64-bit
hashes of words. So a document is found in other tokens, with other white space or punctuation, cut off, merged with
others, and with some of its words replaced. Memory holds the validation n-grams, 9 bytes each, a table of 16 to 32
bytes each, and 4 MB of training text at a time.
"""

import unicodedata
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Bool, Float, UInt64

from pgolf_jax.data import caseops

N = 8  # words of an n-gram
LIMIT = 0.5
"""Share of a document's different n-grams that training text may hold.

Of 902 validation pages of FineWeb against 41 MB of other web pages the median has 0 %, the 99th percentile 1.4 %, the
highest 18 %; against a tenth of them 1.6 %. Pages of one web site with the same boilerplate reach 60 to 90 % of each
other. A document of 23 words or more passes half with any one word replaced.
"""

LEAST_NGRAMS = 8
"""A document of fewer different n-grams is not looked for: so little is said in many places."""

_CHUNK = 4_000_000  # characters of training text at a time
_MARKERS = dict.fromkeys(map(ord, caseops.MARKERS))
_MIX = np.uint64(0xFF51AFD7ED558CCD)
_SHIFT = np.uint64(33)
_rng = np.random.default_rng(20240520)
_LETTER_256 = _rng.integers(1, 2**64, 256, np.uint64)
_PLACE_64 = _rng.integers(1, 2**64, 64, np.uint64) | np.uint64(1)
_WORD_N = _rng.integers(1, 2**64, N, np.uint64) | np.uint64(1)
_IS_WORD_256 = np.array([byte >= 0x80 or chr(byte).isalnum() for byte in range(256)])


def ngrams(text: str) -> UInt64[np.ndarray, "G"]:
  """Returns the hash of each n-gram of words of a text, or of one that CaseOps rewrote, in order."""
  folded = unicodedata.normalize("NFKC", text.translate(_MARKERS)).casefold()
  utf8_B = np.frombuffer(folded.encode(errors="surrogatepass"), np.uint8)
  is_word_B = _IS_WORD_256[utf8_B]
  edges = np.flatnonzero(np.diff(is_word_B, prepend=False, append=False))
  starts, ends = edges[::2], edges[1::2]
  if len(starts) < N:
    return np.empty(0, np.uint64)
  letters_B = np.flatnonzero(is_word_B)
  lengths = ends - starts
  first = np.cumsum(lengths) - lengths
  place_B = np.arange(len(letters_B)) - np.repeat(first, lengths)
  hashed_B = _LETTER_256[utf8_B[letters_B]] * _PLACE_64[place_B % 64]
  words = _mixed(np.add.reduceat(hashed_B, first))
  count = len(words) - N + 1
  grams = np.zeros(count, np.uint64)
  for i in range(N):
    grams += words[i : i + count] * _WORD_N[i]
  return _mixed(grams)


def _mixed(x: UInt64[np.ndarray, "N"]) -> UInt64[np.ndarray, "N"]:
  x = (x ^ (x >> _SHIFT)) * _MIX
  return x ^ (x >> _SHIFT)


def shares(held_out: Iterable[str], training: Iterable[str]) -> Float[np.ndarray, "D"]:
  """Returns, for each held-out document, the share of its different n-grams that occur in the training texts.

  NaN stands for a document of fewer than `LEAST_NGRAMS` different ones.
  """
  by_document = [np.unique(ngrams(text)) for text in held_out]
  table = _Table(np.unique(np.concatenate([*by_document, np.empty(0, np.uint64)])))
  for text in _chunks(training):
    table.find(ngrams(text))
  return np.array([table.share(grams) if len(grams) >= LEAST_NGRAMS else np.nan for grams in by_document])


def _chunks(texts: Iterable[str]) -> Iterator[str]:
  waiting, size = [], 0
  for text in texts:
    waiting.append(text)
    size += len(text)
    if size >= _CHUNK:
      yield "\n".join(waiting)
      waiting, size = [], 0
  yield "\n".join(waiting)


class _Table:
  """Which of a set of hashes have been met."""

  def __init__(self, hashes: UInt64[np.ndarray, "H"]):
    self._hashes = hashes
    self._is_met = np.zeros(len(hashes), bool)
    # Most hashes of other text are told apart by their lowest bits, one look instead of a search.
    bits = max(len(hashes) * 16, 1).bit_length()
    self._mask = np.uint64((1 << bits) - 1)
    self._is_near = np.zeros(1 << bits, bool)
    self._is_near[hashes & self._mask] = True

  def find(self, hashes: UInt64[np.ndarray, "G"]) -> None:
    """Marks those of the set that are among `hashes`."""
    near = hashes[self._is_near[hashes & self._mask]]
    at, is_equal = self._places(near)
    self._is_met[at[is_equal]] = True

  def share(self, hashes: UInt64[np.ndarray, "G"]) -> float:
    """Returns the share of `hashes`, all in the set, that have been met."""
    return float(self._is_met[self._places(hashes)[0]].mean())

  def _places(self, hashes: UInt64[np.ndarray, "G"]) -> tuple[np.ndarray, Bool[np.ndarray, "G"]]:
    at = np.minimum(np.searchsorted(self._hashes, hashes), max(len(self._hashes) - 1, 0))
    return at, self._hashes[at] == hashes if len(self._hashes) else np.zeros(0, bool)
