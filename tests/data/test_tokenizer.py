"""Tokenizers: their kind, text back from tokens, and the same pieces as SentencePiece itself gives."""

import contextlib
import pickle
import re
import unicodedata

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2, sentencepiece_pb2

from pgolf_jax.data import caseops
from pgolf_jax.data import tokenizer as tokenizer_module
from pgolf_jax.data.corpus import Position, open_corpus
from pgolf_jax.data.tokenizer import Tokenizer, train_tokenizer
from pgolf_jax.data.tokenizer_model import gives_texts_back
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


def changed(model: bytes, change) -> bytes:
  """The model after `change` of its protobuf."""
  proto = sentencepiece_model_pb2.ModelProto.FromString(model)
  change(proto)
  return proto.SerializeToString()


def set_piece(field, value, at=280):
  return lambda proto: setattr(proto.pieces[at], field, value)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda proto: proto.ClearField("pieces"), "0 pieces"),
    (lambda proto: proto.pieces.add().CopyFrom(proto.pieces[9]), "two pieces of the same text"),
    (lambda proto: proto.pieces.extend([proto.pieces[9]] * 70_000), "70600 pieces, but a shard's tokens"),
    (set_piece("piece", ""), "an empty piece"),
    (set_piece("piece", "a\0b"), "zero byte"),
    (set_piece("score", float("nan")), "a score that is not finite"),
    (set_piece("type", 2), "not exactly one unknown piece"),
    (set_piece("type", 3, at=590), "a control piece of one character"),
    (lambda proto: setattr(proto.trainer_spec, "model_type", 3), "a kind of model other than"),
    (lambda proto: setattr(proto.trainer_spec, "byte_fallback", False), "not a SentencePiece model"),
    (lambda proto: setattr(proto.normalizer_spec, "precompiled_charsmap", b"\0\4\0\0"), "a damaged normalisation"),
  ],
)
def test_a_damaged_model_is_one_sentence(lossless, change, message):
  with pytest.raises(UserError, match=f"some.model: .*{message}"):
    Tokenizer(changed(lossless.model, change), "some.model")


@pytest.mark.parametrize("start", range(0, 400, 37))
def test_a_truncated_model_is_a_sentence_or_a_tokenizer(lossless, start):
  with contextlib.suppress(UserError):
    Tokenizer(lossless.model[start : start + 5000])


def test_a_damaged_normalisation_table_cannot_lead_out_of_itself(normalising):
  """The library follows the table's units without looking, so any that leads outside is refused before."""
  table = sentencepiece_model_pb2.ModelProto.FromString(normalising.model).normalizer_spec.precompiled_charsmap
  size = int.from_bytes(table[:4], "little")
  units = np.frombuffer(table, "<u4", size // 4, 4).copy()
  for wild in (0x7FFFFFFF & ~0xFF, 0xFFFFFC00 & 0x7FFFFFFF):
    units[0] = wild
    broken = table[:4] + units.tobytes() + table[4 + size :]
    with pytest.raises(UserError, match="a damaged normalisation table"):
      Tokenizer(changed(normalising.model, lambda p, b=broken: setattr(p.normalizer_spec, "precompiled_charsmap", b)))


@pytest.mark.parametrize(
  "loss",
  [
    lambda text: unicodedata.normalize("NFKC", text),
    lambda text: unicodedata.normalize("NFC", text),
    str.strip,
    str.lstrip,
    lambda text: re.sub(" +", " ", text),
    lambda text: text.replace("\u2581", " "),
    lambda text: text.replace("\r\n", "\n"),
    *(lambda text, c=c: text.replace(c, "") for c in "\0\t\x1f\x85\u0301\ufeff\ue003\uf8ff\U0001f469"),
    lambda text: text.replace("the", "", 1) if len(text) == 3 else text,
    lambda text: text[:4000],
  ],
)
def test_any_loss_is_found(lossless, loss):
  proto = sentencepiece_model_pb2.ModelProto.FromString(lossless.model)
  assert gives_texts_back(proto, list)
  assert not gives_texts_back(proto, lambda texts: [loss(text) for text in texts])


@pytest.mark.parametrize(
  ("flag", "value"), [("add_dummy_prefix", True), ("remove_extra_whitespaces", True), ("escape_whitespaces", False)]
)
def test_a_model_that_normalises_is_not_called_lossless(lossless, flag, value):
  model = changed(lossless.model, lambda proto: setattr(proto.normalizer_spec, flag, value))
  assert Tokenizer(model).kind == "normalising"


def test_a_model_is_not_called_lossless_where_a_text_does_not_come_back(lossless, monkeypatch):
  decode = sentencepiece.SentencePieceProcessor.decode
  monkeypatch.setattr(sentencepiece.SentencePieceProcessor, "decode", lambda *a: [t.rstrip("\0") for t in decode(*a)])
  assert Tokenizer(lossless.model).kind == "normalising"
