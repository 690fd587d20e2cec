"""Codecs: every array comes back, and takes about as many bytes as its entropy."""

import functools
import math

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pgolf_jax.errors import ArtifactError
from pgolf_jax.quantize.artifact.codecs import NAMES, ans, search
from pgolf_jax.quantize.artifact.codecs.ans import (
  Reader,
  Writer,
  distribution,
  put_counted,
  put_number,
  take_counted,
  take_number,
)
from pgolf_jax.quantize.artifact.codecs.integers import LIMIT, WIDTHS, Steps, law_weights
from pgolf_jax.quantize.artifact.codecs.trellis import NEXT, PARITY, parities
from pgolf_jax.quantize.artifact.reader import decode_stream
from pgolf_jax.quantize.artifact.writer import encode_stream

LAW_44 = [
  780182,
  1613712,
  2949340,
  4763167,
  6797394,
  8571706,
  9551505,
  9404959,
  8183185,
  6291690,
  4274544,
  2566181,
  1361307,
]
LAW_37 = [793728, 2504955, 6588665, 13814842, 19704487, 13814842, 6588665, 2504955, 793728]
INT8 = arrays.arrays(np.int8, arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=70))
HALVES = arrays.arrays(np.uint16, arrays.array_shapes(min_dims=0, max_dims=3, min_side=1, max_side=20))


INT32 = st.integers(1 - LIMIT, LIMIT - 1) | st.integers(-3, 3)
STEP = st.integers(-200, 200) | st.integers(-2, 2)


def assert_returns(name, content, given_arrays, steps=()):
  data = encode_stream(name, content, given_arrays, steps)
  decoded = decode_stream(name, content, data, [a.shape for a in given_arrays], steps)
  for a, b in zip(given_arrays, decoded, strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
  return data


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(values=st.lists(INT8, max_size=3))
def test_any_integers_come_back(name, values):
  assert_returns(name, "grid", values)
  assert_returns(name, "small", values)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(values=st.lists(HALVES, max_size=3))
def test_any_halves_come_back(name, values):
  assert_returns(name, "half", [v.view(np.float16) for v in values])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_large_integers_come_back(name, data):
  """Under any steps, with and without a trellis; and as arrays of any shape."""
  matrices, steps = [], []
  for _ in range(data.draw(st.integers(0, 3))):
    rows, columns = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 40))
    scale = data.draw(st.sampled_from([0.2, 3.0, 1e3, 1e6]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    q = np.clip(np.rint(scale * rng.standard_normal((rows, columns))), 1 - LIMIT, LIMIT - 1).astype(np.int32)
    for _ in range(data.draw(st.integers(0, 4))):
      q[data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))] = data.draw(INT32)
    matrices.append(q)
    step = [data.draw(arrays.arrays(np.int32, size, elements=STEP)) for size in (rows, columns)]
    flags = [data.draw(arrays.arrays(bool, size)) for size in (columns, rows)] if data.draw(st.booleans()) else ()
    steps.append(Steps(*step, *flags))
  assert_returns(name, "matrix", matrices, steps)
  assert_returns(name, "integers", matrices)


def flat_steps(shape, trellis=False) -> Steps:
  """Steps that are all alike."""
  flags = (np.ones(size, bool) for size in shape[::-1]) if trellis else ()
  return Steps(*(np.zeros(size, np.int32) for size in shape), *flags)


def matrix_bytes(q, steps=None) -> int:
  return len(assert_returns("entropy", "matrix", [q], [flat_steps(q.shape) if steps is None else steps]))


def rounded(values) -> np.ndarray:
  return np.rint(values).astype(np.int32)


@pytest.mark.parametrize("sigma", [0.4, 1.0, 6.0, 300.0])
@pytest.mark.parametrize("law", ["standard_normal", "laplace"])
def test_noise_of_any_width_takes_its_entropy(law, sigma):
  """Rates of 0.9, 2, 4.6 and 10 bits. At 300 the histogram itself is too short by a share of its 2,000 values."""
  z = getattr(np.random.default_rng(0), law)(size=(768, 512)) / (2**0.5 if law == "laplace" else 1)
  q = rounded(sigma * z)
  assert matrix_bytes(q) < 1.003 * entropy_bytes(q)


def law_bits(sigma: float) -> float:
  """Entropy in bits of rounded normal values of this spread."""
  edges = (np.arange(-300, 302) - 0.5) / sigma / 2**0.5
  share = np.diff([0.5 * (1 + math.erf(x)) for x in edges])
  return float(-(share * np.log2(np.maximum(share, 1e-300))).sum())


