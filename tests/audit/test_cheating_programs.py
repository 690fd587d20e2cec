"""Evaluators that cheat on the devices: ours with one piece of the compiled scan replaced."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from case import Run, first_broken
from ttt_case import SETTINGS, chained_documents, changed

from pgolf_jax.model import Context
from pgolf_jax.model.gpt import bind
from pgolf_jax.scoring import context, scan
from pgolf_jax.scoring.context import Chunk, Ring, Window

ONCE, HINTS, LATER, FULL, FIXED = (
  "every target scored exactly once",
  "hints and tilts recomputed",
  "later tokens change no score",
  "distributions are full",
  "a score is that of a distribution fixed before",
)


def attention_that_is_not_causal(patch):
  def attend(position, q, k, v):
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    p = jax.nn.softmax(jnp.einsum("bthc,bshc->bhts", q, k) * q.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum("bhts,bshc->bthc", p, v), None

  def forward(self, params, adaptation, tokens):
    return bind(self.model, params)(tokens, Context(attend, looping=True, dtype=self.dtype), adaptation).hidden

  patch.setattr(Window, "forward", forward)


def scores_after_the_update(patch):
  def cond(is_step, run, skip, *operands):
    def late(state, *rest):
      moved, _ = run(state, *rest)
      return moved, run(state._replace(learner=moved.learner), *rest)[1]

    return jax.lax.cond(is_step, late, skip, *operands)

  patch.setattr(scan, "lax", SimpleNamespace(**{**vars(jax.lax), "cond": cond}))


def a_tilt_that_does_not_divide(patch):
  patch.setattr(
    scan, "tilt", lambda nll, hint_logp, target, hint, gate, boost: nll - jnp.where(gate & (target == hint), boost, 0)
  )


def a_boost_that_the_target_chooses(patch):
  honest = scan.tilt
  patch.setattr(
    scan,
    "tilt",
    lambda nll, hint_logp, target, hint, gate, boost: honest(
      nll, hint_logp, target, hint, gate, boost * jnp.where(target == hint, 1.5, 0.5)
    ),
  )


def inputs_that_are_the_targets(patch):
  honest = Chunk.tokens_from

  def tokens_from(self, first, count):
    is_input = count > 8  # a window; targets are asked for a chunk at a time
    return honest(self, first + 1 if is_input else first, count)

  patch.setattr(Chunk, "tokens_from", tokens_from)


def lower_scores_where_the_model_is_right(patch):
  honest = scan.score

  def score(spec, params, logits, chunk, *rest):
    scored = honest(spec, params, logits, chunk, *rest)
    is_right = logits.argmax(axis=-1) == chunk.targets(logits.shape[1])
    factor = jnp.where(is_right, 0.9, 1.0)
    return scored._replace(model_nll=scored.model_nll * factor, nll=scored.nll * factor)

  patch.setattr(scan, "score", score)


def logits_that_know_their_target(patch):
  """Everything that is returned agrees: the distribution is full, and the score is that of the target in it."""
  honest = scan.score

  def score(spec, params, logits, chunk, *rest):
    target = jax.nn.one_hot(chunk.targets(logits.shape[1]), logits.shape[2], dtype=logits.dtype)
    return honest(spec, params, logits + 0.3 * target, chunk, *rest)

  patch.setattr(scan, "score", score)


def a_temperature_chosen_by_the_target(patch):
  honest = scan.score

  def score(spec, params, logits, chunk, *rest):
    target = jnp.take_along_axis(logits, chunk.targets(logits.shape[1])[..., None], axis=-1)
    is_right = (logits > target).sum(axis=-1) < 8
    return honest(spec, params, logits * jnp.where(is_right, 1.5, 0.8)[..., None], chunk, *rest)

  patch.setattr(scan, "score", score)


def the_token_before_is_one_of_the_future(patch):
  honest = Context

  def future(attend, **rest):
    if rest.get("before_B") is not None:
      rest["before_B"] = FUTURE[0]
    return honest(attend, **rest)

  def hidden(self, params, adaptation, memory, chunk, shape):
    FUTURE[0] = chunk.tokens_from(chunk.first + chunk.size + 2, 1)[:, 0]
    return honest_hidden(self, params, adaptation, memory, chunk, shape)

  honest_hidden = Ring.hidden
  patch.setattr(context, "Context", future)
  patch.setattr(Ring, "hidden", hidden)


FUTURE = [None]


def keys_and_values_of_a_later_pass(patch):
  """The ring already holds the chunk's own keys and values when the chunk is scored, and lets it see them."""
  honest_hidden, honest_attention = Ring.hidden, context.chunk_attention

  def hidden(self, params, adaptation, memory, chunk, shape):
    _, fresh = honest_hidden(self, params, adaptation, memory, chunk, shape)
    patch.setattr(context, "chunk_attention", later)
    try:
      return honest_hidden(self, params, adaptation, self.remember(memory, fresh, chunk), chunk, shape)
    finally:
      patch.setattr(context, "chunk_attention", honest_attention)

  def later(q, k, v, ring, place, **options):
    return honest_attention(q, k, v, ring, place._replace(first=place.first + place.size), **options)

  patch.setattr(Ring, "hidden", hidden)


# Documents of one shape, and no phases: little to compile.
DATA = chained_documents([40, 39, 38, 37, 40])
STRICT = changed(SETTINGS, batch_size=2)
CACHED = changed(STRICT, method="cached", chunk_size=7)
CHEATS = {
  attention_that_is_not_causal: (STRICT, (LATER,)),
  scores_after_the_update: (STRICT, (LATER,)),
  a_tilt_that_does_not_divide: (STRICT, (ONCE,)),
  a_boost_that_the_target_chooses: (STRICT, (HINTS,)),
  inputs_that_are_the_targets: (STRICT, (FIXED,)),
  lower_scores_where_the_model_is_right: (STRICT, (FIXED, HINTS, FULL)),
  logits_that_know_their_target: (STRICT, (FIXED,)),
  a_temperature_chosen_by_the_target: (STRICT, (FIXED,)),
  the_token_before_is_one_of_the_future: (CACHED, (LATER,)),
  keys_and_values_of_a_later_pass: (CACHED, (LATER,)),
}


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda cheat: cheat.__name__)
def test_a_cheat_is_caught(cheat, monkeypatch, tmp_path):
  settings, names = CHEATS[cheat]
  cheat(monkeypatch)
  run = Run(settings, DATA)
  reported = run.score(tmp_path)
  broken = first_broken(run.checks(tmp_path, reported))
  assert broken is not None and broken.name in names, broken
