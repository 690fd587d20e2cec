"""What must hold of test-time training whatever the model: once, causal, the same however the work is laid out."""

import dataclasses

import jax
import numpy as np
import pytest
from ttt_case import SETTINGS, changed, random_documents, random_params

from pgolf_jax.data.validation import ValidationData
from pgolf_jax.errors import UserError
from pgolf_jax.runtime.mesh import data_mesh
from pgolf_jax.scoring import ttt
from pgolf_jax.scoring.documents import find_documents
from pgolf_jax.scoring.record import Record
from pgolf_jax.scoring.trace import WeightsEvent, find_cycle

LENGTHS = [30, 9, 75, 41, 22, 60, 14, 33]


def evaluate(settings, data, *, devices=1, params=None, **options):
  mesh = data_mesh(jax.devices()[:devices])
  return ttt.evaluate(settings, params or random_params(), data, mesh, ttt.Options(**options))


def test_every_target_is_scored_once():
  data = random_documents(LENGTHS)
  found = evaluate(SETTINGS, data)
  assert (found.times_N == 1).all()
  assert found.score.targets == len(data.tokens) - 1
  assert found.score.text_bytes == data.token_bytes[1:].sum()
  assert found.gate_N.any()
  assert found.recompilations == 0


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
  many = evaluate(settings, data, devices=devices)
  np.testing.assert_allclose(document_means(many, data), document_means(one, data), rtol=0, atol=1e-6)
  np.testing.assert_allclose(many.score.bpb, one.score.bpb, rtol=0, atol=1e-6)


def test_learning_and_hints_help_on_a_repeating_text():
  rng = np.random.default_rng(0)
  loops = [np.append(SETTINGS.model.bos_id, np.tile(rng.integers(2, 48, 5), 24)) for _ in range(4)]
  tokens = np.concatenate(loops).astype(np.int32)
  data = ValidationData(tokens, np.ones_like(tokens))
  still, moving = (evaluate(changed(SETTINGS, lora__lr=lr), data) for lr in (0.0, 0.01))
  assert moving.untilted.bpb < 0.9 * still.untilted.bpb
  assert moving.score.bpb < 0.9 * moving.untilted.bpb


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


def test_strict_order_is_acyclic_and_reference_order_is_not():
  data = random_documents(LENGTHS)
  settings = changed(SETTINGS, phase__prefix_docs=5)
  strict = evaluate(settings, data)
  reference = evaluate(changed(settings, order="reference"), data)
  assert find_cycle(strict.trace) is None
  assert find_cycle(reference.trace)
  assert not np.allclose(strict.nll_N, reference.nll_N)


class Killed(Exception):
  pass


@pytest.mark.parametrize("after", [1, 2])
def test_a_killed_evaluation_goes_on_with_the_same_result(tmp_path, monkeypatch, after):
  data = random_documents(LENGTHS)
  settings = changed(SETTINGS, phase__prefix_docs=5)
  whole = evaluate(settings, data)

  saves = []

  def save(self, *arguments, original=Record.save):
    original(self, *arguments)
    saves.append(arguments)
    if len(saves) == after:
      raise Killed

  monkeypatch.setattr(Record, "save", save)
  with pytest.raises(Killed):
    evaluate(settings, data, folder=tmp_path, save_seconds=0)
  monkeypatch.undo()
  found = evaluate(settings, data, folder=tmp_path, save_seconds=0)
  np.testing.assert_array_equal(found.nll_N, whole.nll_N)
  assert (found.times_N == 1).all()
  assert found.trace == whole.trace
  for name, value in whole.params.items():
    np.testing.assert_array_equal(found.params[name], value, err_msg=name)


def test_a_folder_of_another_evaluation_is_refused(tmp_path):
  data = random_documents(LENGTHS[:2])
  evaluate(SETTINGS, data, folder=tmp_path)
  with pytest.raises(UserError, match="another evaluation"):
    evaluate(dataclasses.replace(SETTINGS, seed=5), data, folder=tmp_path)