@pytest.mark.parametrize("bits", [-1, 1])
def test_widths_that_steps_predict_cost_next_to_nothing(bits):
  rng = np.random.default_rng(1)
  column_N, row_M = rounded(3 * rng.standard_normal(256)), rounded(2 * rng.standard_normal(2048))
  class_MxN = row_M[:, None] + column_N
  q = rounded(2.0**bits * np.exp2(-class_MxN / 4) * rng.standard_normal((2048, 256)))
  used, count = np.unique(class_MxN, return_counts=True)
  ideal = sum(n * law_bits(2.0 ** (bits - k / 4)) for k, n in zip(used, count, strict=True)) / 8
  known, unknown = matrix_bytes(q, Steps(row_M, column_N)), matrix_bytes(q)
  assert known < 1.003 * ideal + 40 and known < 0.92 * entropy_bytes(q)
  assert known + 0.2 * (2048 + 256) < unknown  # the entropies of the steps are 3.0 and 3.6 bits


def test_columns_of_tiny_steps_take_their_bits_and_no_more():
  """Values from below 10 to 2^20 in one matrix, and a lone one that no law reaches."""
  column_N = np.where(np.arange(128) < 4, -72, 0)
  rng = np.random.default_rng(2)
  q = rounded(2.0 * np.exp2(-column_N / 4) * rng.standard_normal((1024, 128)))
  q[5, 77] = 1 - LIMIT
  ideal = (q.size * law_bits(2.0) + 4 * 1024 * 18) / 8
  assert matrix_bytes(q, Steps(np.zeros(1024, np.int32), column_N)) < 1.003 * ideal


def test_a_mean_of_the_weights_shows_through_steps():
  rng = np.random.default_rng(3)
  common = np.outer(rng.standard_normal(800), rng.standard_normal(96))
  step = Steps(rounded(2 * rng.standard_normal(800)), rounded(3 * rng.standard_normal(96)))
  scale_MxN = 2 * np.exp2(-(step.row_M[:, None] + step.column_N) / 4)
  q = rounded((rng.standard_normal((800, 96)) + 2 * common) * scale_MxN)
  noise = rounded(rng.standard_normal((800, 96)) * scale_MxN)
  assert search.fit_matrices([q], [step]).models[0].model.rank == 1
  assert search.fit_matrices([noise], [step]).models[0].model.rank == 0
  # The mean takes about 4 bits a row and 5 a column.
  assert matrix_bytes(q, step) < 1.003 * matrix_bytes(noise, step) + (6 * 800 + 6 * 96) / 8


def test_alphabets_stay_small():
  assert max(len(law_weights(width, 2, 3)) for width in range(WIDTHS)) < 512


def test_small_tensors_take_their_entropy_wherever_their_centre_is():
  rng = np.random.default_rng(4)
  q = [rounded(300 + 30 * rng.standard_normal(512)) for _ in range(4)] + [np.full((8, 8), -5_000_000, np.int32)]
  bits = 512 * 4 * (2.047 + np.log2(30))  # and 5 bytes an array
  assert len(assert_returns("entropy", "integers", q)) < 1.005 * bits / 8 + 5 * 5


def test_steps_that_are_shared_cost_next_to_nothing():
  rng = np.random.default_rng(5)
  query, other = (rounded(3 * rng.standard_normal(512)) for _ in range(2))
  alone = len(assert_returns("entropy", "integers", [query, other]))
  assert len(assert_returns("entropy", "integers", [query, other, query, query + 7])) < alone + 12
  near = rounded(query + 0.3 * rng.standard_normal(512))
  assert len(assert_returns("entropy", "integers", [query, other, near])) < alone + 0.2 * 512


def test_parities_follow_the_trellis_state_by_state():
  bits = np.random.default_rng(6).integers(0, 2, (150, 5)).astype(np.uint8)
  wanted = np.empty_like(bits)
  for column in range(5):
    for row in range(150):
      state = NEXT[state, bits[row - 1, column]] if row % 64 else 0
      wanted[row, column] = PARITY[state]
  assert np.array_equal(parities(bits), wanted) and 0.4 < wanted.mean() < 0.6


