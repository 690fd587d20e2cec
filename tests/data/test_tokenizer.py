"""Tokenizers: their kind, text back from tokens, and the same pieces as SentencePiece itself gives."""

import pickle

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_pb2

from pgolf_jax.data import caseops
from pgolf_jax.data import tokenizer as tokenizer_module
from pgolf_jax.data.corpus import Position, open_corpus
from pgolf_jax.data.tokenizer import Tokenizer, train_tokenizer
from pgolf_jax.errors import UserError

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
spacey_text = st.text(
  st.sampled_from([*" \t\n\ru▁aB,é\u00a0", *caseops.MARKERS, "\0", "\ufffd", "ﬁ", "日"]), max_size=30
)
english = st.lists(st.sampled_from([" the", " of", "\n\n", "  ", "Congress", " WAR", ".", " 1898", "’s", "("])).map(
  "".join
)
texts = st.one_of(any_text, spacey_text, english)


def direct(tokenizer: Tokenizer) -> sentencepiece.SentencePieceProcessor:
  return sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)


def test_trained_tokenizer_has_the_recipes_layout(lossless):
  sp = direct(lossless)
  assert [sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()] == [0, 1, 2, 3]
  assert [sp.id_to_piece(i) for i in range(4, 8)] == list(caseops.MARKERS)
  assert [sp.id_to_piece(i) for i in (8, 263)] == ["<0x00>", "<0xFF>"]
  assert lossless.vocab_size == 600 and lossless.kind == "lossless" and lossless.has_caseops
  assert len(sp.encode("1898")) == 4  # no piece joins digits


def test_training_is_deterministic(lossless, speeches):
  assert train_tokenizer(map(caseops.encode, speeches), 600).model == lossless.model


def test_training_without_caseops(speeches):
  tokenizer = train_tokenizer(speeches, 500, is_caseops=False)
  assert not tokenizer.has_caseops and direct(tokenizer).id_to_piece(4) == "<0x00>"


@relaxed
@given(texts)
@example(" leading and trailing ")
@example("a\r\n\n\n   b\t\t▁ ▁▁c\n")
@example("\0")
def test_lossless_tokenizer_gives_every_text_back(lossless, text):
  tokens_N = lossless.encode(caseops.encode(text))
  assert tokens_N.dtype == np.uint16
  decoded = caseops.decode(lossless.decode(tokens_N))
  assert decoded.encode() == text.encode()


@relaxed
@given(texts.filter(lambda text: "▁" not in text))
def test_same_pieces_as_sentencepiece_lossless(lossless, text):
  assert lossless.encode(text).tolist() == direct(lossless).encode(text)


@relaxed
@given(texts)
def test_same_pieces_as_sentencepiece_normalising(normalising, text):
  assert normalising.encode(text).tolist() == direct(normalising).encode(text)


OTHERS = {
  "dummy prefix": {"model_type": "bpe", "byte_fallback": True},
  "unigram": {"model_type": "unigram", "byte_fallback": True},
  "no byte fallback": {"model_type": "bpe"},
  "words across spaces": {"model_type": "bpe", "split_by_whitespace": False},
  "space behind": {"model_type": "bpe", "treat_whitespace_as_suffix": True},
}


@pytest.fixture(scope="module", params=OTHERS)
def other(request, train_other):
  return train_other(**OTHERS[request.param])


@relaxed
@given(texts)
def test_any_sentencepiece_model_loads_and_encodes(other, text):
  assert other.kind == "normalising"
  assert other.encode(text).tolist() == direct(other).encode(text)


@relaxed
@given(texts)
@example("a  b\n\nc\td ")
@example("ﬁ½ e\u0301 日本 ")
def test_surfaces_are_sentencepieces_own(other, normalising, text):
  for tokenizer in (other, normalising):
    proto = sentencepiece_pb2.SentencePieceText.FromString(direct(tokenizer).encode(text, out_type="serialized_proto"))
    begin_N, end_N = tokenizer.surfaces(text, tokenizer.encode(text))
    expected = [piece.surface for piece in proto.pieces]
    assert [text[a:b] for a, b in zip(begin_N, end_N, strict=True)] == expected


@relaxed
@given(texts)
def test_surfaces_of_a_lossless_tokenizer_cover_the_text(lossless, text):
  begin_N, end_N = lossless.surfaces(text, lossless.encode(text))
  assert "".join(text[a:b] for a, b in zip(begin_N, end_N, strict=True)) == text


def test_surfaces_refuse_tokens_of_another_text(lossless):
  with pytest.raises(UserError, match="not this tokenizer's pieces"):
    lossless.surfaces("one text", lossless.encode("another"))


def test_published_tokenizer_is_recognised(published_tokenizer):
  tokenizer = Tokenizer.load(published_tokenizer)
  assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.has_caseops) == ("normalising", 8192, True)
  assert tokenizer.decode(tokenizer.encode("a  b\n\nc")) == "a b c"


def test_published_tokenizer_pieces_on_web_text(published_tokenizer, corpus):
  tokenizer = Tokenizer.load(published_tokenizer)
  sp = direct(tokenizer)
  for position, document, _ in open_corpus(corpus / "web_train.jsonl.zst").read(Position()):
    if position.document == 100:
      break
    coded = caseops.encode(document.text())
    assert tokenizer.encode(coded).tolist() == sp.encode(coded)


def test_pickles(lossless):
  again = pickle.loads(pickle.dumps(lossless))
  assert again.encode("the Congress").tolist() == lossless.encode("the Congress").tolist()


def test_the_cache_of_words_is_bounded(lossless, monkeypatch):
  monkeypatch.setattr(tokenizer_module._WordCache, "CAPACITY", 10)
  tokenizer = Tokenizer(lossless.model)
  text = " ".join(f"w{i}" for i in range(100)) + "x" * 1000
  assert tokenizer.encode(text).tolist() == direct(lossless).encode(text)
  assert len(tokenizer._words) == 10


def test_wrong_size_is_refused_with_both_numbers(lossless, tmp_path):
  path = tmp_path / "some.model"
  path.write_bytes(lossless.model)
  assert Tokenizer.load(path, 600).vocab_size == 600
  with pytest.raises(UserError, match=r"some\.model.* 600 .* 8192 "):
    Tokenizer.load(path, 8192)


def test_a_file_that_is_no_model_is_refused(tmp_path):
  path = tmp_path / "some.model"
  with pytest.raises(UserError, match=r"some\.model: cannot be read"):
    Tokenizer.load(path)
  path.write_bytes(b"not a model at all")
  with pytest.raises(UserError, match=r"some\.model: not a SentencePiece model"):
    Tokenizer.load(path)


def test_bos_elsewhere_is_refused(train_other):
  with pytest.raises(UserError, match="bos is 2"):
    train_other(model_type="bpe", bos_id=2, eos_id=1)


@pytest.mark.parametrize("token", [600, -1])
def test_token_outside_the_vocabulary(lossless, token):
  with pytest.raises(UserError, match=f"token {token} at 1 .*600"):
    lossless.decode([5, token])


@pytest.mark.parametrize("size, message", [(264, "265"), (70000, "65536"), (60000, "too high")])
def test_sizes_that_cannot_be_trained(size, message):
  with pytest.raises(UserError, match=message):
    train_tokenizer(["some text"], size)
