"""The artifact: what was written is read back bit for bit, and anything else is refused."""

import contextlib
import hashlib
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zstandard
from artifact_samples import CONFIG, ORIGIN, TOKENIZER, rate_tensors, sample_tensors, sealed, with_header
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgolf_jax.errors import ArtifactError, UserError
from pgolf_jax.quantize.artifact import Origin, load, read, read_origin, reader
from pgolf_jax.quantize.artifact.codecs import NAMES, ans
from pgolf_jax.quantize.artifact.codecs.grids import Model, put_grids
from pgolf_jax.quantize.artifact.codecs.trellis import NEXT, PARITY, SEGMENT
from pgolf_jax.quantize.artifact.tensors import Even, Grid, Half, LogGrid, LowRank, unbank
from pgolf_jax.quantize.artifact.writer import write

VECTORS = Path(__file__).parent / "vectors"
WHOLE = {name: write(CONFIG, sample_tensors(), name, ORIGIN, TOKENIZER) for name in NAMES}
RATE = {name: write(CONFIG, rate_tensors(), name, ORIGIN, TOKENIZER) for name in NAMES}
both_codecs = pytest.mark.parametrize("name", NAMES)


both_forms = pytest.mark.parametrize(
  ("files", "tensors"), [(WHOLE, sample_tensors()), (RATE, rate_tensors())], ids=["gptq", "rate"]
)


@both_codecs
@both_forms
def test_everything_comes_back(name, files, tensors):
  artifact = read(files[name])
  assert artifact.config == CONFIG and artifact.codec == name
  assert artifact.origin == ORIGIN and artifact.tokenizer == TOKENIZER
  assert list(artifact.tensors) == list(tensors)
  assert sum(artifact.stream_bytes.values()) == len(files[name])
  for key, tensor in tensors.items():
    assert type(artifact.tensors[key]) is type(tensor)
    for field, value in vars(tensor).items():
      if isinstance(value, np.ndarray):
        stored = getattr(artifact.tensors[key], field)
        assert stored.dtype == value.dtype and np.array_equal(stored, value), (key, field)
    assert np.array_equal(artifact.tensors[key].dequantize(), tensor.dequantize()), key


@both_codecs
@both_forms
def test_writing_what_was_read_gives_the_same_file(name, files, tensors):
  artifact = read(files[name])
  assert write(artifact.config, artifact.tensors, artifact.codec, artifact.origin, artifact.tokenizer) == files[name]


@both_codecs
@pytest.mark.parametrize("version", ["", ".2", ".3"], ids=["version 1", "version 2", "version 3"])
def test_stored_artifact_decodes_to_the_same_bits(name, version):
  """`python tests/quantize/vectors/make.py` made these files, once."""
  stored = (VECTORS / f"{name}{version}.pgolf").read_bytes()
  artifact = read(stored)
  assert (artifact.origin, artifact.tokenizer) == ((ORIGIN, TOKENIZER) if version else (Origin(), None))
  params = artifact.params()
  hashes = {key: hashlib.sha256(np.ascontiguousarray(v, "<f4").tobytes()).hexdigest() for key, v in params.items()}
  assert hashes == json.loads((VECTORS / f"params{version if version == '.3' else ''}.json").read_text())


@both_codecs
def test_files_of_old_forms_stay_what_they_were(name):
  assert WHOLE[name] == (VECTORS / f"{name}.2.pgolf").read_bytes()


@both_forms
def test_params_are_in_banks(files, tensors):
  params = read(files["entropy"]).params()
  assert params["qo_bank"].shape == (4, 32, 32) and params["mlp_down_bank"].shape == (2, 32, 64)
  assert all(value.dtype == np.float32 for value in params.values())
  for key, value in unbank(params).items():
    assert np.array_equal(value, tensors[key].dequantize()), key


def test_low_rank_product_is_a_chain_of_fused_multiply_adds():
  factors = sample_tensors()["tok_emb.weight"].low_rank
  wanted = np.zeros((96, 32), np.float32)
  for r in range(2):
    wanted = (
      wanted.astype(np.longdouble) + np.multiply.outer(factors.a()[:, r], factors.b()[r], dtype=np.longdouble)
    ).astype(np.float32)
  assert np.array_equal(factors.dequantize(), wanted)