@pytest.mark.parametrize("sigma", [0.8, 3.0, 40.0])
def test_a_trellis_loses_nothing_to_lowest_bits_that_come_first(sigma):
  """Each value takes what it would if its parity were known beforehand."""
  rng, shape = np.random.default_rng(7), (640, 256)
  weight, q, state = sigma * rng.standard_normal(shape), np.zeros(shape, np.int32), np.zeros(256, int)
  for row in range(640):
    state = state if row % 64 else np.zeros(256, int)
    q[row] = rounded(weight[row] - 0.5 * PARITY[state])
    state = NEXT[state, q[row] & 1]
  parity = parities((q & 1).astype(np.uint8))
  ideal = sum(entropy_bytes(q[parity == p]) for p in (0, 1))
  assert matrix_bytes(q, flat_steps(shape, trellis=True)) < 1.003 * ideal


def rounded_noise(seed: int, shape: tuple[int, int], width_N=2.4, mean_MxN=0.0, limit=31) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return np.clip(np.rint(rng.standard_normal(shape) * width_N + mean_MxN), -limit, limit).astype(np.int8)


def entropy_bytes(values: np.ndarray) -> float:
  count = np.unique(values, return_counts=True)[1]
  return float(-np.sum(count * np.log2(count / values.size))) / 8


def test_plain_noise_takes_its_entropy():
  q = rounded_noise(0, (512, 512))
  assert len(assert_returns("entropy", "grid", [q])) < 1.003 * entropy_bytes(q)


def test_columns_of_different_width_take_less_than_one_histogram():
  width = np.exp(0.4 * np.random.default_rng(1).standard_normal(256))
  q = rounded_noise(2, (512, 256), 3 * width)
  best = sum(entropy_bytes(column) for column in q.T)
  size = len(assert_returns("entropy", "grid", [q]))
  assert size < 0.97 * entropy_bytes(q)
  assert size < 1.02 * best


def test_rows_and_columns_that_share_a_mean_take_less():
  rng = np.random.default_rng(3)
  drift = rng.standard_normal(128) * 6
  share = (rng.random((900, 1)) < 0.4).astype(float)
  q = rounded_noise(4, (900, 128), np.where(share > 0, 1.0, 4.0), share * drift, limit=63)
  model = search.fit(q)
  assert model.mean is not None and len(np.unique(model.row_M)) > 1
  assert len(assert_returns("entropy", "grid", [q])) < 0.77 * entropy_bytes(q)


def test_the_strongest_direction_comes_first_however_it_is_spread():
  rng = np.random.default_rng(8)
  peaked, even = np.exp(-np.arange(200) / 6), np.sign(rng.standard_normal(200))
  strengths = 40 * peaked / np.linalg.norm(peaked), 20 * even / np.linalg.norm(even)
  mean = sum(rng.standard_normal((800, 1)) * strength for strength in strengths)
  basis_RxN = search.fit_mean(rounded_noise(9, (800, 200), 2.0, mean, limit=63)).b_RxN
  cosine_R = basis_RxN @ peaked / np.linalg.norm(basis_RxN, axis=1) / np.linalg.norm(peaked)
  assert np.argmax(np.abs(cosine_R)) == 0 and abs(cosine_R[0]) > 0.95


def test_wide_matrices_have_a_mean_too():
  rng = np.random.default_rng(5)
  q = rounded_noise(6, (96, 700), 2.0, np.outer(rng.standard_normal(96), 4 * rng.standard_normal(700)))
  model = search.fit(q)
  assert model.mean is not None and model.mean.flipped
  assert len(assert_returns("entropy", "grid", [q])) < 0.85 * entropy_bytes(q)


def test_noise_has_no_mean():
  assert search.fit(rounded_noise(7, (512, 300))).mean is None


