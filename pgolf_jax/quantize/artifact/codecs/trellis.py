"""Columns under a trellis: values on two grids at half their spacing, whole numbers and those half a step further.

On which grid a value lies, its parity, follows from the lowest bits of the integers above it. M rows, N columns, of
which L and K are under a trellis.
"""

import numpy as np

SEGMENT = 64
"""Rows that take part in a trellis after which it begins anew, in state 0."""
PARITY = np.array([0, 1, 0, 1, 0, 1, 0, 1], np.uint8)
"""Of a value, by the trellis's state: Ungerboeck's code of 8 states, h⁰ = 13, h¹ = 04 (octal), in its feedback form."""
NEXT = np.array([[0, 2], [5, 7], [1, 3], [4, 6], [2, 0], [7, 5], [3, 1], [6, 4]], np.uint8)
"""The state after a value, by state and the value's lowest bit."""


def parities(bits_LxK: np.ndarray) -> np.ndarray:
  """Returns the parity of each value under a trellis, uint8 [L, K], from the lowest bits of all, uint8."""
  rows, columns = bits_LxK.shape
  segments = -(-rows // SEGMENT)
  padded = np.zeros((segments, SEGMENT, columns), np.uint8)
  flat = padded.reshape(segments * SEGMENT, columns)
  flat[:rows] = bits_LxK
  # The bits of the state, which PARITY and NEXT as a table have in one number.
  a, b, c = np.zeros((3, len(padded), columns), np.uint8)
  for row in range(SEGMENT):
    bit, padded[:, row] = padded[:, row].copy(), a
    a, b, c = a ^ b, c ^ bit, a
  return flat[:rows]


def matrix_parities(q_MxN: np.ndarray, trellis_M: np.ndarray, trellis_N: np.ndarray) -> np.ndarray:
  """Returns the parity of each value of a matrix, uint8 [M, N]; 0 in other rows and columns than those flagged."""
  parity_MxN = np.zeros(q_MxN.shape, np.uint8)
  place = cells(trellis_M, trellis_N)
  parity_MxN[place] = parities((q_MxN[place] & 1).astype(np.uint8))
  return parity_MxN


def cells(first: np.ndarray, second: np.ndarray) -> tuple:
  """Returns the index of what is flagged on both axes of a matrix; slices, which take no copy, where all is."""
  if first.all() or second.all():
    return tuple(slice(None) if flags.all() else np.flatnonzero(flags) for flags in (first, second))
  return np.ix_(first, second)
