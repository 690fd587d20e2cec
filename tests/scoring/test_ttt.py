"""What must hold of test-time training whatever the model: once, causal, the same however the work is laid out."""

import dataclasses
import functools
import signal

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from ttt_case import SETTINGS, chained_documents, changed, random_documents, random_params

from pgolf_jax.data.shards import ValidationData
from pgolf_jax.errors import Stopped, UserError
from pgolf_jax.runtime.distributed import data_mesh
from pgolf_jax.scoring import ttt
from pgolf_jax.scoring.documents import find_documents
from pgolf_jax.scoring.record import Record, ScoreEvent, WeightsEvent, find_cycle, identify
from pgolf_jax.settings import load

LENGTHS = [30, 9, 75, 41, 22, 60, 14, 33]


@functools.cache
def programs_on(settings, devices):
  """Programs that evaluations of one shape share, so that they compile once."""
  return ttt.Programs(settings, data_mesh(jax.devices()[:devices]))


def evaluate(settings, data, *, programs=None, params=None, **options):
  programs = programs or programs_on(settings, 1)
  return ttt.evaluate(settings, params or random_params(), data, programs.mesh, ttt.Options(**options), programs)


@pytest.fixture(scope="module")
def in_a_folder(tmp_path_factory):
  """(folder, data, evaluation of the data kept in the folder)."""
  folder, data = tmp_path_factory.mktemp("evaluation"), random_documents(LENGTHS)
  return folder, data, evaluate(SETTINGS, data, folder=folder)


@pytest.fixture(scope="module")
def with_phase():
  """(settings with a global phase, data, their evaluation)."""
  settings, data = changed(SETTINGS, phase__prefix_docs=5), random_documents(LENGTHS)
  return settings, data, evaluate(settings, data)


def test_every_target_is_scored_once(in_a_folder):
  _, data, found = in_a_folder
  assert (found.times_N == 1).all()
  assert found.score.targets == len(data.tokens) - 1
  assert found.score.text_bytes == data.token_bytes[1:].sum()
  assert found.gate_N.any()
  assert found.recompilations == 0


def test_nothing_is_compiled_inside_the_clock_where_no_batch_is_full():
  """As with `pgolf eval --documents`."""
  settings = changed(SETTINGS, batch_size=7, phase__prefix_docs=7)
  params = random_params()
  jax.clear_caches()  # of what other tests, and these parameters, have compiled
  programs = ttt.Programs(settings, data_mesh(jax.devices()[:1]))
  assert evaluate(settings, random_documents([20, 37, 31]), programs=programs, params=params).recompilations == 0


def document_means(found, data):
  documents = find_documents(data.tokens, SETTINGS.model.bos_id)
  return [found.model_nll_N[d.target_slice].mean(dtype=np.float64) for d in documents]


def test_scores_do_not_depend_on_the_batch_size():
  data = random_documents(LENGTHS)
  # The record's learning rate: Adam's first steps turn a gradient's sign alone, also where rounding decides it.
  settings = changed(SETTINGS, lora__warm_start_a=False, lora__lr=1e-4)
  one, three, all_at_once = (evaluate(changed(settings, batch_size=size), data) for size in (1, 3, 24))
  # Hints follow the order of scoring, which batches decide; what the model makes of each target does not.
  for other in (one, all_at_once):
    np.testing.assert_allclose(document_means(other, data), document_means(three, data), rtol=0, atol=1e-6)
    np.testing.assert_allclose(other.untilted.bpb, three.untilted.bpb, rtol=0, atol=1e-6)


@pytest.mark.parametrize("devices", [2, 8])
def test_scores_do_not_depend_on_the_number_of_devices(devices):
  data = random_documents(LENGTHS)
  settings = changed(SETTINGS, phase__prefix_docs=5, lora__lr=1e-4)
  one = evaluate(settings, data)
  many = evaluate(settings, data, programs=programs_on(settings, devices))
  np.testing.assert_allclose(document_means(many, data), document_means(one, data), rtol=0, atol=1e-6)
  np.testing.assert_allclose(many.score.bpb, one.score.bpb, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["exact", "cached"])
def test_chains_score_alike_on_one_device_and_on_eight_and_go_on_after_a_kill(method, tmp_path):
  """Nine batches in four chains: the last round has one batch, the first batch another size, and a phase comes."""
  data = random_documents([30, 9, 40, 41, 22, 38, 14, 33, 25, 27, 18, 36, 29, 12, 20, 17, 35])
  settings = changed(SETTINGS, method=method, batch_size=2, chains=4, phase__prefix_docs=9, lora__lr=1e-4)
  one, eight = evaluate(settings, data), evaluate(settings, data, programs=programs_on(settings, 8))
  np.testing.assert_allclose(document_means(eight, data), document_means(one, data), rtol=0, atol=1e-6)
  assert find_cycle(one.trace) is None and find_cycle(eight.trace) is None
  assert set(eight.trace) == set(one.trace), "side by side, hints of several batches come before their scores"
  assert one.recompilations == eight.recompilations == 0
  scores = [event for event in one.trace if isinstance(event, ScoreEvent)]
  assert [event.adapters for event in scores[:4]] == ["4", "1", "2", "3"], "the odd batch has a set of its own"
  assert [event.carried for event in scores] == [0, 0, 0, 0, 0, 1, 1, 1, 0]

  evaluate_until_killed(settings, data, tmp_path, after=2 if method == "cached" else 6)
  again = evaluate(settings, data, folder=tmp_path, programs=programs_on(settings, 8))
  np.testing.assert_allclose(document_means(again, data), document_means(one, data), rtol=0, atol=1e-6)
  assert set(again.trace) == set(one.trace)


