"""Counts of what followed each context of a token stream, in C.

  state = NgramState(order=16, threshold=0.8)
  hint, gate = state.update(tokens)  # from left to right; each hint from what came before its token

`reference.py` is the same computation in a page of plain Python, for comparison. `in_numpy.py` takes the place of the C
where this package was installed without a C compiler.

How the C works. The stream itself is stored, 4 bytes a token. Two open-addressing tables with entries of 8 bytes, one
of contexts and one of pairs (a context and its next token), hold 32 bits of hash and a position in the stream. Only
what occurs twice gets a record with counts. Tokens of an entry are read from the stream: contexts are compared in full
(mode "exact") or by keys that are computed again (mode "reference"), and neither is stored. Contexts consist of known
tokens, so the keys of a block of targets are computed ahead, and their cache lines are requested ahead; counts are
read and written only in the order of the stream. Threads divide contexts among them, never positions. Two contexts
whose pairs could share a key belong to one thread, so counts do not depend on the number of threads.

Files: `table.[ch]` tables that grow, `keys.h` the published keys, `shard.[ch]` counts and hints, `state.[ch]` the
stream and the threads, `_ngram.c` the Python type (stable ABI of 3.11). `sanitize.sh` runs the tests under
AddressSanitizer, LeakSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.
"""

import functools
import importlib
import logging
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Integer

try:
  from pgolf_jax.kernels.ngram import _ngram
except ImportError:
  _ngram = None

__all__ = ["IS_COMPILED", "MAX_ORDER", "Mode", "NgramState"]

IS_COMPILED = _ngram is not None
"""Whether the counts are those in C; NumPy's give the same results."""

MAX_ORDER = 32

Mode = Literal["exact", "reference"]


class NgramState:
  """Counts of what followed each context of a token stream, and the hints that they give.

  The context of a token is the `order - 1` tokens before it. `update` takes the next tokens of the stream. For each it
  returns a hint, which is the token that has most often followed this context so far (of several, the one that was
  first to reach that count), and a gate, which is open if count / total ≥ `threshold` in fp32. A token is counted
  after its hint is fixed. The results are the same bits for every division of the stream into updates and for any
  number of threads.

  To restore a state, replay its stream: ten million tokens take well under a second.

  Args:
    order: tokens of a context plus one, 1 to 32.
    threshold: lowest confidence that opens the gate.
    mode: "exact" compares contexts token by token. "reference" compares only the published 64-bit keys of contexts
      and pairs, so a few different contexts share their counts.
    vocab_size: tokens are in [0, vocab_size). If it is far above the largest token, several threads in mode
      "reference" have unequal work.
    expected: targets in the whole stream, if known. It sizes the tables; a longer stream makes them grow.
    threads: threads that share the work of a large update.

  Raises:
    ValueError: an argument is out of range.
  """

  def __init__(
    self,
    order: int,
    *,
    threshold: float,
    mode: Mode = "exact",
    vocab_size: int = 2**32,
    expected: int = 0,
    threads: int = 1,
  ):
    if not 1 <= order <= MAX_ORDER:
      raise ValueError(f"order must be in 1 … {MAX_ORDER}, not {order}")
    if mode not in ("exact", "reference"):
      raise ValueError(f"mode must be 'exact' or 'reference', not {mode!r}")
    counts = _ngram if IS_COMPILED else _in_numpy()
    self._state = counts.State(order - 1, mode == "exact", threshold, vocab_size, expected, threads)

  def seed(self, tokens: Integer[np.ndarray, "S"]) -> None:
    """Appends tokens that are part of later contexts but are not counted."""
    self._state.seed(tokens)

  def update(
    self,
    tokens: Integer[np.ndarray, "N"],
    *,
    hint: Integer[np.ndarray, "N"] | None = None,
    gate: Bool[np.ndarray, "N"] | None = None,
    confidence: Float32[np.ndarray, "N"] | None = None,
    total: Integer[np.ndarray, "N"] | None = None,
  ) -> tuple[Integer[np.ndarray, "N"], Bool[np.ndarray, "N"]]:
    """Returns hints for the next tokens of the stream, and counts these tokens.

    Args:
      tokens: contiguous, of any integer type of 16, 32 or 64 bits; read in place.
      hint: array for the result, of any integer type of 32 bits; allocated if None.
      gate: array for the result, bool; allocated if None.
      confidence: array that receives count / total of each hint, if not None.
      total: array that receives how often each context came before, of any integer type of 32 bits, if not None.

    Returns:
      `(hint, gate)`. Where the context is new or not yet full, hint, confidence and total are 0 and the gate is closed.

    Raises:
      MemoryError: memory ran out. If counts are incomplete as a result, the state refuses further updates.
      ValueError: a token is not in [0, vocab_size), or an array is of the wrong kind. The state has not changed.
    """
    n = len(tokens)
    hint = np.empty(n, np.uint32) if hint is None else hint
    gate = np.empty(n, bool) if gate is None else gate
    self._state.update(tokens, hint, gate, confidence, total)
    return hint, gate

  @property
  def last(self) -> int | None:
    """The newest token of the stream, or None."""
    return self._state.last

  @property
  def nbytes(self) -> int:
    """Bytes of memory that the history, tables and records hold."""
    return self._state.nbytes


@functools.cache
def _in_numpy():
  """The module that counts in NumPy. By name, so that it is no part of a submission, which builds the C itself."""
  logging.getLogger("pgolf").warning(
    "the n-gram counts in C were not built here, so NumPy counts: the same hints, about ten times slower; "
    "for the fast ones install a C compiler and this package once more"
  )
  return importlib.import_module("pgolf_jax.kernels.ngram.in_numpy")
