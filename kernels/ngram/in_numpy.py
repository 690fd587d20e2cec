"""The n-gram counts in NumPy, for installations without a C compiler: the same results, a block of targets at a time.

Contexts and pairs get numbers from open-addressing tables, in which a whole block is looked up at once: each round
every key that is not placed yet looks at its next slot, a free slot is taken by one of the keys that want it, and
keys that find themselves there are done. Within a block, what one target adds for the next ones follows from sorting:
its rank among the block's targets of the same context or pair, and running maxima along each context's targets.
"""

import numpy as np

# Multipliers of the published context key, oldest token first. The token after a context has the next one in the list.
COEFFICIENTS = (
  *(36313, 27191, 51647, 81929, 131071, 196613, 262147, 393241, 524309, 655373, 786433, 917521, 1048583, 1179653),
  *(1310729, 1441801, 1572869, 1703941, 1835017, 1966087, 2097169, 2228243, 2359319, 2490389, 2621471, 2752549),
  *(2883617, 3014687, 3145757, 3276833, 3407903, 3538973),
)
PAIR = 1000003

_BLOCK = 1 << 16  # targets
_MOST_TOKENS = 0x7FFFFFFE
_MOST_SHARDS = 64
_FEWEST_SLOTS = 1 << 10
_LOAD = 0.5  # of a table, at most


