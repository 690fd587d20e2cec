"""Generation: the model's own distribution, in pieces, as ordinary text."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import MODEL, SETTINGS, random_params

from pgolf_jax.data import caseops
from pgolf_jax.errors import UserError
from pgolf_jax.model.generate import Sampling, generate, next_logits, sample
from pgolf_jax.model.gpt import bind, packed_nll


class Letters:
  """A tokenizer of single characters: token 8 + i is the i-th of ALPHABET."""

  ALPHABET = "".join(caseops.MARKERS) + "abcdefghijklmnopqrstuvwxyz .,!?\n'-ABC"
  vocab_size = MODEL.vocab_size

  def encode(self, text):
    return np.array([8 + self.ALPHABET.index(c) for c in text])

  def decode(self, tokens):
    return "".join(self.ALPHABET[(t - 8) % len(self.ALPHABET)] for t in tokens if t > 7)


@pytest.fixture(scope="module")
def params():
  return {name: jnp.asarray(value) for name, value in random_params().items()}


def test_logits_are_the_evaluation_distribution(params):
  step = next_logits(MODEL, jnp.float32)
  tokens = np.array([1, 20, 30, 40, 50, 11], np.int32)
  logits = step(params, tokens[:-1])
  nll = jax.jit(
    lambda params: packed_nll(
      bind(MODEL, params), jnp.asarray(tokens)[None], looping=True, seq_len=8, evaluation=True, dtype=jnp.float32
    )
  )(params)
  generated_nll = np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[tokens[-1]]
  assert generated_nll == pytest.approx(float(nll[0, -1]), rel=1e-4)


def run(params, prompt="Go on", *, context=256, data=None, tokenizer=None, **sampling):
  settings = dataclasses.replace(
    SETTINGS,
    eval=dataclasses.replace(SETTINGS.eval, seq_len=context),
    data=dataclasses.replace(SETTINGS.data, **(data or {})),
  )
  drawn = Sampling(**({"tokens": 30, "temperature": 0.9, "top_p": 0.95, "seed": 5} | sampling))
  return list(generate(settings, params, tokenizer or Letters(), prompt, drawn))


def test_same_seed_same_text(params):
  assert run(params) == run(params)
  assert run(params) != run(params, seed=6)
  assert run(params, temperature=0.0, seed=1) == run(params, temperature=0.0, seed=2)


def test_pieces_make_up_the_text_without_markers(params):
  pieces = run(params, tokens=60)
  assert all(pieces)
  assert not set("".join(pieces)) & set(caseops.MARKERS)
  raw = "".join(run(params, tokens=60, data={"caseops": False}, prompt="go on"))
  assert set(raw) & set(caseops.MARKERS)  # as the model wrote them


@pytest.mark.parametrize("form, seen", [("published", " {0}go {1}on"), ("before-space", "{0} go{1} on")])
def test_prompt_and_continuation_are_of_the_form_that_the_model_knows(params, monkeypatch, form, seen):
  written = caseops.encode(" the Man of NASA, a McKay", form)
  prompts = []

  def next_logits(config, dtype):
    def logits(params, tokens_T):
      prompts.append(Letters().decode(tokens_T))
      logits_V = np.zeros(MODEL.vocab_size)
      logits_V[Letters().encode(written)[len(prompts) - 1]] = 1
      return logits_V

    return logits

  monkeypatch.setattr(sys.modules[generate.__module__], "next_logits", next_logits)
  pieces = run(params, " Go ON", data={"caseops_markers": form}, tokens=len(written), temperature=0)
  assert "".join(pieces) == " the Man of NASA, a McKay"
  assert prompts[0] == seen.format(caseops.TITLE, caseops.ALLCAPS)


def test_only_the_context_is_seen(params):
  assert run(params, "aaaa bbbb", context=4, temperature=0.0) == run(params, "cccc bbbb", context=4, temperature=0.0)


def test_sampling_keeps_to_the_nucleus():
  logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
  rng = np.random.default_rng(0)
  drawn = [sample(logits, rng, temperature=1.0, top_p=0.75) for _ in range(4000)]
  share = np.bincount(drawn, minlength=4) / 4000
  np.testing.assert_allclose(share, [0.625, 0.375, 0, 0], atol=0.03)
  assert {sample(logits, rng, temperature=0.0, top_p=1.0) for _ in range(10)} == {0}
  cold = [sample(logits, rng, temperature=0.25, top_p=1.0) for _ in range(2000)]
  assert np.mean(np.array(cold) == 0) == pytest.approx(0.5**4 / (0.5**4 + 0.3**4 + 0.15**4 + 0.05**4), abs=0.03)


@pytest.mark.parametrize("changes", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"tokens": -1}])
def test_impossible_numbers_are_refused(params, changes):
  with pytest.raises(UserError, match="must be"):
    run(params, **changes)


def test_a_tokenizer_of_another_size_is_refused(params):
  class Other(Letters):
    vocab_size = 100

  with pytest.raises(UserError, match="100 pieces, the model 320"):
    run(params, tokenizer=Other())