@pytest.mark.parametrize("largest", [20, 1 << 23])
def test_weights_under_a_trellis_lie_half_a_step_further_by_their_parity(largest):
  """Value by value, over the bounds of segments and of the slabs in which weights are made."""
  rng = np.random.default_rng(0)
  q = rng.integers(-largest, largest, (150, 4500)).astype(np.int32)
  row_M, column_N = rng.integers(-40, 40, 150), rng.integers(-40, 40, 4500)
  trellis_N, trellis_M = rng.random(4500) < 0.5, rng.random(150) < 0.8
  weights = LogGrid(q, row_M.astype(np.int32), column_N.astype(np.int32), trellis_N, trellis_M).dequantize()
  parity = np.zeros(q.shape)
  for place, row in enumerate(np.flatnonzero(trellis_M)):
    state = state if place % SEGMENT else np.zeros(4500, int)
    parity[row], state = PARITY[state], NEXT[state, q[row] & 1]
  wanted = (q + 0.5 * parity * trellis_N) * np.exp2((row_M[:, None] + column_N) / 4)
  assert np.allclose(weights, wanted, rtol=2e-7, atol=0)


def refused(data: bytes, match: str) -> None:
  with pytest.raises(ArtifactError, match=match):
    read(data)


def test_foreign_files_are_refused_by_name():
  whole = WHOLE["entropy"]
  refused(b"", "truncated")
  refused(whole[:20], "truncated")
  refused(b"GIF89a" + whole[6:], "not an artifact")
  refused(whole[:8] + b"\x07\x00" + whole[10:], "format version 7")
  refused(whole[:-1], "checksum")
  refused(whole + b"\0", "checksum")
  refused(sealed(whole[:10] + b"\x09\x00" + whole[12:]), "contradict")
  refused(sealed(whole[:12] + b"\xff\xff\xff\x7f" + whole[16:]), "contradict")


def bare(streams, tensors):
  """A header that says nothing else."""
  return {"config": {}, "origin": {}, "streams": streams, "tensors": tensors, "tokenizer": 0}


def edit(path, value):
  """Returns a change of the header: what lies at `path` becomes `value`."""

  def change(header):
    place = header
    for step in path[:-1]:
      place = place[step]
    place[path[-1]] = value

  return change


FACTORS = (((1024, 4), np.int8), ((1,), np.float16), ((4, 1024), np.int8), ((64,), np.float16))
TOK = next(i for i, name in enumerate(sample_tensors()) if name == "tok_emb.weight")


@both_codecs
@pytest.mark.parametrize(
  ("path", "value", "match"),
  [
    (["tensors", 0, 2], [1 << 14, 1 << 14], "streams|claims|damaged"),
    (["tensors", 0, 2], [1 << 20, 1 << 20], "claims .* parameters"),
    (["tensors", 0, 2], [1 << 40, 1], "impossible shape"),
    (["tensors", 0, 2], [0, 32], "impossible shape"),
    (["tensors", 0, 2], [32.0, 32], "impossible shape"),
    (["tensors", 0, 2], [True, 32], "impossible shape"),
    (["tensors", 0, 2], [32], "impossible shape"),
    (["tensors", 0, 0], "pickle", "unknown form"),
    (["tensors", 0, 1], "../../x", "impossible name"),
    (["tensors", 0, 1], "blocks.1.attn.c_q.weight", "twice"),
    (["tensors", TOK, 3], [8, [24, 0]], "odd groups"),
    (["tensors", TOK, 3], [8, [28]], "odd groups"),
    (["tensors", TOK, 4], [64, 1, 8], "odd factors"),
    (["tensors", TOK, 4], [2, 1, 7], "odd factors"),
    (["tensors", 0], None, "wrong type"),
    (["origin"], [], "unknown parts"),
    (["origin", "more"], "x", "unknown parts"),
    (["origin", "jax"], 3, "impossible jax"),
    (["origin", "jax"], "x" * 201, "impossible jax"),
    (["origin", "data"], "\x1b[2J", "impossible data"),
    (["origin", "data"], None, "impossible data"),
    (["origin", "tokenizer"], "g" * 64, "impossible tokenizer"),
    (["origin", "tokenizer"], "0" * 64, "not the one that its origin names"),
    (["origin", "manifest"], "a" * 65, "impossible manifest"),
    (["origin", "pieces"], True, "impossible pieces"),
    (["origin", "pieces"], 1 << 17, "impossible pieces"),
    (["tokenizer"], -1, "impossible length"),
    (["tokenizer"], True, "impossible length"),
    (["tokenizer"], 1 << 40, "not those of its table"),
    (["tokenizer"], 0, "not those of its table"),
    (["streams", 0], -4, "impossible length"),
    (["streams", 0], 1e300, "impossible length"),
    (["streams"], [], "not those of its table"),
    (["config"], [], "wrong type"),
    (["more"], 1, "parts of version 2"),
  ],
)
def test_hostile_headers_are_refused(name, path, value, match):
  refused(with_header(WHOLE[name], edit(path, value)), match)


