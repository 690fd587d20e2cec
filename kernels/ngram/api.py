"""The n-gram counts as one streaming object over NumPy arrays."""

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Integer, UInt32

from pgolf_jax.kernels.ngram import _ngram

MAX_ORDER = 32

Mode = Literal["exact", "reference"]


class NgramState:
  """What followed each context of a token stream, and the hints that this gives.

  The context of a token is the `order - 1` tokens before it. `update` takes the next tokens of the stream and
  returns for each the token that had most often followed its context so far (of several, the one that was first
  to reach that count), and whether it had done so often enough: count / total ≥ `threshold`, in fp32. A token is
  counted after its hint is fixed. However a stream is cut into updates, and for any number of threads, the results
  are the same bits.

  There is no snapshot: the stream itself is one. Replaying it takes well under a second for ten million tokens.

  Args:
    order: 1 to 32; tokens of a context plus one.
    threshold: lowest confidence that opens the gate.
    mode: "exact" compares contexts token by token. "reference" compares the published 64-bit keys of contexts and
      pairs and nothing else, so that a few different contexts share their counts.
    vocab_size: tokens are in [0, vocab_size). With several threads in mode "reference" the work is shared out evenly
      only if this is not far above the largest token.
    expected: targets in the whole stream, if known. It sizes the tables so that they need not grow past it; more
      may come.
    threads: threads that share the work of a large update.
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
    """Appends tokens that later ones have in their context, but that are not counted themselves."""
    self._state.seed(tokens)

  def update(
    self,
    tokens: Integer[np.ndarray, "N"],
    *,
    hint: Integer[np.ndarray, "N"] | None = None,
    gate: Bool[np.ndarray, "N"] | None = None,
    confidence: Float32[np.ndarray, "N"] | None = None,
  ) -> tuple[UInt32[np.ndarray, "N"], Bool[np.ndarray, "N"]]:
    """Hints for the next tokens of the stream, which are then counted.

    Args:
      tokens: contiguous, of any integer type of 16, 32 or 64 bits; read in place.
      hint: array for the result, of any integer type of 32 bits; made where absent.
      gate: array for the result, bool; made where absent.
      confidence: if given, receives count / total of each hint.

    Returns:
      `(hint, gate)`. Where the context is new or not yet full, the hint is 0, its confidence 0 and the gate shut.

    Raises:
      MemoryError: memory ran out. A state whose counts were left incomplete takes no more updates.
      ValueError: a token is not in [0, vocab_size), or an array is of the wrong kind; nothing was taken.
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
