"""The mean of a quantised matrix: a product of two whole-number factors, where that saves bytes.

Embeddings have one (common drift, tokens that never occurred and so stayed together); most matrices have none.

Reading is whole-number arithmetic, carried out in float64 where that is exact (products and sums below 2^53, in any
order): every machine finds the same mean. So is the search for the directions, that writing again gives the same file.
M rows, N columns, K rank.
"""

import dataclasses

import numpy as np

from pgolf_jax.quantize.artifact.codecs.laws import CENTRE, PHASES, STEPS

RANKS = 16  # directions of a mean, at most
LEAST_SIDE = 2 * RANKS  # rows and columns of a matrix that may have one
A_LIMIT, B_LIMIT, FACTOR_LIMIT = 2**15 - 1, 2**10 - 1, 2**32 - 1  # with RANKS, they keep A·B · factor within int64
_BASIS_LEVEL = 8  # root mean square of B's entries
BASIS_WIDTH = CENTRE + 3 * STEPS  # their width class
_STEP_SIGMAS = 2.5  # step of A's coefficients, in standard deviations of what remains
_GLANCE, _ROUNDS = 3, 12  # of subspace iteration: to see whether there is a mean at all, and to find it
_FACTOR_BITS = 16  # fraction bits of the factor from A·B to the mean


@dataclasses.dataclass(frozen=True)
class Mean:
  """mean_MxN = A·B · factor / 2^16 in units of 1/PHASES; of the transposed matrix where `flipped`."""

  a_MxK: np.ndarray  # int32
  b_KxN: np.ndarray  # int32
  factor: int
  flipped: bool

  def leading(self, rank: int) -> "Mean":
    """The mean of the first `rank` directions alone."""
    return dataclasses.replace(self, a_MxK=self.a_MxK[:, :rank], b_KxN=self.b_KxN[:rank])

  def bits(self) -> float:
    """About what it takes to store the factors."""
    counts = [np.unique(a_M, return_counts=True)[1] for a_M in self.a_MxK.T]
    rows = self.a_MxK.shape[0]
    return 5.1 * self.b_KxN.size + sum(64 - float(np.sum(c * np.log2(c / rows))) for c in counts)

  def phases(self, row=slice(None), column=slice(None)) -> np.ndarray:
    """int32 [columns, rows] of a part of the matrix, in units of 1/PHASES, held to the range of int8.

    Args:
      row, column: indices of the part.
    """
    left, right = (column, row) if self.flipped else (row, column)
    product = np.matmul(self.a_MxK[left].astype(np.float64), self.b_KxN[:, right].astype(np.float64)).astype(np.int64)
    found = (product * self.factor + (1 << (_FACTOR_BITS - 1))) >> _FACTOR_BITS
    found = np.clip(found, -127 * PHASES, 127 * PHASES).astype(np.int32)
    return found if self.flipped else found.T


def fit(q_MxN: np.ndarray) -> Mean | None:
  """The leading directions of the matrix that save more than they cost, or None."""
  flipped = q_MxN.shape[0] < q_MxN.shape[1]
  tall_MxN = (q_MxN.T if flipped else q_MxN).astype(np.float64)
  rows, columns = tall_MxN.shape
  if columns < LEAST_SIDE:
    return None
  gram_NxN = np.matmul(tall_MxN.T, tall_MxN)
  if not gram_NxN.any():
    return None
  if not _gain(_leading_directions(gram_NxN, _GLANCE), gram_NxN, rows)[0]:
    return None
  basis_KxN = _leading_directions(gram_NxN, _ROUNDS)
  rank, sigma = _gain(basis_KxN, gram_NxN, rows)
  if not rank:
    return None
  norm_K = np.square(basis_KxN[:rank]).sum(axis=1)
  basis_KxN = basis_KxN[:rank]
  # A's unit is a step of `_STEP_SIGMAS` σ along B's direction, the same for all directions.
  per_unit = _STEP_SIGMAS * sigma / (_BASIS_LEVEL * np.sqrt(columns))
  factor = int(np.clip(np.rint(per_unit * PHASES * 2**_FACTOR_BITS), 1, FACTOR_LIMIT))
  a_MxK = np.rint(np.matmul(tall_MxN, basis_KxN.T) / (norm_K * (factor / (PHASES * 2**_FACTOR_BITS))))
  return Mean(np.clip(a_MxK, -A_LIMIT, A_LIMIT).astype(np.int32), basis_KxN.astype(np.int32), factor, flipped)