RATE_NAMES = list(rate_tensors())
FC, SCALE = RATE_NAMES.index("blocks.0.mlp.fc.weight"), RATE_NAMES.index("blocks.0.attn_scale")


@both_codecs
@pytest.mark.parametrize(
  ("path", "value", "match"),
  [
    (["tensors", FC, 2], [1 << 18, 1 << 18], "claims .* parameters"),
    (["tensors", FC, 2], [(1 << 18) + 1, 1], "impossible shape"),
    (["tensors", FC, 2], [64, 0], "impossible shape"),
    (["tensors", FC, 2], [64], "impossible shape"),
    (["tensors", FC, 3], 1, "odd trellis"),
    (["tensors", FC, 3], [], "odd trellis"),
    (["tensors", FC, 3], False, "damaged"),
    (["tensors", FC], ["log", "blocks.0.mlp.fc.weight", [64, 32]], "odd trellis"),
    (["tensors", SCALE, 3], 401, "impossible step"),
    (["tensors", SCALE, 3], -1.0, "impossible step"),
    (["tensors", SCALE, 3], True, "impossible step"),
    (["tensors", SCALE], ["even", "blocks.0.attn_scale", [32]], "impossible step"),
    (["tensors", SCALE, 2], [1 << 40], "impossible shape"),
    (["tensors", SCALE, 0], "log", "impossible shape"),
    (["tensors", FC, 0], "rows", "too many fields"),
  ],
)
def test_hostile_headers_of_the_rate_forms_are_refused(name, path, value, match):
  refused(with_header(RATE[name], edit(path, value)), match)


def test_an_old_version_has_no_new_forms():
  refused(sealed(RATE["zstd"][:8] + b"\x02\x00" + RATE["zstd"][10:]), "forms that version 2 does not know")
  assert read(sealed(WHOLE["zstd"][:8] + b"\x03\x00" + WHOLE["zstd"][10:])).config == CONFIG


@both_codecs
@pytest.mark.parametrize(
  ("tensor", "match"),
  [
    (LogGrid(np.full((2, 2), 1 << 24), np.zeros(2, int), np.zeros(2, int)), "w holds integers beyond"),
    (LogGrid(np.zeros((2, 2), int), np.full(2, 201), np.zeros(2, int)), "beyond -200 … 200"),
    (LogGrid(np.zeros((2, 2), int), np.zeros(2, int), np.full(2, -201)), "beyond -200 … 200"),
    (LogGrid(np.zeros((2, 2), int), *[np.zeros(2, int)] * 2, np.full(2, 2), np.ones(2, bool)), "beyond 0 … 1"),
    (LogGrid(np.zeros((2, 2), int), *[np.zeros(2, int)] * 2, np.ones(2, bool), np.full(2, 2)), "beyond 0 … 1"),
    (Even(np.full(3, -(1 << 24)), 0), "w holds integers beyond"),
    (Even(np.zeros(3, int), 401), "impossible step"),
  ],
)
def test_what_no_reader_takes_is_not_written(name, tensor, match):
  with pytest.raises(ArtifactError, match=match):
    write({}, {"w": tensor}, name)


@both_codecs
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_integers_on_the_largest_and_smallest_steps_are_finite(name, sign):
  steps = np.full(40, sign * 200, np.int32)
  q = np.full((40, 40), (1 << 24) - 1, np.int32)
  q[::2] *= -1
  tensors = {"w": LogGrid(q, steps, steps, np.arange(40) < 9, np.arange(40) > 3), "x": Even(q, sign * 400)}
  params = read(write({}, tensors, name)).params()
  for key, tensor in tensors.items():
    assert np.isfinite(params[key]).all() and np.array_equal(params[key], tensor.dequantize())


