"""The n-gram counts as an object that takes a stream in NumPy arrays."""

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Integer, UInt32

from pgolf_jax.kernels.ngram import _ngram

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
    self._state = _ngram.State(order - 1, mode == "exact", threshold, vocab_size, expected, threads)

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
  ) -> tuple[UInt32[np.ndarray, "N"], Bool[np.ndarray, "N"]]:
    """Returns hints for the next tokens of the stream, and counts these tokens.

    Args:
      tokens: contiguous, of any integer type of 16, 32 or 64 bits; read in place.
      hint: array for the result, of any integer type of 32 bits; allocated if None.
      gate: array for the result, bool; allocated if None.
      confidence: array that receives count / total of each hint, if not None.

    Returns:
      `(hint, gate)`. Where the context is new or not yet full, hint and confidence are 0 and the gate is closed.

    Raises:
      MemoryError: memory ran out. If counts are incomplete as a result, the state refuses further updates.
      ValueError: a token is not in [0, vocab_size), or an array is of the wrong kind. The state has not changed.
    """
    n = len(tokens)
    hint = np.empty(n, np.uint32) if hint is None else hint
    gate = np.empty(n, bool) if gate is None else gate
    self._state.update(tokens, hint, gate, confidence)
    return hint, gate

  @property
  def last(self) -> int | None:
    """The newest token of the stream, or None."""
    return self._state.last

  @property
  def nbytes(self) -> int:
    """Bytes of memory that the history, tables and records hold."""
    return self._state.nbytes
