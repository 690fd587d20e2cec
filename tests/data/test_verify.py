"""Each check of `verify` passes on a good folder and fails on one with the damage that it is meant to detect."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

from pgolf_jax.data import caseops
from pgolf_jax.data.corpus import Holdout, open_corpus
from pgolf_jax.data.manifest import MANIFEST, TOKENIZER, Manifest, sha256_of
from pgolf_jax.data.prepare import Preparation, prepare
from pgolf_jax.data.shards import read_shard, write_shard
from pgolf_jax.data.verify import verify
from pgolf_jax.errors import UserError

TEXTS = [f"Document {caseops.TITLE} No. {i} of MANY: " + "congress " * 30 for i in range(20)]
CHECKS = ["shards", "token range", "documents", "sidecar", "text", "overlap", "manifest"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, lossless):
  path = tmp_path_factory.mktemp("good")
  (path / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
  prepare(
    path / "data", Preparation(open_corpus(path / "docs.jsonl"), None, Holdout(6), lossless, 600, shard_tokens=200), 1
  )
  return path / "data"


@pytest.fixture
def folder(prepared, tmp_path):
  return shutil.copytree(prepared, tmp_path / "data")


def failures(folder, **options):
  return {check.name: check.finding for check in verify(folder, **options) if check.passed is False}


def edit(path, change):
  tokens = np.array(read_shard(path))
  write_shard(path, change(tokens))


def put(at, value):
  def change(tokens):
    tokens[at] = value
    return tokens

  return change


def change_manifest(folder, **changes):
  manifest = Manifest.read(folder)
  dataclasses.replace(manifest, **changes).write(folder)


def test_a_good_folder_passes_every_check(folder):
  checks = list(verify(folder))
  assert [check.name for check in checks] == CHECKS
  assert all(check.passed for check in checks), checks


def test_it_tells_how_large_a_micro_batch_can_be(folder):
  *others, last = sorted(folder.glob("fineweb_train_*.bin"))
  least = min(len(read_shard(path)) - np.argmax(read_shard(path) == 1) for path in others)
  write_shard(last, np.array([9, 1, 5, 6]))
  (check,) = verify(folder, names=["documents"])
  assert f"training can read micro-batches of up to {least} tokens" in check.finding and 3 < least <= 200
  assert check.passed and "leaves the last shard out where they are larger than 3" in check.finding


def test_golden_data_pass(golden):
  checks = {check.name: check.passed for check in verify(golden("e2e") / "data", golden("e2e") / "tokenizer.model")}
  assert checks == dict.fromkeys(CHECKS, True) | {"text": None, "manifest": None}


def test_without_tokenizer_and_manifest_the_other_checks_are_made(folder):
  (folder / TOKENIZER).unlink()
  (folder / MANIFEST).unlink()
  checks = {check.name: check.passed for check in verify(folder)}
  assert [checks[name] for name in ("shards", "documents")] == [True] * 2
  assert [checks[name] for name in ("token range", "sidecar", "text", "overlap", "manifest")] == [None] * 5


def test_plain_data_may_go_without_a_sidecar(tmp_path, train_other):
  tokenizer = train_other(model_type="bpe", byte_fallback=True)
  (tmp_path / TOKENIZER).write_bytes(tokenizer.model)
  for split, text in (("train", "one text"), ("val", "another")):
    write_shard(tmp_path / f"fineweb_{split}_000000.bin", np.concatenate([[1], tokenizer.encode(text)]))
  checks = {check.name: check.passed for check in verify(tmp_path)}
  assert checks == dict.fromkeys(CHECKS, True) | {"sidecar": None, "text": None, "manifest": None}


TRAIN, BYTES = "fineweb_train_000001.bin", "fineweb_val_bytes_000001.bin"

DAMAGES = {
  "cut off": ("shards", lambda f: (f / TRAIN).write_bytes((f / TRAIN).read_bytes()[:-2]), r"000001\.bin: 1422 bytes"),
  "a shard missing": ("shards", lambda f: (f / TRAIN).unlink(), r"fineweb_train_000001\.bin is missing"),
  "all of a split missing": ("shards", lambda f: [p.unlink() for p in f.glob("fineweb_val_0*")], "no fineweb_val_"),
  "token too high": ("token range", lambda f: edit(f / TRAIN, put(7, 600)), r"train_000001\.bin: token 600 at 7"),
  "no bos at the start": (
    "documents",
    lambda f: edit(f / "fineweb_val_000000.bin", put(0, 300)),
    "does not start with",
  ),
  "an empty document": ("documents", lambda f: edit(f / "fineweb_train_000000.bin", put(1, 1)), r"token 0: an empty"),
  "a shard where nothing starts": (
    "documents",
    lambda f: edit(f / TRAIN, lambda tokens: np.where(tokens == 1, 300, tokens)),
    r"train_000001\.bin: no document starts",
  ),
  "a sidecar file missing": ("sidecar", lambda f: (f / BYTES).unlink(), "sidecar files for"),
  "a sidecar of another length": ("sidecar", lambda f: edit(f / BYTES, lambda b: b[:-1]), r"199 entries for 200"),
  "bytes at a bos": (
    "sidecar",
    lambda f: edit(f / "fineweb_val_bytes_000000.bin", put(0, 1)),
    r"1 bytes at 0 for token 1",
  ),
  "bytes at a marker": (
    "sidecar",
    lambda f: edit(f / "fineweb_val_bytes_000000.bin", put(1, 1)),
    r"1 bytes at 1 for token 4",
  ),
  "wrong bytes at a word": ("text", lambda f: edit(f / BYTES, put(50, 77)), "the sidecar has 77"),
  "other tokens for the text": (
    "text",
    lambda f: edit(f / "fineweb_val_000000.bin", put(slice(2, 4), [8 + ord("h"), 8 + ord("i")])),
    "not the tokens that this tokenizer makes",
  ),
  "text that CaseOps cannot have made": ("text", lambda f: edit(f / "fineweb_val_000000.bin", put(2, 4)), "TITLE"),
  "other validation documents": (
    "text",
    lambda f: change_manifest(f, validation_sha256="0" * 64),
    "not those that the manifest names",
  ),
  "a validation document in training": (
    "overlap",
    lambda f: write_shard(
      f / "fineweb_train_000099.bin",
      np.concatenate([read_shard(path) for path in sorted(f.glob("fineweb_val_0*"))]),
    ),
    "6 validation documents are in the training shards",
  ),
  "one word changed": ("manifest", lambda f: edit(f / TRAIN, put(7, 301)), r"train_000001\.bin: SHA-256"),
  "another tokenizer": ("manifest", lambda f: change_manifest(f, tokenizer_sha256="0" * 64), "not the tokenizer"),
  "files that are not listed": (
    "manifest",
    lambda f: change_manifest(f, val=dataclasses.replace(Manifest.read(f).val, shards=())),
    "the manifest lists 0",
  ),
  "another number of documents": (
    "manifest",
    lambda f: change_manifest(f, train=dataclasses.replace(Manifest.read(f).train, documents=99)),
    "14 train documents, the manifest has 99",
  ),
  "another sum of bytes": (
    "manifest",
    lambda f: change_manifest(f, val=dataclasses.replace(Manifest.read(f).val, counted_bytes=9)),
    "the manifest has 9",
  ),
  "a manifest that is no manifest": (
    "manifest",
    lambda f: (f / MANIFEST).write_text('{"format": "pgolf-data-1"}'),
    r"manifest\.json: damaged",
  ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_detected(folder, damage):
  check, apply, message = DAMAGES[damage]
  apply(folder)
  failed = failures(folder)
  assert check in failed, failed
  assert re.search(message, failed[check]), failed[check]


def test_a_tokenizer_of_another_size_is_detected(folder, tmp_path, train_other):
  small = train_other(300, model_type="bpe", byte_fallback=True, character_coverage=0.98)
  (tmp_path / "small.model").write_bytes(small.model)
  assert (
    "lies outside the tokenizer's 300 pieces" in failures(folder, tokenizer=tmp_path / "small.model")["token range"]
  )


def test_a_missing_folder_fails_the_check(tmp_path):
  assert "no such folder" in failures(tmp_path / "nothing")["shards"]


def test_foreign_manifest_is_not_taken_for_ours(folder):
  (folder / MANIFEST).write_text('{"datasets": []}')
  assert Manifest.read(folder) is None


def test_manifest_hashes_are_those_of_the_files(prepared):
  for file in Manifest.read(prepared).files():
    assert sha256_of(prepared / file.name) == file.sha256


def test_damaged_manifest_is_an_error_that_says_so(folder):
  (folder / MANIFEST).write_text("{")
  with pytest.raises(UserError, match=r"manifest\.json, line 1: damaged"):
    Manifest.read(folder)