def test_a_version_has_its_own_parts():
  """The parts of version 1 under the number of version 2, and the other way round."""
  old = (VECTORS / "zstd.pgolf").read_bytes()
  refused(sealed(old[:8] + b"\x02\x00" + old[10:]), "parts of version 2")
  refused(sealed(WHOLE["zstd"][:8] + b"\x01\x00" + WHOLE["zstd"][10:]), "parts of version 1")


def test_a_tokenizer_that_unpacks_to_more_than_the_limit_is_refused_before_it_does():
  bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
  whole = with_header(WHOLE["zstd"], edit(["tokenizer"], len(bomb)))
  size = len(zstandard.ZstdCompressor(level=19, write_checksum=False).compress(TOKENIZER))
  tracemalloc.start()
  refused(sealed(whole[:-size] + bomb), "claims 268435456 bytes")
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 1 << 21


def test_too_large_a_tokenizer_is_not_written():
  with pytest.raises(ArtifactError, match="at most 4,194,304 can be embedded"):
    write({}, {}, tokenizer=bytes(reader.MAX_TOKENIZER + 1))


def test_the_origin_is_read_without_the_weights(tmp_path):
  (tmp_path / "a.pgolf").write_bytes(WHOLE["entropy"])
  assert read_origin(tmp_path / "a.pgolf") == (ORIGIN, TOKENIZER)
  with pytest.raises(UserError, match="There is no artifact"):
    read_origin(tmp_path / "b.pgolf")


@pytest.mark.parametrize(
  "text",
  [b"[" * 200_000, b'{"config":NaN}', b"\xff\xfe", b"9" * 100_000, b"null", b'{"a":' * 40_000, b""],
  ids=["deep", "nan", "not text", "long number", "null", "nested", "empty"],
)
def test_headers_that_are_not_ours_are_refused(text):
  refused(with_header(WHOLE["entropy"], lambda _: text), "header")


def test_oversized_headers_are_refused_before_they_are_unpacked():
  bomb = with_header(WHOLE["entropy"], lambda _: b" " * (1 << 28))
  tracemalloc.start()
  refused(bomb, "claims 268435456 bytes")
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 1 << 20


@both_codecs
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_damage_is_an_error(name, data):
  """Cuts, flips and insertions: unless the checksum matches, nothing else is read."""
  whole = bytearray(WHOLE[name])
  for _ in range(data.draw(st.integers(1, 3))):
    place = data.draw(st.integers(0, len(whole) - 1))
    match data.draw(st.sampled_from(["cut", "flip", "insert", "drop"])):
      case "cut":
        del whole[max(place, 1) :]
      case "flip":
        whole[place] ^= data.draw(st.integers(1, 255))
      case "insert":
        whole[place:place] = data.draw(st.binary(min_size=1, max_size=8))
      case "drop" if len(whole) > 1:
        del whole[place]
  if bytes(whole) != WHOLE[name]:
    with pytest.raises(ArtifactError):
      read(bytes(whole)).params()


@both_codecs
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.data_too_large])
@given(data=st.data())
def test_damage_under_a_forged_checksum_is_an_error_or_other_weights(name, data):
  """Any bytes decode to some symbols, so other weights may result, but they have the declared shapes."""
  whole = bytearray(data.draw(st.sampled_from([WHOLE, RATE]))[name])
  for _ in range(data.draw(st.integers(1, 4))):
    place = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
      whole[place] ^= data.draw(st.integers(1, 255))
    else:
      whole[place : place + data.draw(st.integers(0, 6))] = data.draw(st.binary(max_size=6))
  try:
    artifact = read(sealed(bytes(whole)))
  except ArtifactError:
    return
  for key, tensor in artifact.tensors.items():
    assert np.isfinite(tensor.dequantize()).all(), key


json_values = st.recursive(
  st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=4),
  lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
  max_leaves=6,
)


