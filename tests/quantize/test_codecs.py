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
from pgolf_jax.quantize.artifact.codecs.ans import Reader, Writer, distribution, put_counted, take_counted
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


def assert_returns(name, content, given_arrays):
  data = encode_stream(name, content, given_arrays)
  decoded = decode_stream(name, content, data, [a.shape for a in given_arrays])
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
  model = search.fit_grid(q)
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
  model = search.fit_grid(q)
  assert model.mean is not None and model.mean.flipped
  assert len(assert_returns("entropy", "grid", [q])) < 0.85 * entropy_bytes(q)


def test_noise_has_no_mean():
  assert search.fit_grid(rounded_noise(7, (512, 300))).mean is None


@pytest.mark.parametrize("shape", [(256, 288), (400, 256)])
def test_a_few_wide_columns_are_no_mean(shape):
  width = np.where(np.arange(shape[1]) // 32 == 2, 16.0, 4.0)  # an AWQ group on its finer grid
  q = rounded_noise(10, shape, width, limit=127)
  assert search.fit_grid(q).mean is None
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
@pytest.mark.parametrize("content", ["grid", "small", "half"])
@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200), shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=3))
def test_any_bytes_give_arrays_or_an_error(name, content, data, shapes):
  try:
    decoded = decode_stream(name, content, data, shapes)
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


def test_zstd_frames_that_claim_too_much_are_refused():
  frame = zstandard.ZstdCompressor().compress(bytes(1 << 20))
  with pytest.raises(ArtifactError, match="claims 1048576 bytes"):
    decode_stream("zstd", "small", frame, [(8, 8)])