def test_one_chain_is_the_same_as_many_that_carry_nothing():
  data = random_documents(LENGTHS)
  settings = changed(SETTINGS, batch_size=2, chains=1, lora__warm_start_a=False, lora__lr=1e-4)
  one, three = evaluate(settings, data), evaluate(changed(settings, chains=3, method="exact"), data)
  np.testing.assert_allclose(document_means(three, data), document_means(one, data), rtol=0, atol=1e-6)


def test_learning_and_hints_help_on_a_repeating_text():
  rng = np.random.default_rng(0)
  loops = [np.append(SETTINGS.model.bos_id, np.tile(rng.integers(2, 48, 5), 24)) for _ in range(4)]
  tokens = np.concatenate(loops).astype(np.int32)
  data = ValidationData(tokens, np.ones_like(tokens))
  # That no document may learn changes no program, so that both evaluations compile one.
  still, moving = (evaluate(changed(SETTINGS, lora__train_min_doc_len=least), data) for least in (10**6, 0))
  assert moving.untilted.bpb < 0.9 * still.untilted.bpb
  assert moving.score.bpb < 0.9 * moving.untilted.bpb


def test_learnt_strengths_help_and_outlive_a_kill(tmp_path):
  settings = load.changed(
    SETTINGS, {"hints.strength": "mixture", "hints.backoff": (3, 2), "hints.threshold": 0.0, "ttt.batch_size": 2}
  )
  data = chained_documents(LENGTHS)
  whole = evaluate(settings, data)
  assert whole.score.bpb < 0.9 * whole.untilted.bpb
  evaluate_until_killed(settings, data, tmp_path, after=2)
  resumed = evaluate(settings, data, folder=tmp_path, save_seconds=0)
  np.testing.assert_array_equal(resumed.nll_N, whole.nll_N)


def test_no_steps_are_no_learning():
  data = random_documents(LENGTHS)
  still = evaluate(changed(SETTINGS, lora__train_min_doc_len=10**6), data)
  found = evaluate(changed(SETTINGS, lora__grad_steps=0), data)
  np.testing.assert_array_equal(found.nll_N, still.nll_N)
  assert found.useful_flops == still.useful_flops


def test_a_phase_whose_chunks_hold_no_row_moves_no_weight():
  params = random_params()
  settings = changed(SETTINGS, phase__prefix_docs=2, phase__chunk_tokens=SETTINGS.eval.seq_len - 1)
  found = evaluate(settings, random_documents(LENGTHS), params=params)
  assert any(isinstance(event, WeightsEvent) for event in found.trace)
  for name, value in params.items():
    np.testing.assert_array_equal(found.params[name], value)


def test_strict_order_is_acyclic_and_reference_order_is_not(with_phase):
  settings, data, strict = with_phase
  reference = evaluate(changed(settings, order="reference"), data)
  assert find_cycle(strict.trace) is None
  assert find_cycle(reference.trace)
  assert not np.allclose(strict.nll_N, reference.nll_N)


class Killed(Exception):
  pass


def evaluate_until_killed(settings, data, folder, *, after, **options):
  """Runs an evaluation that is killed at its save number `after`, counted from 1."""
  saves = []

  def save(self, *arguments, original=Record.save):
    original(self, *arguments)
    saves.append(arguments)
    if len(saves) == after:
      raise Killed

  with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
    patch.setattr(Record, "save", save)
    evaluate(settings, data, folder=folder, save_seconds=0, **options)


@pytest.mark.parametrize("after", [1, 2])
def test_a_killed_evaluation_goes_on_with_the_same_result(tmp_path, with_phase, after):
  settings, data, whole = with_phase
  evaluate_until_killed(settings, data, tmp_path, after=after)
  found = evaluate(settings, data, folder=tmp_path, save_seconds=0)
  np.testing.assert_array_equal(found.nll_N, whole.nll_N)
  assert (found.times_N == 1).all()
  assert found.trace == whole.trace
  assert found.recompilations == 0
  for name, value in whole.params.items():
    np.testing.assert_array_equal(found.params[name], value, err_msg=name)