@both_codecs
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_header_is_an_error_or_an_artifact(name, data):
  def change(header):
    table = header["tensors"]
    match data.draw(st.sampled_from(["entry", "field", "size", "streams", "length", "swap", "origin", "part"])):
      case "origin":
        header["origin"][data.draw(st.sampled_from([*header["origin"], "x"]))] = data.draw(json_values)
      case "part":
        header[data.draw(st.sampled_from(["origin", "tokenizer", "x"]))] = data.draw(json_values)
      case "entry":
        table[data.draw(st.integers(0, len(table) - 1))] = data.draw(json_values)
      case "field":
        entry = table[data.draw(st.integers(0, len(table) - 1))]
        entry[data.draw(st.integers(0, len(entry) - 1))] = data.draw(json_values)
      case "size":
        entry = table[data.draw(st.integers(0, len(table) - 1))]
        if entry[2]:
          entry[2][data.draw(st.integers(0, len(entry[2]) - 1))] = data.draw(st.integers(1, 5000))
      case "streams":
        header["streams"] = data.draw(json_values)
      case "length":
        header["streams"][data.draw(st.integers(0, 5))] = data.draw(st.integers(-1, 10**6))
      case "swap":
        a, b = data.draw(st.integers(0, len(table) - 1)), data.draw(st.integers(0, len(table) - 1))
        table[a], table[b] = table[b], table[a]

  with contextlib.suppress(ArtifactError):
    read(with_header(data.draw(st.sampled_from([WHOLE, RATE]))[name], change)).params()


@both_codecs
@pytest.mark.parametrize(
  "entry",
  [
    ["grid", "w", [1 << 11, 1 << 11], None, None],
    ["grid", "w", [1 << 17, 32], None, None],
    ["half", "w", [1 << 22]],
    ["rows", "w", [1 << 11, 1 << 11]],
    ["log", "w", [1 << 11, 1 << 11], True],
    ["log", "w", [1 << 18, 16], False],
    ["even", "w", [1 << 22], 0],
  ],
  ids=["square", "tall", "half", "rows", "log", "tall log", "even"],
)
@pytest.mark.parametrize("seed", range(3))
def test_memory_stays_below_twice_what_the_table_declares(name, entry, seed):
  """A short file whose table declares large tensors takes the memory of those tensors at most, or is an error."""
  streams = 1 if entry[0] in ("half", "even") else 2
  body = np.random.default_rng(seed).bytes(64 * streams)
  if name == "entropy":  # a method, where one is named, that reads on past the end
    body = b"\0" * 5 + body[5:]
  forged = with_header(WHOLE[name], lambda _: bare([64] * streams, [entry]))
  header_bytes = len(forged) - len(WHOLE[name]) + read(WHOLE[name]).stream_bytes["header"]
  tracemalloc.start()
  with contextlib.suppress(ArtifactError):
    read(sealed(forged[:header_bytes] + body)).params()
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2 * 4 * (1 << 22) + (reader.WORKING_BYTES if entry[0] in ("log", "even") else 0)  # fp32 weights


def test_memory_of_a_whole_model_stays_below_twice_its_weights():
  rng = np.random.default_rng(0)
  steps = np.full(1024, 0.01, np.float16)
  factors = LowRank(*(rng.integers(-2, 2, shape).astype(t) for shape, t in FACTORS))
  tensors = {
    f"blocks.{i}.mlp.{name}.weight": Grid(rng.integers(-9, 9, (1024, 1024)).astype(np.int8), steps, low_rank=factors)
    for i in range(3)
    for name in ("fc", "proj")
  }
  data = write({}, tensors)
  tracemalloc.start()
  params = read(data).params()
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2 * sum(value.nbytes for value in params.values())


@both_codecs
def test_memory_of_a_whole_model_of_large_integers(name):
  rng = np.random.default_rng(0)
  steps = [rng.integers(-9, 9, 1024).astype(np.int32) for _ in range(2)]
  q = np.rint(9 * rng.standard_normal((1024, 1024))).astype(np.int32)
  tensors = {f"blocks.{i}.mlp.fc.weight": LogGrid(q, *steps, steps[0] < 0, steps[1] < 0) for i in range(3)}
  data = write({}, tensors, name)
  tracemalloc.start()
  params = read(data).params()
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2 * (sum(value.nbytes for value in params.values()) + len(data)) + reader.WORKING_BYTES


