"""Hints in both orders through the text, against the published outputs and against each other."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from pgolf_jax.kernels.ngram.reference import NgramModel
from pgolf_jax.scoring.hints import HintStream, build_hints, kinds
from pgolf_jax.settings import HintConfig
from pgolf_jax.settings.load import from_env

BOS = 1


def documents(count=40, seed=0):
  """Documents of 0 to 60 targets with much repetition; each ends with the next one's first token, the last does not."""
  rng = np.random.default_rng(seed)
  bodies = [np.resize(rng.integers(2, 5, rng.integers(1, 9)), rng.integers(1, 60)) for _ in range(count)]
  stream = np.concatenate([[BOS, *body] for body in bodies]).astype(np.uint16)
  starts = np.flatnonzero(stream == BOS)
  return stream, [stream[a : b + 1] for a, b in zip(starts, [*starts[1:], len(stream)], strict=True)]


def equal(a, b):
  return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("ids", "gate", "boost"))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", ["ngram", "ttt"])
def test_reference_order_gives_the_published_hints(golden, kind, threads):
  case = json.loads((golden(kind) / "case.json").read_text())["settings"]
  targets = load_file(golden(kind) / "inputs.safetensors")["tokens"][1:]
  expected = load_file(golden(kind) / "expected.safetensors")
  config = dataclasses.replace(from_env(case).hints, table="reference")
  hints = build_hints(targets, config, threads=threads)
  assert expected["gate_mask"].any()
  np.testing.assert_array_equal(hints.ids, expected["hint_ids"])
  np.testing.assert_array_equal(hints.gate, expected["gate_mask"])
  np.testing.assert_array_equal(hints.boost, expected["gate_mask"] * np.float32(case["TOKEN_BOOST"]))
  if "boost" in expected:
    np.testing.assert_array_equal(hints.boost, expected["boost"])
  assert (hints.ids.dtype, hints.gate.dtype, hints.boost.dtype) == (np.int32, np.bool_, np.float32)


def test_boost_and_hint_are_zero_where_the_gate_is_shut():
  stream, _ = documents()
  hints = build_hints(stream[1:], HintConfig(order=3, threshold=0.7, boost=2.5), seed_token=BOS)
  loose = build_hints(stream[1:], HintConfig(order=3, threshold=1e-9, boost=2.5), seed_token=BOS)
  assert 0 < hints.gate.sum() < loose.gate.sum()
  assert not hints.ids[~hints.gate].any()
  np.testing.assert_array_equal(hints.boost, np.where(hints.gate, np.float32(2.5), 0))


def test_the_seed_is_the_first_target_or_the_true_first_token():
  targets = np.array([5, 6, 5, 5, 6, 9, 5, 6], np.int32)
  config = HintConfig(order=3, threshold=0.5, boost=1.0, table="reference")
  published = build_hints(targets, config)
  true = build_hints(targets, config, seed_token=9)
  # (5, 6) came before at position 5 either way; (5, 5) at position 4 only where the first target stands twice,
  # and (9, 5) at position 7 only where the true first token stands in front.
  np.testing.assert_array_equal(np.flatnonzero(published.gate), [4, 5])
  np.testing.assert_array_equal(published.ids[[4, 5]], [6, 5])
  np.testing.assert_array_equal(np.flatnonzero(true.gate), [5, 7])
  np.testing.assert_array_equal(true.ids[[5, 7]], [5, 6])


@pytest.mark.parametrize("table", ["exact", "reference"])
def test_documents_in_text_order_get_the_hints_of_one_pass(table):
  stream, docs = documents()
  config = HintConfig(order=4, threshold=0.6, boost=2.0, table=table)
  whole = build_hints(stream[1:], config, seed_token=BOS, vocab_size=8)
  by_document = HintStream(config, 8)
  parts = [by_document.add(document) for document in docs]
  assert [len(part.ids) for part in parts] == [len(document) - 1 for document in docs]
  for name in ("ids", "gate", "boost"):
    np.testing.assert_array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(whole, name))