def test_programs_compiled_before_a_kill_are_counted_after_it(tmp_path, with_phase):
  settings, data, _ = with_phase

  def compile_something(batches, record):
    jax.jit(lambda x: x * batches)(np.zeros(90 + batches))

  evaluate_until_killed(settings, data, tmp_path, after=2, after_batch=compile_something)
  assert evaluate(settings, data, folder=tmp_path).recompilations >= 1
  assert evaluate(settings, data, folder=tmp_path).recompilations >= 1  # of a finished evaluation, read again


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_signal_saves_and_the_evaluation_goes_on_with_the_same_result(tmp_path, with_phase, batch, monkeypatch):
  settings, data, whole = with_phase
  begun, count_hints = [], ttt._count_hints

  def signal_in_batch(*arguments):
    begun.append(1)
    if len(begun) == batch:
      signal.raise_signal(signal.SIGTERM)
    count_hints(*arguments)

  handler = signal.getsignal(signal.SIGTERM)
  with monkeypatch.context() as patch:
    patch.setattr(ttt, "_count_hints", signal_in_batch)
    with pytest.raises(Stopped, match=f"stopped by SIGTERM after batch {batch} of 3"):
      evaluate(settings, data, folder=tmp_path)  # saves are seconds apart: what is there was saved for the signal
  assert signal.getsignal(signal.SIGTERM) is handler
  resumed = evaluate(settings, data, folder=tmp_path)
  np.testing.assert_array_equal(resumed.nll_N, whole.nll_N)
  assert (resumed.times_N == 1).all() and resumed.trace == whole.trace


@pytest.mark.parametrize("mean", [False, True])
def test_a_killed_evaluation_goes_on_with_another_number_of_devices(tmp_path, mean):
  """8 devices of 3 rows, then 4 of 6: every document goes on with the adapters that it would have had."""
  lengths = np.random.default_rng(0).integers(9, 34, 96).tolist()
  data = random_documents(lengths)
  short = sorted(lengths)[47] + 1  # the third and the fourth batch; a length counts the bos that follows
  adapters = {"short__lora": True, "short__doc_len": short, "short__rank": 3, "lora__warm_start_mean": mean}
  settings = changed(SETTINGS, batch_size=24, lora__lr=1e-3, **adapters)
  eight, four = programs_on(settings, 8), programs_on(settings, 4)
  whole = evaluate(settings, data, programs=eight)
  for programs, folder in ((eight, tmp_path / "8"), (four, tmp_path / "4")):  # with a set of each kind to go on with
    evaluate_until_killed(settings, data, folder, after=3, programs=programs)

  on_8, on_4 = (load_file(tmp_path / devices / "state-3.safetensors") for devices in ("8", "4"))
  assert {name.split(".")[0] for name in on_8} == {"full-0", "short-0", "mean"} - ({"mean"} if not mean else set())
  assert set(on_8) == set(on_4)
  for name, rows in on_8.items():
    np.testing.assert_allclose(on_4[name], rows, rtol=0, atol=1e-5, err_msg=name)
    assert mean or not np.allclose(rows[..., :1, :, :], rows[..., 1:2, :, :], atol=1e-2), "documents differ"

  found = evaluate(settings, data, programs=four, folder=tmp_path / "8", save_seconds=0)
  assert found.trace == whole.trace
  assert found.recompilations == 0
  np.testing.assert_allclose(document_means(found, data), document_means(whole, data), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
  ("name", "change"),
  [
    ("settings", lambda s, d: (changed(s, lora__lr=0.02), d)),
    ("settings", lambda s, d: (dataclasses.replace(s, seed=5), d)),
    ("sidecar", lambda s, d: (s, d._replace(token_bytes=d.token_bytes + 1))),
    ("tokens", lambda s, d: (s, d._replace(tokens=d.tokens[:-1]))),
    ("dtype", lambda s, d: (with_train(s, compute_dtype="bfloat16"), d)),
    ("ranks of a global phase", lambda s, d: (with_train(s, world_size=2), d)),
  ],
)
def test_the_identity_of_an_evaluation_names_what_changes_its_result(name, change):
  settings, data, params = changed(SETTINGS, phase__prefix_docs=3), random_documents(LENGTHS[:2]), random_params()

  def marks(settings, data, params=params, is_drawn=True):
    return identify(settings, params, data, settings.train.world_size, 1, is_drawn=is_drawn)

  before, after = marks(settings, data), marks(*change(settings, data))
  assert [key for key in before if before[key] != after[key]] == [name]
  assert marks(settings, data, params | {"skip_weights": params["skip_weights"] + 1})["weights"] != before["weights"]


def test_the_identity_of_an_evaluation_leaves_out_what_does_not():
  data, params = random_documents(LENGTHS[:2]), random_params()
  others = (changed(SETTINGS, enabled=False), with_train(SETTINGS, world_size=2, iterations=7, batch_tokens=1024))
  first, *rest = (identify(s, params, data, s.train.world_size, 1, is_drawn=True) for s in (SETTINGS, *others))
  assert all(marks == first for marks in rest)


def with_train(settings, **changes):
  return dataclasses.replace(settings, train=dataclasses.replace(settings.train, **changes))


def test_a_folder_of_another_evaluation_is_refused(in_a_folder):
  folder, data, _ = in_a_folder
  with pytest.raises(UserError, match="another evaluation"):
    evaluate(dataclasses.replace(SETTINGS, seed=5), data, folder=folder)
