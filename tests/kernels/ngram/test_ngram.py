"""The counts in C and in NumPy against plain Python, the published outputs, and their own promises."""

import contextlib
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from pgolf_jax.kernels import ngram
from pgolf_jax.kernels.ngram import MAX_ORDER, NgramState, reference

MODES = ["exact", "reference"]


@contextlib.contextmanager
def counting_in(language: str):
  """Makes states count in C or in NumPy."""
  before, ngram.IS_COMPILED = ngram.IS_COMPILED, language == "C"
  yield
  ngram.IS_COMPILED = before


@pytest.fixture(params=["C", "NumPy"])
def both_languages(request):
  with counting_in(request.param):
    yield


both = pytest.mark.usefixtures("both_languages")


def pair_collision() -> tuple[int, int, int]:
  """(a, s, t): at order 2, token s after 0 and token t after a have one pair key.

  Context keys are 0 and 36313·a; the pair keys 27191·s and (36313·a·PAIR) xor 27191·t agree where the latter is a
  multiple of 27191.
  """
  first, second = reference.COEFFICIENTS[:2]
  a = 3
  t = next(t for t in range(10**6) if (a * first * reference.PAIR ^ t * second) % second == 0)
  return a, (a * first * reference.PAIR ^ t * second) // second, t


def context_collision() -> tuple[tuple[int, int], tuple[int, int]]:
  """Two different contexts of two tokens with one key."""
  first, second = reference.COEFFICIENTS[:2]
  a = next(a for a in range(1, 10**6) if (a * first) % second == 0)
  return (a, 0), (0, a * first // second)


@st.composite
def streams(draw):
  """Tokens with enough repetition that contexts of any length come again, and some that collide on purpose."""
  tokens = draw(st.sampled_from([[0, 1], [0, 1, 2, 7], [0, *pair_collision()], [*sum(context_collision(), ())]]))
  parts = draw(st.lists(st.lists(st.sampled_from(tokens), max_size=12), max_size=12))
  repeats = draw(st.lists(st.integers(0, max(len(parts) - 1, 0)), max_size=30))
  return np.array([token for part in [*parts, *(parts[i] for i in repeats if parts)] for token in part], np.uint32)


@settings(deadline=None, max_examples=400)
@given(
  language=st.sampled_from(["C", "NumPy"]),
  stream=streams(),
  order=st.integers(1, MAX_ORDER) | st.integers(1, 4),
  mode=st.sampled_from(MODES),
  threshold=st.sampled_from([0.0, 0.3, 0.5, 2 / 3, 0.8, 1.0]),
  threads=st.integers(1, 4),
  expected=st.sampled_from([0, 1, 1000]),
  seeds=st.lists(st.integers(0, 3), max_size=3),
  cuts=st.lists(st.integers(0, 400), max_size=5),
)
def test_agrees_with_plain_python(language, stream, order, mode, threshold, threads, expected, seeds, cuts):
  with counting_in(language):
    state = NgramState(order, threshold=threshold, mode=mode, vocab_size=2**31, threads=threads, expected=expected)
  model = reference.NgramModel(order, threshold=threshold, mode=mode)
  for part in np.split(stream, np.unique([c for c in cuts if c < len(stream)]).astype(int)):
    for text in (state, model):
      text.seed(np.array(seeds, np.uint32))
    got, want = (np.full(len(part), 9, np.float32) for _ in range(2))
    total, model_total = (np.full(len(part), 9, np.int32) for _ in range(2))
    hint, gate = state.update(part, confidence=got, total=total)
    model_hint, model_gate = model.update(part, confidence=want, total=model_total)
    np.testing.assert_array_equal(hint, model_hint)
    np.testing.assert_array_equal(gate, model_gate)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(total, model_total)


@both
def test_pairs_of_different_contexts_share_counts_by_the_published_keys_alone():
  a, s, t = pair_collision()
  stream = np.array([0, s, 0, s, a, t, a, t], np.uint32)
  confidence = np.empty(len(stream), np.float32)
  NgramState(2, threshold=0.8, mode="reference").update(stream, confidence=confidence)
  assert confidence[-1] == 3  # t followed a once, and its pair had been counted twice before
  NgramState(2, threshold=0.8, mode="exact").update(stream, confidence=confidence)
  assert confidence[-1] == 1


@both
def test_different_contexts_share_hints_by_the_published_keys_alone():
  (a, b), (c, d) = context_collision()
  stream = np.array([a, b, 5, 6, c, d, 5], np.uint32)
  assert NgramState(3, threshold=0.8, mode="reference").update(stream)[1].tolist() == [False] * 6 + [True]
  assert not NgramState(3, threshold=0.8, mode="exact").update(stream)[1].any()


@both
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_published_hints(golden, threads):
  targets = load_file(golden("ngram") / "inputs.safetensors")["tokens"][1:]
  expected = load_file(golden("ngram") / "expected.safetensors")
  state = NgramState(16, threshold=0.8, mode="reference", vocab_size=1024, threads=threads)
  state.seed(targets[:1])
  hint, gate = state.update(targets)
  np.testing.assert_array_equal(gate, expected["gate_mask"])
  np.testing.assert_array_equal(np.where(gate, hint, 0), expected["hint_ids"])


@both
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", [1, 3, 16])
def test_any_number_of_threads_and_any_cut_give_the_same_bits(mode, order):
  rng = np.random.default_rng(order)
  stream = rng.integers(0, 50, 60_000).astype(np.uint16)
  for start in range(1000, 60_000, 300):  # copies of 150 tokens from somewhere before
    source = rng.integers(0, start - 200)
    stream[start : start + 150] = stream[source : source + 150]
  whole = NgramState(order, threshold=0.6, mode=mode, vocab_size=50, expected=len(stream))
  confidence = np.empty(len(stream), np.float32)
  hint, gate = whole.update(stream, confidence=confidence)
  assert gate.any() or order == 1
  for threads, parts in [(2, 1), (3, 4), (64, 2), (2, 100)]:
    state = NgramState(order, threshold=0.6, mode=mode, vocab_size=50, threads=threads)
    results = []
    for part in np.array_split(stream, parts):
      got = np.empty(len(part), np.float32)
      results.append((*state.update(part, confidence=got), got))
    for expected, got in zip((hint, gate, confidence), zip(*results, strict=True), strict=True):
      np.testing.assert_array_equal(np.concatenate(got), expected)


@both
@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_takes_tokens_of_any_integer_type_and_writes_into_arrays_given(dtype):
  tokens = np.array([3, 4, 3, 4, 3], dtype)
  hint, gate, confidence = np.full(5, -1, np.int32), np.ones(5, bool), np.full(5, 7, np.float32)
  got = NgramState(2, threshold=0.8).update(tokens, hint=hint, gate=gate, confidence=confidence)
  assert got[0] is hint and got[1] is gate
  assert hint.tolist() == [0, 0, 0, 4, 3]
  assert gate.tolist() == [False, False, False, True, True]
  assert confidence.tolist() == [0, 0, 0, 1, 1]


@both
def test_largest_token():
  top = 2**32 - 1
  hint, gate = NgramState(2, threshold=0.8).update(np.array([top, top, top], np.uint32))
  assert hint[2] == top and gate[2]


@pytest.mark.parametrize("mode", MODES)
def test_a_long_stream_has_the_same_hints_in_both_languages(mode):
  """Blocks are full, tables grow, and updates end inside blocks."""
  rng = np.random.default_rng(0)
  stream = rng.integers(0, 300, 200_000).astype(np.uint16)
  for start in range(1000, 200_000, 400):
    source = rng.integers(0, start - 200)
    stream[start : start + 200] = stream[source : source + 200]
  results = []
  for language, cuts in (("C", []), ("NumPy", [70_000, 70_001, 180_000])):
    with counting_in(language):
      state = NgramState(4, threshold=0.7, mode=mode, vocab_size=300)
    got = np.empty(len(stream), np.float32)
    parts = [
      state.update(part, confidence=out) for part, out in zip(np.split(stream, cuts), np.split(got, cuts), strict=True)
    ]
    results.append((*(np.concatenate(column) for column in zip(*parts, strict=True)), got))
  assert results[0][1].mean() > 0.2
  for in_c, in_numpy in zip(*results, strict=True):
    np.testing.assert_array_equal(in_c, in_numpy)


def test_without_the_compiled_counts_one_sentence_says_so(caplog):
  ngram._in_numpy.cache_clear()
  with counting_in("NumPy"), caplog.at_level("WARNING", "pgolf"):
    NgramState(2, threshold=0.8), NgramState(2, threshold=0.8)
  [line] = caplog.messages
  assert "install a C compiler" in line


@pytest.mark.parametrize("mode", MODES)
def test_memory_of_a_stream_of_new_contexts_alone(mode):
  """At most 40 bytes a target with the results; here no context comes twice, which takes the most."""
  tokens = np.random.default_rng(0).integers(0, 2**31, 400_000).astype(np.int32)
  state = NgramState(16, threshold=0.8, mode=mode, vocab_size=2**31, expected=len(tokens))
  hint, gate = state.update(tokens)
  boost = np.zeros(len(tokens), np.float32)
  assert state.nbytes + hint.nbytes + gate.nbytes + boost.nbytes <= 40 * len(tokens)


@both
@pytest.mark.parametrize(
  ("arguments", "error", "message"),
  [
    ({"order": 0}, ValueError, "order must be in 1 … 32, not 0"),
    ({"order": 33}, ValueError, "order must be in 1 … 32, not 33"),
    ({"order": 2, "mode": "hashed"}, ValueError, "not 'hashed'"),
    ({"order": 2, "vocab_size": 0}, ValueError, "vocab_size"),
    ({"order": 2, "vocab_size": 2**32 + 1}, ValueError, "vocab_size"),
    ({"order": 2, "threads": 0}, ValueError, "shards"),
    ({"order": 2, "expected": -1}, ValueError, "expected"),
    ({"order": 2, "threshold": float("nan")}, ValueError, "threshold"),
  ],
)
def test_refuses_impossible_settings(arguments, error, message):
  with pytest.raises(error, match=message):
    NgramState(**{"threshold": 0.8, **arguments})


@both
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
  ("tokens", "outputs", "error", "message"),
  [
    ([1, 2, 8], {}, ValueError, r"\[0, 8\)"),
    ([1, -2, 3], {}, ValueError, r"\[0, 8\)"),
    ([1.0, 2.0], {}, TypeError, "integers"),
    ([[1, 2], [3, 4]], {}, ValueError, "one dimension"),
    ([1, 2], {"hint": np.zeros(3, np.int32)}, ValueError, "hint must hold 2"),
    ([1, 2], {"hint": np.zeros(2, np.int64)}, ValueError, "hint must hold 2"),
    ([1, 2], {"hint": np.zeros(2, np.float32)}, ValueError, "hint must hold 2"),
    ([1, 2], {"gate": np.zeros(2, np.float32)}, ValueError, "gate must hold 2"),
    ([1, 2], {"confidence": np.zeros(2)}, ValueError, "confidence must hold 2"),
    ([1, 2], {"total": np.zeros(2)}, ValueError, "total must hold 2"),
    ([1, 2], {"hint": np.zeros(4, np.int32)[::2]}, ValueError, "contiguous"),
  ],
)
def test_a_refused_update_takes_nothing(tokens, outputs, error, message):
  state = NgramState(2, threshold=0.8, vocab_size=8)
  state.update(np.array([5, 6]))
  with pytest.raises(error, match=message):
    state.update(np.array(tokens), **outputs)
  assert state.last == 6
  hint, gate = state.update(np.array([5, 6]))
  assert hint.tolist() == [0, 6] and gate.tolist() == [False, True]