@pytest.mark.parametrize("shape", [(256, 288), (400, 256)])
def test_a_few_wide_columns_are_no_mean(shape):
  width = np.where(np.arange(shape[1]) // 32 == 2, 16.0, 4.0)  # an AWQ group on its finer grid
  q = rounded_noise(10, shape, width, limit=127)
  assert search.fit(q).mean is None
  assert len(assert_returns("entropy", "grid", [q])) < 1.01 * (2.047 + np.log2(width)).sum() * shape[0] / 8


def test_degenerate_matrices():
  for q in (
    np.zeros((40, 40), np.int8),
    np.full((64, 64), 127, np.int8),
    np.full((64, 64), -128, np.int8),
    np.eye(80, dtype=np.int8) * 127,
    np.outer(np.arange(-60, 60), np.ones(70)).astype(np.int8),
  ):
    assert len(assert_returns("entropy", "grid", [q])) < 0.5 * q.size


@pytest.mark.parametrize("shape", range(len(ans.SHAPES)))
def test_laws_have_the_spread_that_they_name(shape):
  for width in (20, 32, 43, 50):
    weights = ans.weights(width, shape, 3, -60, 60)
    values = np.arange(-60, 61)
    share = weights / weights.sum()
    mean = np.sum(share * values)
    assert np.isclose(mean, 3 / ans.PHASES, atol=0.02 if width > 30 else 0.2)
    if width > 30:
      variance = np.sum(share * np.square(values - mean))
      assert np.isclose(variance, ans.sigma(width) ** 2 + 1 / 12, rtol=0.02)


def test_law_is_the_normal_law():
  sigma, phase = ans.sigma(44), 5
  weights = ans.weights(44, 0, phase, -40, 40)

  def below(x):
    return 0.5 * (1 + math.erf((x - phase / ans.PHASES) / (sigma * math.sqrt(2))))

  exact = np.array([below(v + 0.5) - below(v - 0.5) for v in range(-40, 41)])
  assert np.abs(weights / weights.sum() - exact).max() < 2e-4


def test_laws_are_the_same_on_every_machine():
  assert ans.weights(44, 0, 3, -6, 6).astype(int).tolist() == LAW_44
  assert ans.weights(37, 1, 0, -4, 4).astype(int).tolist() == LAW_37


@given(st.lists(st.integers(0, 40), max_size=400), st.integers(41, 300))
@settings(max_examples=100, deadline=None)
def test_counted_symbols_come_back(symbols, alphabet):
  writer = Writer()
  put_counted(writer, np.array(symbols, np.int32), alphabet)
  writer.put(np.array([1, 0, 1]), distribution(np.ones(2)))
  reader = Reader(writer.finish())
  assert take_counted(reader, len(symbols), alphabet).tolist() == symbols
  assert reader.take(3, distribution(np.ones(2))).tolist() == [1, 0, 1]
  reader.finish()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", ["grid", "small", "half", "matrix", "integers"])
@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200), shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=3))
def test_any_bytes_give_arrays_or_an_error(name, content, data, shapes):
  try:
    decoded = decode_stream(name, content, data, shapes, [flat_steps(shape, len(data) % 2) for shape in shapes])
  except ArtifactError:
    return
  assert [a.shape for a in decoded] == shapes


@functools.cache
def encoded_grid(name: str) -> bytes:
  """A matrix of 90 × 64 with a mean."""
  rng = np.random.default_rng(8)
  q = rounded_noise(9, (90, 64), 3.0, np.outer(rng.standard_normal(90), 5 * rng.standard_normal(64)))
  return encode_stream(name, "grid", [q])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_grids_give_arrays_or_an_error(name, data):
  whole = bytearray(encoded_grid(name))
  # An ANS coder reads the words near the end first: the parameters of the models.
  place = data.draw(st.integers(0, len(whole) - 1) | st.integers(len(whole) - 24, len(whole) - 1))
  whole[place] ^= data.draw(st.integers(1, 255))
  try:
    (decoded,) = decode_stream(name, "grid", bytes(whole), [(90, 64)])
  except ArtifactError:
    return
  assert decoded.shape == (90, 64) and decoded.dtype == np.int8


@functools.cache
def encoded_matrix(trellis: bool) -> bytes:
  """A matrix of 90 × 64 with a mean."""
  rng = np.random.default_rng(8)
  q = rounded(3 * rng.standard_normal((90, 64)) + np.outer(rng.standard_normal(90), 5 * rng.standard_normal(64)))
  return encode_stream("entropy", "matrix", [q], [flat_steps(q.shape, trellis)])


@pytest.mark.parametrize("trellis", [False, True])
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_damaged_matrices_give_arrays_or_an_error(trellis, data):
  whole = bytearray(encoded_matrix(trellis))
  place = data.draw(st.integers(0, len(whole) - 1) | st.integers(len(whole) - 80, len(whole) - 1))
  whole[place] ^= data.draw(st.integers(1, 255))
  try:
    (decoded,) = decode_stream("entropy", "matrix", bytes(whole), [(90, 64)], [flat_steps((90, 64), trellis)])
  except ArtifactError:
    return
  assert decoded.shape == (90, 64) and np.abs(decoded).max() < LIMIT


@given(st.integers(1 - (1 << 31), (1 << 31) - 1))
@settings(max_examples=100, deadline=None)
def test_whole_numbers_come_back(number):
  writer = Writer()
  put_number(writer, number)
  assert take_number(Reader(writer.finish())) == number


def test_zstd_frames_that_claim_too_much_are_refused():
  frame = zstandard.ZstdCompressor().compress(bytes(1 << 20))
  with pytest.raises(ArtifactError, match="claims 1048576 bytes"):
    decode_stream("zstd", "small", frame, [(8, 8)])