def test_strict_order_never_looks_at_later_documents():
  _, docs = documents()
  _, others = documents(seed=1)
  config = HintConfig(order=4, threshold=0.6, boost=2.0)
  first, second = HintStream(config, 8), HintStream(config, 8)
  cut = len(docs) // 2
  for document in docs[:cut]:
    assert equal(first.add(document), second.add(document))
  differ = [not equal(first.add(a), second.add(b)) for a, b in zip(docs[cut:], others[cut:], strict=True)]
  assert any(differ)


def test_a_document_sees_its_own_first_token_after_one_that_does_not_end_with_it():
  """In an order of its own, the text's last document comes before others, and no bos closes it."""
  _, docs = documents()
  order = [len(docs) - 1, *np.random.default_rng(2).permutation(len(docs) - 1)]
  stream = HintStream(HintConfig(order=3, threshold=0.5, boost=1.0), 8)
  model = NgramModel(3, threshold=0.5)
  for i in order:
    if i == order[0] or i == order[1]:
      model.seed(docs[i][:1])  # nothing before it, or the last target before it was no bos
    hint, gate = model.update(docs[i][1:])
    got = stream.add(docs[i])
    np.testing.assert_array_equal(got.gate, gate)
    np.testing.assert_array_equal(got.ids, np.where(gate, hint, 0))


def test_a_restarted_evaluation_goes_on_where_it_stopped():
  _, docs = documents()
  config = HintConfig(order=4, threshold=0.6, boost=2.0)
  unbroken, restarted = HintStream(config, 8), HintStream(config, 8)
  expected = [unbroken.add(document) for document in docs]
  for document in docs[:17]:
    restarted.add(document)
  assert all(equal(restarted.add(d), e) for d, e in zip(docs[17:], expected[17:], strict=True))


def test_a_threshold_of_zero_gates_everything_in_the_published_procedure():
  targets = np.array([5, 6, 7, 5, 6], np.int32)
  published = build_hints(targets, HintConfig(order=2, threshold=0.0, boost=1.5, table="reference"))
  assert published.gate.all() and published.ids.tolist() == [0, 5, 0, 0, 5]
  exact = build_hints(targets, HintConfig(order=2, threshold=0.0, boost=1.5))
  assert exact.gate.tolist() == [False, True, False, False, True]


def test_no_targets_no_hints():
  assert len(build_hints(np.zeros(0, np.uint16), HintConfig()).ids) == 0


def test_the_longest_ngram_that_has_a_hint_gives_it():
  _, docs = documents()
  orders = (6, 4, 2)
  config = HintConfig(order=6, backoff=(4, 2), threshold=0.6, strength="mixture")
  together = HintStream(config, 8)
  alone = [HintStream(dataclasses.replace(config, order=order, backoff=()), 8) for order in orders]
  came_from = set()
  for document in docs:
    got, each = together.add(document), [stream.add(document) for stream in alone]
    for i in range(len(got.ids)):
      first = next((place for place, hints in enumerate(each) if hints.gate[i]), None)
      came_from.add(first)
      assert got.gate[i] == (first is not None)
      assert got.ids[i] == (0 if first is None else each[first].ids[i])
      assert got.kind[i] == (0 if first is None else each[first].kind[i] + first * kinds(config) // len(orders))
  assert came_from == {None, 0, 1, 2} and kinds(config) == 48


def test_kinds_tell_how_sure_an_ngram_is():
  """After 2 comes 3 always; after 4 comes 5 two times of three."""
  text = np.array([BOS, 2, 3, 4, 5, 2, 3, 4, 6, 2, 3, 4, 5, 2, 3, 4, 5], np.int32)
  hints = HintStream(HintConfig(order=2, threshold=0.0, strength="mixture"), 8).add(text)
  # The classes of experience begin at 1, 2, 4 and 12 earlier occurrences, those of confidence at 0, 35, 65 and 99.9 %.
  assert (hints.ids[-1], hints.kind[-1]) == (5, 2 * 4 + 1) and (hints.ids[-3], hints.kind[-3]) == (3, 3 * 4 + 1)
