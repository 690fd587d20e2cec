"""Lies about bytes and splits: a sidecar that counts too much, and training text that is the validation text."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from pgolf_jax.data import caseops, overlap, sidecar
from pgolf_jax.data.corpus import Holdout, open_corpus
from pgolf_jax.data.encode import token_bytes
from pgolf_jax.data.manifest import MANIFEST, Manifest, sha256_of
from pgolf_jax.data.prepare import Preparation, prepare
from pgolf_jax.data.shards import BOS, iter_documents, list_shards, read_shard, write_shard
from pgolf_jax.data.tokenizer import Tokenizer
from pgolf_jax.data.verify import verify

KINDS = ("lossless", "normalising")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, speeches, lossless, normalising):
  """kind of tokenizer → a folder of speeches that holds out four of them."""
  paths = {}
  for kind, tokenizer in zip(KINDS, (lossless, normalising), strict=True):
    path = tmp_path_factory.mktemp(kind)
    (path / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in speeches))
    prepare(path / "data", Preparation(open_corpus(path / "docs.jsonl"), None, Holdout(4), tokenizer, 600), 1)
    paths[kind] = path / "data"
  return paths


@pytest.fixture
def folder_of(folders, tmp_path):
  return lambda kind: shutil.copytree(folders[kind], tmp_path / kind)


def outcome(folder, name):
  return next(check for check in verify(folder) if check.name == name)


def write_sidecar(folder, change):
  """Changes the sidecar and makes the manifest agree with it, as a liar would."""
  path = folder / "fineweb_val_bytes_000000.bin"
  write_shard(path, change(np.array(read_shard(path))))
  manifest = Manifest.read(folder)
  files = (dataclasses.replace(manifest.val.sidecar[0], sha256=sha256_of(path)),)
  counted = int(read_shard(path).sum())
  dataclasses.replace(
    manifest, val=dataclasses.replace(manifest.val, counted_bytes=counted, text_bytes=2 * counted, sidecar=files)
  ).write(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_one_byte_more_on_every_token_fails_under_any_tokenizer(folder_of, kind):
  folder = folder_of(kind)
  assert outcome(folder, "sidecar").passed and outcome(folder, "overlap").passed
  write_sidecar(folder, lambda bytes_N: bytes_N + (bytes_N > 0).astype(np.uint16))
  assert outcome(folder, "manifest").passed
  assert outcome(folder, "sidecar").passed is False


@pytest.mark.parametrize("every", [10, 3])
def test_bytes_that_no_dropped_white_space_explains_fail(folder_of, every):
  folder = folder_of("normalising")
  write_sidecar(folder, lambda bytes_N: bytes_N + (bytes_N > 0) * (np.arange(len(bytes_N)) % every == 0))
  assert outcome(folder, "sidecar").passed is False


def test_more_bytes_than_the_documents_have_fail(folder_of):
  folder = folder_of("normalising")
  manifest = Manifest.read(folder)
  less = dataclasses.replace(manifest.val, text_bytes=manifest.val.counted_bytes - 1)
  dataclasses.replace(manifest, val=less).write(folder)
  assert "the documents have" in outcome(folder, "sidecar").finding


@pytest.mark.parametrize("markers", ["published", "before-space"])
def test_pieces_spell_what_the_recipe_counts(lossless, normalising, markers):
  """On text without anything to normalise the bytes of the recipe are those of the pieces."""
  texts = ["The USA's iPhone: 3 µm, naïve 漢字 🙂 end.", f"a {caseops.TITLE}b {caseops.ESC}{caseops.ESC} C", "x ▁ y"]
  for tokenizer in (lossless, normalising):
    for text in texts[: 3 if tokenizer is lossless else 2]:
      coded = caseops.encode(text, markers)
      tokens_N = tokenizer.encode(coded)
      spelt_N = sidecar.PieceBytes(tokenizer, is_caseops=True).spelt(np.append([BOS], tokens_N))
      if tokenizer is lossless:
        assert spelt_N.sum() == len(text.encode())
      np.testing.assert_array_equal(spelt_N[1:], token_bytes(tokenizer, coded, tokens_N))


def test_the_official_split_has_the_official_totals():
  spelt_N = np.full(3, 2)
  total = sidecar.Total()
  total.add(spelt_N, spelt_N, np.array([False, False, True]))
  assert total.fault(sidecar.PUBLISHED_TOKENIZER) is None  # not the official split
  total.documents, total.tokens = sidecar.OFFICIAL_DOCUMENTS, np.array([20_000_000, 27_853_344])
  total.counted = sidecar.OFFICIAL_BYTES
  assert total.fault(sidecar.PUBLISHED_TOKENIZER) is None
  total.counted += 1
  assert "151,080,646 bytes, the official split has 151,080,645" in total.fault(sidecar.PUBLISHED_TOKENIZER)
  assert total.fault("another") is None
  total.documents -= 1
  assert "49,999 documents" in total.fault(sidecar.PUBLISHED_TOKENIZER)


def one_token_changed(tokenizer: Tokenizer, tokens_N):
  return np.concatenate([tokens_N[: len(tokens_N) // 2], [300], tokens_N[len(tokens_N) // 2 + 1 :]])


def last_token_cut(tokenizer: Tokenizer, tokens_N):
  return tokens_N[:-1]


def merged(tokenizer: Tokenizer, tokens_N):
  return np.concatenate([tokens_N, tokenizer.encode("and so it was, and went on: "), tokens_N[1:]])


def retokenised(tokenizer: Tokenizer, tokens_N):
  """The same text in byte pieces, its capitals lost."""
  text = caseops.decode(tokenizer.decode(tokens_N)).lower()
  return np.array([BOS, *(8 + byte for byte in text.encode())])


def other_spacing(tokenizer: Tokenizer, tokens_N):
  text = tokenizer.decode(tokens_N).replace(" ", " \n ").replace(",", " — ")
  return np.append([BOS], tokenizer.encode(text))


@pytest.mark.parametrize("disguise", [one_token_changed, last_token_cut, merged, retokenised, other_spacing])
def test_disguised_validation_text_is_found_in_training(folder_of, lossless, disguise):
  folder = folder_of("lossless")
  document = list(iter_documents(list_shards(folder, "val")))[2]
  others_N = np.array(read_shard(folder / "fineweb_train_000000.bin"))
  write_shard(
    folder / "fineweb_train_000000.bin", np.concatenate([others_N, disguise(lossless, np.array(document.tokens_N))])
  )
  (folder / MANIFEST).unlink()
  found = outcome(folder, "overlap")
  assert found.passed is False and f"the first is that of {document.place}" in found.finding


def test_shares_are_those_of_a_plain_count():
  words = [f"word{i}" for i in range(20)]
  held_out = [" ".join(words), "Too short for that", " ".join(reversed(words))]
  training = ["x " + " ".join(words[:10]) + " y", " ".join(words[12:]).upper()]
  share_D = overlap.shares(held_out, training)
  assert share_D[0] == (3 + 1) / 13 and np.isnan(share_D[1]) and share_D[2] == 0
  assert len(overlap.ngrams("")) == 0