class State:
  """The counts of a stream; arguments, results and errors are those of the type in C.

  Args:
    context: tokens of a context.
    exact: compare contexts token by token; otherwise by the published keys.
    threshold: lowest confidence that opens the gate.
    vocab_size: tokens are below it.
    expected: targets in the whole stream; tables grow as they fill, whatever it is.
    shards: of no use here; every number gives the same results.
  """

  def __init__(self, context: int, exact: bool, threshold: float, vocab_size: int, expected: int, shards: int):
    if not (
      0 <= context < len(COEFFICIENTS)
      and threshold == threshold
      and 1 <= vocab_size <= 2**32
      and 0 <= expected <= _MOST_TOKENS
      and 1 <= shards <= _MOST_SHARDS
    ):
      raise ValueError(
        f"need 0 <= context <= {len(COEFFICIENTS) - 1}, a threshold that is a number, 1 <= vocab_size <= 2**32, "
        f"0 <= expected <= {_MOST_TOKENS}, 1 <= shards <= {_MOST_SHARDS}"
      )
    self._context, self._exact, self._vocab_size = context, bool(exact), vocab_size
    self._threshold = np.float32(threshold)
    self._history = _Column(np.uint32)
    self._contexts, self._pairs = _Table(), _Table()
    # Of each context: how often it came, the highest count of one of its pairs, and the token that was first to reach
    # it. Where contexts are compared in full, the place in the history where a context first ended.
    self._total, self._best, self._hint = _Column(np.int64), _Column(np.int64), _Column(np.uint32)
    self._place = _Column(np.int64)
    self._pair_count = _Column(np.int64)

  def seed(self, tokens: np.ndarray) -> None:
    """Appends tokens that serve as context and are not counted."""
    self._history.append(self._checked(tokens))

  def update(
    self,
    tokens: np.ndarray,
    hint: np.ndarray,
    gate: np.ndarray,
    confidence: np.ndarray | None = None,
    total: np.ndarray | None = None,
  ) -> None:
    """Writes the hints of tokens into the arrays, and counts the tokens."""
    _check_output("hint", hint, len(tokens), "iu", 4)
    _check_output("gate", gate, len(tokens), "bu", 1)
    if confidence is not None:
      _check_output("confidence", confidence, len(tokens), "f", 4)
    if total is not None:
      _check_output("total", total, len(tokens), "iu", 4)
    tokens_N = self._checked(tokens)
    for out in (hint, gate, confidence, total):
      if out is not None:
        out[:] = 0
    for first in range(0, len(tokens_N), _BLOCK):
      block = tokens_N[first : first + _BLOCK]
      start = len(self._history)
      self._history.append(block)
      skip = max(0, min(self._context - start, len(block)))  # no hint before a full context
      if skip == len(block):
        continue
      total_n, hint_n, share_n = self._count(np.arange(start + skip, start + len(block)), block[skip:])
      out = slice(first + skip, first + len(block))
      hint.view(np.uint32)[out] = hint_n
      gate[out] = (total_n > 0) & (share_n >= self._threshold)
      if confidence is not None:
        confidence[out] = share_n
      if total is not None:
        total.view(np.uint32)[out] = total_n

  @property
  def last(self) -> int | None:
    """The newest token, or None."""
    return int(self._history.values[-1]) if len(self._history) else None

  @property
  def nbytes(self) -> int:
    """Bytes allocated."""
    return sum(part.nbytes for part in vars(self).values() if isinstance(part, _Column | _Table))

  def _checked(self, tokens: np.ndarray) -> np.ndarray:
    """The tokens in the type of the history; raises if they are not tokens, or too many."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 1:
      raise ValueError(f"tokens must have one dimension, not {tokens.ndim}")
    if tokens.dtype.kind not in "iu" or tokens.dtype.itemsize < 2:
      raise TypeError(f"tokens must be integers of 16, 32 or 64 bits, not of type '{tokens.dtype.char}'")
    if len(tokens) > _MOST_TOKENS - len(self._history):
      raise OverflowError(f"a state holds at most {_MOST_TOKENS} tokens")
    if len(tokens) and not (tokens.min() >= 0 and int(tokens.max()) < self._vocab_size):
      raise ValueError(f"tokens must be in [0, {self._vocab_size})")
    return tokens.astype(np.uint32)

  def _count(self, position_n: np.ndarray, token_n: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts a block: (how often a target's context came before, the hint, count / total), zeros where it did not."""
    context_n, pair_n = self._number(position_n, token_n)
    count_n = self._pair_count.values[pair_n] + _rank(pair_n) + 1
    np.add.at(self._pair_count.values, pair_n, 1)

    order = np.argsort(context_n, kind="stable")
    context_m, count_m, token_m = context_n[order], count_n[order], token_n[order]
    is_first_m = np.concatenate([[True], context_m[1:] != context_m[:-1]])
    first_m = np.maximum.accumulate(np.where(is_first_m, np.arange(len(order)), 0))
    total_m = self._total.values[context_m] + np.arange(len(order)) - first_m
    # The best count before and after each target: a running maximum that each context begins with its own.
    after_m = np.maximum(count_m, self._best.values[context_m])
    lift_m = (np.cumsum(is_first_m) - 1) << 32  # higher than any count, so that no context reaches into the next
    after_m = np.maximum.accumulate(after_m + lift_m) - lift_m
    before_m = np.where(is_first_m, self._best.values[context_m], np.concatenate([[0], after_m[:-1]]))
    improves_m = count_m > before_m
    latest_m = np.maximum.accumulate(np.where(improves_m, np.arange(len(order)), -1))
    hint_after_m = np.where(latest_m >= first_m, token_m[latest_m], self._hint.values[context_m])
    hint_before_m = np.where(is_first_m, self._hint.values[context_m], np.concatenate([[0], hint_after_m[:-1]]))

    is_last_m = np.concatenate([is_first_m[1:], [True]])
    ended = context_m[is_last_m]
    self._total.values[ended] = total_m[is_last_m] + 1
    self._best.values[ended], self._hint.values[ended] = after_m[is_last_m], hint_after_m[is_last_m]

    seen_m = total_m > 0
    share_m = before_m.astype(np.float32) / np.maximum(total_m, 1).astype(np.float32)
    results = (total_m, np.where(seen_m, hint_before_m, 0), np.where(seen_m, share_m, np.float32(0)))
    restored = np.empty_like(order)
    restored[order] = np.arange(len(order))
    return tuple(x[restored] for x in results)

  def _number(self, position_n: np.ndarray, token_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the contexts that end before these positions and of their pairs; new ones get the next."""
    history = self._history.values
    key_n = np.zeros(len(position_n), np.uint64)
    for back, coefficient in zip(range(self._context, 0, -1), COEFFICIENTS, strict=False):
      key_n ^= history[position_n - back].astype(np.uint64) * np.uint64(coefficient)
    token_n = token_n.astype(np.uint64)
    if not self._exact:
      pair_key_n = key_n * np.uint64(PAIR) ^ token_n * np.uint64(COEFFICIENTS[self._context])
      context_n = self._contexts.number(key_n)
      self._grow(context_n)
      pair_n = self._pairs.number(pair_key_n)
    else:
      context_n = self._contexts.number(key_n, self._same_contexts(position_n))
      self._grow(context_n, position_n)
      pair_n = self._pairs.number((context_n.astype(np.uint64) << np.uint64(32)) | token_n)
    self._pair_count.extend_to(self._pairs.count)
    return context_n, pair_n

  def _grow(self, context_n: np.ndarray, position_n: np.ndarray | None = None) -> None:
    known = len(self._total)
    for column in (self._total, self._best, self._hint):
      column.extend_to(self._contexts.count)
    if position_n is not None:
      self._place.extend_to(self._contexts.count)
      new_n = context_n >= known
      self._place.values[context_n[new_n]] = position_n[new_n]

  def _same_contexts(self, position_n: np.ndarray):
    """Tells of targets of this block and of contexts, or of other targets, whether the tokens before them agree."""
    known, history = len(self._total), self._history.values

    def same(at: np.ndarray, other: np.ndarray, is_target: np.ndarray) -> np.ndarray:
      ends = np.where(is_target, position_n[np.where(is_target, other, 0)], 0)
      if known:
        ends = np.where(is_target, ends, self._place.values[np.where(is_target, 0, other)])
      agree = np.ones(len(at), bool)
      for back in range(1, self._context + 1):
        agree &= history[position_n[at] - back] == history[ends - back]
      return agree

    return same


def _rank(x_n: np.ndarray) -> np.ndarray:
  """Returns how many equal entries stand before each."""
  order = np.argsort(x_n, kind="stable")
  x_m, place_m = x_n[order], np.arange(len(order))
  first_m = np.maximum.accumulate(np.where(np.concatenate([[True], x_m[1:] != x_m[:-1]]), place_m, 0))
  rank_n = np.empty_like(place_m)
  rank_n[order] = place_m - first_m
  return rank_n


def _check_output(name: str, out: np.ndarray, count: int, kinds: str, width: int) -> None:
  if not isinstance(out, np.ndarray) or out.ndim != 1 or out.dtype.kind not in kinds or out.dtype.itemsize != width:
    raise ValueError(f"{name} must hold {count} elements of {width} bytes of kind {kinds}, one after the other")
  if len(out) != count:
    raise ValueError(f"{name} must hold {count} elements of {width} bytes; it has {len(out)}")
  if not out.flags.c_contiguous:
    raise ValueError(f"{name} must be contiguous")
  if not out.flags.writeable:
    raise ValueError(f"{name} is read-only")


class _Column:
  """A row of numbers that grows at its end; new ones are zero."""

  def __init__(self, dtype: type):
    self._room, self._count = np.zeros(64, dtype), 0

  def __len__(self) -> int:
    return self._count

  @property
  def values(self) -> np.ndarray:
    """A view of the numbers."""
    return self._room[: self._count]

  @property
  def nbytes(self) -> int:
    return self._room.nbytes

  def append(self, x_n: np.ndarray) -> None:
    first = self._count
    self.extend_to(first + len(x_n))
    self._room[first : self._count] = x_n

  def extend_to(self, count: int) -> None:
    if count > len(self._room):
      room = np.zeros(count + count // 2, self._room.dtype)
      room[: self._count] = self.values
      self._room = room
    self._count = max(self._count, count)


class _Table:
  """Numbers keys of 64 bits, in the order in which they are first placed.

  Attributes:
    count: numbers given so far.
  """

  def __init__(self):
    self.count = 0
    self._keys = np.zeros(_FEWEST_SLOTS, np.uint64)
    self._numbers = np.full(_FEWEST_SLOTS, -1, np.int64)  # −1: free

  @property
  def nbytes(self) -> int:
    return self._keys.nbytes + self._numbers.nbytes

  def number(self, key_n: np.ndarray, same=None) -> np.ndarray:
    """Returns the number of each key; equal keys have one number, and unknown ones get the next.

    Args:
      same: (places in `key_n`, numbers or other places, which of them are places) → whether they are one and the same,
        for keys that are but hashes of what they stand for.
    """
    self._reserve(len(key_n))
    mask, known = len(self._keys) - 1, self.count
    slot_n = (_mixed(key_n) >> np.uint64(20)).astype(np.int64) & mask
    number_n = np.full(len(key_n), -1, np.int64)
    open_m = np.arange(len(key_n))
    taken: list[np.ndarray] = []
    while len(open_m):
      slot_m = slot_n[open_m]
      free_m = self._numbers[slot_m] == -1
      # Of several that want a free slot the last written has it. Until the end a slot taken now holds −2 − its place.
      self._numbers[slot_m[free_m]] = -2 - open_m[free_m]
      owner_m = self._numbers[slot_m]
      winner_m = owner_m == -2 - open_m
      self._keys[slot_m[winner_m]] = key_n[open_m[winner_m]]
      taken.append(slot_m[winner_m])
      found_m = self._keys[slot_m] == key_n[open_m]
      if same is not None and found_m.any():
        is_target = owner_m[found_m] < 0
        found_m[found_m] = same(
          open_m[found_m], np.where(is_target, -2 - owner_m[found_m], owner_m[found_m]), is_target
        )
      number_n[open_m[found_m]] = owner_m[found_m]
      open_m = open_m[~found_m]
      slot_n[open_m] = (slot_n[open_m] + 1) & mask
    new = np.concatenate(taken) if taken else np.empty(0, np.int64)
    self.count += len(new)
    place_k = -2 - self._numbers[new]
    number_of_place = np.zeros(len(key_n), np.int64)
    number_of_place[place_k] = np.arange(known, self.count)
    self._numbers[new] = number_of_place[place_k]
    is_new_n = number_n < 0
    number_n[is_new_n] = number_of_place[-2 - number_n[is_new_n]]
    return number_n

  def _reserve(self, extra: int) -> None:
    if self.count + extra <= _LOAD * len(self._keys):
      return
    size = 1 << int((self.count + extra) / _LOAD).bit_length()
    used = self._numbers >= 0
    keys, numbers = self._keys[used], self._numbers[used]
    self._keys, self._numbers = np.zeros(size, np.uint64), np.full(size, -1, np.int64)
    slot_n = (_mixed(keys) >> np.uint64(20)).astype(np.int64) & (size - 1)
    open_m = np.arange(len(keys))
    while len(open_m):
      slot_m = slot_n[open_m]
      free_m = self._numbers[slot_m] == -1
      self._numbers[slot_m[free_m]] = numbers[open_m[free_m]]
      done_m = self._numbers[slot_m] == numbers[open_m]
      self._keys[slot_m[done_m]] = keys[open_m[done_m]]
      open_m = open_m[~done_m]
      slot_n[open_m] = (slot_n[open_m] + 1) & (size - 1)


def _mixed(key_n: np.ndarray) -> np.ndarray:
  """A hash of 64-bit keys."""
  x = key_n ^ (key_n >> np.uint64(32))
  x = x * np.uint64(0xD6E8FEB86659FD93)
  x ^= x >> np.uint64(32)
  return x * np.uint64(0xD6E8FEB86659FD93)