def test_values_that_fp16_cannot_hold_are_not_written():
  tensors = {"w": Half(np.array([1.0, np.inf], np.float16))}
  with pytest.raises(ArtifactError, match="w holds values that are not finite"):
    write({}, tensors)


def peak_bytes(path: Path) -> int:
  """Memory that refusing the artifact at `path` takes."""
  tracemalloc.start()
  with pytest.raises(UserError):
    load(path)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  return peak


@pytest.mark.parametrize(
  ("config", "entry"),
  [
    ({}, ["half", "blocks.99999999.attn.c_q.weight", [1]]),
    ({}, ["half", "blocks.9999.attn.c_q.weight", [1]]),
    ({}, ["half", "x" * 100_000, [1]]),
    ({"model": {"num_layers": 10**9}}, ["half", "x", [1]]),
    ({"model": {"num_layers": 900, "num_loops": 10**9}}, ["half", "x", [1]]),
    ({"model": {"vocab_size": 65536, "model_dim": 65536}}, ["half", "x", [1]]),
    ({}, ["grid", "tok_emb.weight", [8192, 32768], None, None]),
    ({}, ["half", "tok_emb.weight", [2**28 - 1]]),
  ],
  ids=["layer", "layers", "name", "config layers", "config loops", "config size", "2^28 integers", "2^28 halves"],
)
def test_a_hundred_bytes_cannot_claim_memory(tmp_path, config, entry):
  header = bare([0] if entry[0] == "half" else [0, 0], [entry]) | {"config": config}
  whole = with_header(WHOLE["entropy"], lambda _: header)
  size = reader.PREFIX.unpack_from(whole)[3]
  (tmp_path / "small.pgolf").write_bytes(sealed(whole[: reader.START + size]))
  assert peak_bytes(tmp_path / "small.pgolf") < reader.WORKING_BYTES


def test_layers_of_params_are_bounded_by_the_table():
  names = [f"blocks.{i}.mlp.fc.weight" for i in (0, 9999)]
  tensors = {name: Half(np.ones((2, 2), np.float16)) for name in names}
  with pytest.raises(ArtifactError, match="do not make up whole banks"):
    read(write({}, tensors)).params()


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
def test_numbers_of_the_config_are_finite(number):
  text = json.dumps(bare([], []) | {"config": {"x": 17.25}}).replace("17.25", number)
  refused(with_header(WHOLE["entropy"], lambda _: text.encode()), "not finite")


def test_counts_are_made_in_slabs():
  """Counting a million symbols takes less memory than they do as 64-bit numbers."""
  counts, symbols = np.zeros(1024, np.int64), np.zeros(1 << 20, np.int16)
  tracemalloc.start()
  ans._add_counts(counts, symbols)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert counts[0] == 1 << 20 and peak < 2 * symbols.nbytes


def test_a_grid_of_endless_classes_is_refused():
  """Without the bound a matrix of 256 rows and 96 column classes has 24,576 parts of one value each."""
  rng = np.random.default_rng(0)
  shape = (256, 96)
  model = Model(None, rng.permutation(96).astype(np.int32), (np.arange(256) - 128).astype(np.int32))
  with pytest.raises(ArtifactError, match="width classes where at most"):
    put_grids(ans.Writer(), [np.zeros(shape, np.int8)], [model])


def test_a_tensor_without_values_comes_back():
  """A model of one layer has no skips."""
  tensors = {"skip_weights": Half(np.zeros((0, 8), np.float16)), "x": Half(np.ones(3, np.float16))}
  for codec in NAMES:
    assert read(write({}, tensors, codec)).params()["skip_weights"].shape == (0, 8)


@both_codecs
@pytest.mark.parametrize("tensor", [0, 1])
@pytest.mark.parametrize("shape", [[0, 1 << 28, 1 << 28, 1 << 28], [1 << 28, 0, 1 << 28, 1 << 28]])
def test_a_tensor_without_values_may_not_have_sides_that_numpy_refuses(name, tensor, shape):
  tensors = {"x": Half(np.zeros((0, 8), np.float16)), "y": Even(np.zeros((0, 8), np.int32), 0)}
  refused(with_header(write({}, tensors, name), edit(["tensors", tensor, 2], shape)), "impossible shape")
