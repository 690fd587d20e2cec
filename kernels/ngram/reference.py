"""The n-gram counts in plain Python, straight from the recipe, for tests and benchmarks."""

import numpy as np

# Multipliers of the published context key, oldest token first. The token after a context has the next one in the list.
COEFFICIENTS = (
  *(36313, 27191, 51647, 81929, 131071, 196613, 262147, 393241, 524309, 655373, 786433, 917521, 1048583, 1179653),
  *(1310729, 1441801, 1572869, 1703941, 1835017, 1966087, 2097169, 2228243, 2359319, 2490389, 2621471, 2752549),
  *(2883617, 3014687, 3145757, 3276833, 3407903, 3538973),
)
PAIR = 1000003


class NgramModel:
  """The counts of `NgramState`, kept in dictionaries; the arguments are explained there."""

  def __init__(self, order: int, *, threshold: float, mode: str = "exact"):
    self._length = order - 1
    self._threshold = np.float32(threshold)
    self._exact = mode == "exact"
    self._stream: list[int] = []
    self._totals: dict = {}
    self._best: dict = {}  # context: (count, token)
    self._pairs: dict = {}

  def seed(self, tokens: np.ndarray) -> None:
    self._stream.extend(int(token) for token in tokens)

  def update(self, tokens: np.ndarray, confidence: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    hint, gate = np.zeros(len(tokens), np.uint32), np.zeros(len(tokens), bool)
    if confidence is not None:
      confidence[:] = 0
    for i, token in enumerate(int(token) for token in tokens):
      if len(self._stream) >= self._length:
        context, pair = self._keys(tuple(self._stream[len(self._stream) - self._length :]), token)
        if context in self._totals:
          count, hint[i] = self._best[context]
          share = np.float32(count) / np.float32(self._totals[context])
          gate[i] = share >= self._threshold
          if confidence is not None:
            confidence[i] = share
        self._totals[context] = self._totals.get(context, 0) + 1
        self._pairs[pair] = self._pairs.get(pair, 0) + 1
        if self._pairs[pair] > self._best.get(context, (0, 0))[0]:
          self._best[context] = self._pairs[pair], token
      self._stream.append(token)
    return hint, gate

  def _keys(self, context: tuple[int, ...], token: int):
    if self._exact:
      return context, (context, token)
    key = 0
    for value, coefficient in zip(context, COEFFICIENTS, strict=False):
      key ^= value * coefficient
    return key, (key * PAIR ^ token * COEFFICIENTS[self._length]) % 2**64
