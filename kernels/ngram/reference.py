"""The n-gram counts in plain Python, straight from the recipe, for tests and benchmarks."""

import numpy as np

from pgolf_jax.kernels.ngram.in_numpy import COEFFICIENTS, PAIR


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

  def update(
    self, tokens: np.ndarray, confidence: np.ndarray | None = None, total: np.ndarray | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    hint, gate = np.zeros(len(tokens), np.uint32), np.zeros(len(tokens), bool)
    for out in (confidence, total):
      if out is not None:
        out[:] = 0
    for i, token in enumerate(int(token) for token in tokens):
      if len(self._stream) >= self._length:
        context, pair = self._keys(tuple(self._stream[len(self._stream) - self._length :]), token)
        if context in self._totals:
          count, hint[i] = self._best[context]
          share = np.float32(count) / np.float32(self._totals[context])
          gate[i] = share >= self._threshold
          if confidence is not None:
            confidence[i] = share
          if total is not None:
            total[i] = self._totals[context]
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