@both
def test_read_only_outputs_are_refused():
  hint = np.zeros(2, np.int32)
  hint.flags.writeable = False
  with pytest.raises(ValueError, match="read-only"):
    NgramState(2, threshold=0.8).update(np.array([1, 2]), hint=hint)


@both
def test_last_token():
  state = NgramState(2, threshold=0.8)
  assert state.last is None
  state.seed(np.array([7]))
  assert state.last == 7


def test_other_threads_run_during_an_update_and_cannot_disturb_it():
  state = NgramState(16, threshold=0.8)
  tokens = np.random.default_rng(0).integers(0, 8000, 3_000_000)
  running, done = threading.Event(), threading.Event()

  def work():
    running.set()
    state.update(tokens)
    done.set()

  worker = threading.Thread(target=work)
  worker.start()
  running.wait()
  refused = 0
  while not done.is_set():
    try:
      state.seed(tokens[:0])
    except RuntimeError as e:
      assert "another thread" in str(e)
      refused += 1
    time.sleep(1e-3)
  worker.join()
  assert refused > 3


OUT_OF_MEMORY = """
import resource
import numpy as np
from pgolf_jax.kernels.ngram import NgramState

tokens = np.random.default_rng(0).integers(0, 2**31, 4_000_000).astype(np.int32)
hint, gate = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), bool)

def size():
  return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

def fail():
  state = NgramState(16, threshold=0.8, mode="{mode}", vocab_size=2**31)
  try:
    {steps}
  except MemoryError:
    pass
  else:
    return "no error"
  try:
    state.update(tokens[:10])
  except RuntimeError as e:
    return f"refuses: {{e}}"
  return "goes on"

resource.setrlimit(resource.RLIMIT_AS, (size() + {room}, resource.RLIM_INFINITY))
print(fail())
once = size()
for _ in range(5):
  fail()
print(size() - once)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS and /proc")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer reserves terabytes")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
  ("room", "steps", "says"),
  [
    (10**6, "state.update(tokens, hint=hint, gate=gate)", "goes on"),  # the history itself does not fit
    (3 * 10**7, "state.update(tokens, hint=hint, gate=gate)", "refuses: this state ran out of memory"),
    (3 * 10**7, "[state.update(part) for part in np.split(tokens, 400)]", "refuses: this state ran out of memory"),
  ],
)
def test_running_out_of_memory_is_an_error_and_leaves_nothing_behind(mode, room, steps, says):
  code = OUT_OF_MEMORY.format(mode=mode, room=room, steps=steps)
  # A threshold that is given stays: glibc's own rises with what is freed, and then memory is kept for reuse.
  environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
  outcome, growth = result.stdout.splitlines()
  assert outcome.startswith(says)
  assert int(growth) < 2**20
