"""Tokenizers and a little text for the tests of `data/`."""

import io
import json

import pytest
import sentencepiece

from pgolf_jax.data import caseops
from pgolf_jax.data.corpus import Position
from pgolf_jax.data.folder import default_corpus
from pgolf_jax.data.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def speeches() -> list[str]:
  """Twenty short speeches."""
  texts = sorted((document.text() for _, document, _ in default_corpus()[0].read(Position())), key=len)
  return texts[:20]


@pytest.fixture(scope="session")
def lossless(speeches) -> Tokenizer:
  """A tokenizer as this project trains it."""
  return train_tokenizer(map(caseops.encode, speeches), 600)


@pytest.fixture(scope="session")
def train_other(speeches):
  """train_other(**options) → a tokenizer of the same speeches, trained with other options than this project's."""

  def train(vocab_size: int = 600, **options) -> Tokenizer:
    model = io.BytesIO()
    symbols = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "minloglevel": 2, "max_sentence_length": 1 << 20}
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(speeches), model_writer=model, vocab_size=vocab_size, **{**symbols, **options}
    )
    return Tokenizer(model.getvalue())

  return train


@pytest.fixture(scope="session")
def normalising(train_other) -> Tokenizer:
  """A tokenizer like the published one: text normalised by NFKC, extra white space removed, CaseOps symbols."""
  return train_other(
    model_type="bpe", byte_fallback=True, add_dummy_prefix=False, user_defined_symbols=list(caseops.MARKERS)
  )


@pytest.fixture
def write_jsonl(tmp_path):
  """write_jsonl(name, texts) → a file of documents."""

  def write(name, texts):
    path = tmp_path / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path

  return write
