"""Every rule of scoring, with an evaluator that breaks it (our own with one line changed) or scores that do."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ttt_case import SETTINGS, changed, random_documents, random_params

from pgolf_jax import audit
from pgolf_jax.audit import acyclic, probes
from pgolf_jax.data.shards import ValidationData
from pgolf_jax.errors import checks_table
from pgolf_jax.model import Context
from pgolf_jax.model.gpt import bind
from pgolf_jax.runtime.distributed import data_mesh
from pgolf_jax.scoring import buckets, scan, ttt
from pgolf_jax.scoring.context import Window
from pgolf_jax.scoring.hints import HintStream
from pgolf_jax.scoring.record import ScoreEvent, WeightsEvent

DATA = random_documents([40, 31, 52, 36, 45])
FUTURE, TARGET, NORMAL, ONCE = range(4)


def make_evaluate(settings=None):
  settings = settings or changed(SETTINGS, phase__prefix_docs=3, batch_size=2)
  mesh, params = data_mesh(jax.devices()[:1]), random_params()
  programs = ttt.Programs(settings, mesh, distributions=True)

  def evaluate(tokens, folder=None):
    options = ttt.Options(folder, distributions=True)
    return ttt.evaluate(settings, params, ValidationData(tokens, DATA.token_bytes), mesh, options, programs)

  return evaluate


@pytest.fixture(scope="module")
def compiled():
  return make_evaluate()


@pytest.fixture(scope="module")
def scored(compiled, tmp_path_factory):
  """A run's folder of scores, by the evaluator that is compiled already."""
  folder = tmp_path_factory.mktemp("scores")
  compiled(DATA.tokens, folder)
  return folder


def run(evaluate):
  model = SETTINGS.model
  return probes.run(evaluate, DATA.tokens, bos_id=model.bos_id, vocab_size=model.vocab_size, probes=4)


def test_our_evaluator_passes(compiled):
  checks = run(compiled)
  assert [check.passed for check in checks] == [True] * 4, checks_table(checks)
  assert "with an open gate" in checks[TARGET].finding and " 0 of them" not in checks[TARGET].finding


def test_a_future_leak_is_caught(monkeypatch):
  def attend(position, q, k, v):
    """Attention that forgets to be causal."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    p = jax.nn.softmax(jnp.einsum("bthc,bshc->bhts", q, k) * q.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum("bhts,bshc->bthc", p, v), None

  def forward(self, params, adaptation, tokens):
    context = Context(attend, looping=True, dtype=self.dtype)
    return bind(self.model, params)(tokens, context, adaptation).hidden

  monkeypatch.setattr(Window, "forward", forward)
  checks = run(make_evaluate())
  assert not checks[FUTURE].passed


def test_scoring_after_the_update_is_caught(monkeypatch):
  def switch(kind, branches, *operands):
    skip, score, learn = branches

    def late(state, *rest):
      moved, _ = learn(state, *rest)
      return moved, score(state._replace(learner=moved.learner), *rest)[1]

    return jax.lax.switch(kind, (skip, score, late), *operands)

  monkeypatch.setattr(scan, "lax", SimpleNamespace(**{**vars(jax.lax), "switch": switch}))
  checks = run(make_evaluate())
  assert not checks[FUTURE].passed
  assert not checks[TARGET].passed


def test_a_target_gated_hint_is_caught(compiled, monkeypatch):
  honest = HintStream.add

  def add(self, document):
    found = honest(self, document)
    gate = found.gate & (found.ids == document[1:])
    return dataclasses.replace(found, ids=found.ids * gate, gate=gate)

  monkeypatch.setattr(HintStream, "add", add)
  assert not run(compiled)[TARGET].passed


def test_an_unnormalised_tilt_is_caught(monkeypatch):
  def tilt(nll, hint_logp, target, hint, gate, boost):
    """A tilt that forgets to divide by the new total."""
    return nll - jnp.where(gate & (target == hint), boost, 0)

  monkeypatch.setattr(scan, "tilt", tilt)
  checks = run(make_evaluate())
  assert not checks[NORMAL].passed
  assert [check.passed for check in checks if check is not checks[NORMAL]] == [True] * 3


def test_a_score_that_is_not_the_distributions_is_caught(compiled):
  def kinder(tokens):
    found = compiled(tokens)
    return dataclasses.replace(found, nll_N=found.nll_N * 0.999)

  assert not run(kinder)[NORMAL].passed


def test_a_token_scored_twice_is_caught(compiled, monkeypatch):
  honest = buckets.steps
  monkeypatch.setattr(
    buckets, "steps", lambda *arguments: [s for s in honest(*arguments) for _ in range(1 + (s.k == 1))]
  )
  assert not run(compiled)[ONCE].passed


def test_a_token_left_out_is_caught(compiled, monkeypatch):
  def scored(tokens):
    found = compiled(tokens)
    found.times_N[7] = 0
    return found

  assert not run(scored)[ONCE].passed


def test_counts_of_documents_that_come_later_are_not_acyclic(compiled):
  documents = 5
  strict = compiled(DATA.tokens).trace
  assert acyclic(strict, documents).passed
  settings = changed(SETTINGS, phase__prefix_docs=3, batch_size=2, order="reference")
  found = acyclic(make_evaluate(settings)(DATA.tokens).trace, documents)
  assert not found.passed and "not acyclic" in found.finding


def test_documents_scored_twice_or_never_are_caught():
  score = ScoreEvent(batch=0, documents=(0, 1, 1), weights=0, adapters="0", carried=0)
  assert not acyclic([score], 2).passed
  assert not acyclic([dataclasses.replace(score, documents=(0,))], 2).passed
  assert acyclic([dataclasses.replace(score, documents=(0, 1))], 2).passed


def test_weights_that_saw_a_document_before_its_score_are_caught():
  score = ScoreEvent(batch=0, documents=(0,), weights=1, adapters="0", carried=0)
  trained = WeightsEvent(version=1, documents=(0,))
  assert "weights 1" in acyclic([trained, score], 1).finding


def by_name(checks):
  return {check.name: check.passed for check in checks}


def test_scores_of_a_run_hold(scored):
  assert set(by_name(audit.scores(scored, DATA, SETTINGS)).values()) == {True}


def test_a_target_scored_twice_in_the_run_is_caught(scored, tmp_path):
  shutil.copytree(scored, tmp_path, dirs_exist_ok=True)
  times = np.load(tmp_path / "times.npy")
  times[11] = 2
  np.save(tmp_path / "times.npy", times)
  assert not by_name(audit.scores(tmp_path, DATA, SETTINGS))["every target scored exactly once"]


def test_a_wrong_sidecar_is_caught_by_the_bytes_of_the_score(scored):
  data = DATA._replace(token_bytes=DATA.token_bytes + (np.arange(len(DATA.tokens)) == 9))
  assert not by_name(audit.scores(scored, data, SETTINGS))["bytes of the score"]


def test_a_trace_with_a_later_document_in_the_counts_is_caught(scored, tmp_path):
  shutil.copytree(scored, tmp_path, dirs_exist_ok=True)
  events = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
  score = next(event for event in events if event["event"] == "score")
  weights = {"event": "weights", "version": 1, "documents": score["documents"]}
  (tmp_path / "trace.jsonl").write_text("".join(json.dumps(e) + "\n" for e in [{**score, "weights": 1}, weights]))
  assert not by_name(audit.scores(tmp_path, DATA, SETTINGS))["one order explains every score"]
