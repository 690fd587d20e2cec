"""The byte sidecar: the published figures exactly, sums that are the text's, and what a normalising tokenizer loses."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pgolf_jax.data import caseops
from pgolf_jax.data.encode import token_bytes
from pgolf_jax.data.shards import BOS, load_validation, shard_path, write_shard
from pgolf_jax.data.sidecar import write_sidecar
from pgolf_jax.data.tokenizer import Tokenizer, train_tokenizer
from pgolf_jax.errors import UserError

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
texts = st.one_of(
  st.text(st.characters(exclude_categories=["Cs"]), max_size=50),
  st.text(st.sampled_from([*" \n▁aBé日😀", *caseops.MARKERS]), max_size=30),
)


def test_golden_case(golden, published_tokenizer):
  tokenizer = Tokenizer.load(published_tokenizer)
  docs = (golden("caseops") / "docs.jsonl").read_text().splitlines()
  expected = (golden("caseops") / "expected.jsonl").read_text().splitlines()
  assert len(docs) == len(expected) > 0
  for doc, line in zip(docs, expected, strict=True):
    text, want = json.loads(doc)["text"], json.loads(line)
    coded = caseops.encode(text)
    tokens_N = tokenizer.encode(coded)
    bytes_N = token_bytes(tokenizer, coded, tokens_N)
    assert coded == want["caseops"]
    assert tokens_N.tolist() == want["ids"]
    assert bytes_N.tolist() == want["bytes"]
    assert (len(text.encode()), bytes_N.sum()) == (want["utf8_bytes"], want["sum_bytes"])


both_forms = pytest.mark.parametrize("form", ["published", "before-space"])


@both_forms
@relaxed
@given(text=texts)
@example(text=caseops.ESC + " A" + caseops.TITLE)
def test_lossless_bytes_add_up_to_the_text(lossless, form, text):
  coded = caseops.encode(text, form)
  bytes_N = token_bytes(lossless, coded, lossless.encode(coded))
  assert bytes_N.dtype == np.uint16 and bytes_N.sum() == len(text.encode())


@relaxed
@given(texts)
def test_without_caseops_markers_count_like_any_character(lossless, text):
  bytes_N = token_bytes(lossless, text, lossless.encode(text), is_caseops=False)
  assert bytes_N.sum() == len(text.encode())


@both_forms
@relaxed
@given(text=texts.map(lambda text: text.replace("▁", "")))
def test_normalising_tokenizer_loses_the_white_space_at_the_ends_alone(normalising, form, text):
  text = f"x{text}y"
  coded = caseops.encode(f"  {text} \n", form)
  assert token_bytes(normalising, coded, normalising.encode(coded)).sum() == len(text.encode())


def test_white_space_that_is_dropped_inside_counts_with_the_word_after_it(normalising):
  coded = caseops.encode("a \n\n b")
  assert token_bytes(normalising, coded, normalising.encode(coded)).sum() == 6


def test_markers_count_nothing_and_escaped_markers_their_own(lossless):
  coded = caseops.encode(f"No{caseops.TITLE}")
  tokens_N = lossless.encode(coded)
  by_token = list(zip(tokens_N.tolist(), token_bytes(lossless, coded, tokens_N).tolist(), strict=True))
  assert by_token[0] == (4, 0)
  assert by_token[-2:] == [(7, 0), (4, 3)]


def test_a_marker_before_a_space_counts_nothing_and_the_word_keeps_its_pieces(lossless):
  lower, capital = (lossless.encode(caseops.encode(text, "before-space")) for text in ("in the law", "in The law"))
  at = len(lossless.encode("in"))
  assert capital.tolist() == [*lower[:at], 4, *lower[at:]]
  bytes_N = token_bytes(lossless, caseops.encode("in The law", "before-space"), capital)
  assert bytes_N[at] == 0 and bytes_N.sum() == 10
  assert len(lossless.encode(caseops.encode("in The law"))) == len(capital) + 1


def test_a_token_of_too_many_bytes_is_refused(normalising):
  text = "a" + " " * 70_000 + "b"
  with pytest.raises(UserError, match=r"70001 bytes.*65535"):
    token_bytes(normalising, text, normalising.encode(text))


@pytest.mark.parametrize("kind", ["lossless", "published", "with a space in front"])
def test_a_sidecar_of_plain_text_comes_from_its_pieces(tmp_path, train_other, speeches, kind):
  """The text has nothing to normalise, so that the recipe's bytes are those of the pieces."""
  if kind == "lossless":
    tokenizer = train_tokenizer(speeches, 600, is_caseops=False)
  else:
    tokenizer = train_other(model_type="bpe", byte_fallback=True, add_dummy_prefix=kind != "published")
  texts = ["The USA's law: naive, 漢字 and 🙂 end.", "of 1,000 men", "漢 is first", " led by a space"]
  texts = texts[: 4 if kind == "lossless" else 3]  # the others drop it
  tokens = [tokenizer.encode(text) for text in texts]
  expected = [
    np.append([0], token_bytes(tokenizer, text, of, is_caseops=False)) for text, of in zip(texts, tokens, strict=True)
  ]
  stream, bytes_N = np.concatenate([np.append([BOS], of) for of in tokens]), np.concatenate(expected)
  for index, part in enumerate(np.split(stream, [len(tokens[0]) // 2])):  # a document goes on in the next shard
    write_shard(shard_path(tmp_path, "val", index), part)
  write_sidecar(tmp_path, tokenizer)
  np.testing.assert_array_equal(load_validation(tmp_path).token_bytes, bytes_N)
  assert bytes_N.sum() == sum(len(text.encode()) for text in texts)
