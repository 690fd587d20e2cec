"""Tokenizers and a little text for the tests of the data room."""

import io
import json

import pytest
import sentencepiece

from pgolf_jax.data import caseops
from pgolf_jax.data.default_text import default_documents
from pgolf_jax.data.documents import Position
from pgolf_jax.data.tokenizer import Tokenizer
from pgolf_jax.data.tokenizer_training import train_tokenizer


@pytest.fixture(scope="session")
def speeches() -> list[str]:
  """Twenty short speeches."""
  texts = sorted((record.text() for _, record, _ in default_documents()[0].records(Position())), key=len)
  return texts[:20]


@pytest.fixture(scope="session")
def lossless(speeches) -> Tokenizer:
  """A tokenizer as this project trains them."""
  return train_tokenizer(map(caseops.encode, speeches), 600)


@pytest.fixture(scope="session")
def train_other(speeches):
  """train_other(**options) → a tokenizer that this project would not train, on the same speeches."""

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
  """A tokenizer like the published one: NFKC, extra white space removed, CaseOps symbols."""
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