def _gain(basis_KxN: np.ndarray, gram_NxN: np.ndarray, rows: int) -> tuple[int, float]:
  """(how many of the directions save more than they cost, standard deviation of what remains after them).

  Normal approximation: a direction shortens every value; its coefficient in each row and its own entries must be kept.
  """
  columns = gram_NxN.shape[0]
  total = float(np.trace(gram_NxN))
  energy_K = (np.matmul(basis_KxN, gram_NxN) * basis_KxN).sum(axis=1) / np.square(basis_KxN).sum(axis=1)
  left_K = np.maximum(total - np.cumsum(energy_K), total / 1024)
  sigma_K = np.sqrt(left_K / (rows * columns))
  saved_K = 0.5 * rows * columns * np.log2(total / left_K)
  coefficient_K = np.sqrt(energy_K / rows) / (_STEP_SIGMAS * sigma_K)
  per_row_K = 2.05 + 0.5 * np.log2(coefficient_K**2 + 1 / 12) + 0.25  # and what its rounding adds to the values
  cost_K = np.cumsum(rows * per_row_K + columns * 5.1 + 64)
  best = int(np.argmax(saved_K - cost_K))
  return (best + 1, float(sigma_K[best])) if saved_K[best] > 1.01 * cost_K[best] else (0, 0.0)


def _leading_directions(gram_NxN: np.ndarray, rounds: int) -> np.ndarray:
  """Whole-number directions [RANKS, N] near the leading eigenvectors, by falling eigenvalue, nearly orthogonal.

  Subspace iteration in which the basis is rounded to 15 bits after every product, so that no sum is ever inexact.
  """
  columns = gram_NxN.shape[0]
  # Any start does that is not orthogonal to what is sought: the hardest-driven columns.
  basis_KxN = np.zeros((RANKS, columns))
  basis_KxN[np.arange(RANKS), np.argsort(-np.diagonal(gram_NxN), kind="stable")[:RANKS]] = 1
  gram_NxN = np.rint(gram_NxN * (2.0**26 / max(float(np.abs(gram_NxN).max()), 1.0)))
  for _ in range(rounds):
    basis_KxN = _orthogonal(np.matmul(basis_KxN, gram_NxN))
  # Rows differ in length: each has the same largest entry.
  length_K = np.maximum(np.square(basis_KxN).sum(axis=1), 1)
  energy_K = (np.matmul(basis_KxN, gram_NxN) * basis_KxN).sum(axis=1) / length_K
  basis_KxN = basis_KxN[np.argsort(-energy_K, kind="stable")]
  norm_Kx1 = np.maximum(np.sqrt(np.square(basis_KxN).sum(axis=1, keepdims=True)), 1)
  coarse_KxN = np.clip(np.rint(basis_KxN * (_BASIS_LEVEL * np.sqrt(columns) / norm_Kx1)), -B_LIMIT, B_LIMIT)
  coarse_KxN[~coarse_KxN.any(axis=1), 0] = 1
  return coarse_KxN


def _orthogonal(basis_KxN: np.ndarray) -> np.ndarray:
  """Gram-Schmidt, each row rounded to whole numbers of at most 2^14."""
  done: list[np.ndarray] = []
  for row_N in basis_KxN:
    row_N = _rounded(row_N)
    for other_N in done:
      row_N = row_N - np.rint(other_N * (np.dot(row_N, other_N) / max(np.dot(other_N, other_N), 1.0)))
    done.append(_rounded(row_N))
  return np.stack(done)


def _rounded(row_N: np.ndarray) -> np.ndarray:
  return np.rint(row_N * (2.0**14 / max(float(np.abs(row_N).max()), 1.0)))
