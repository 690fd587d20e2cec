"""Downloading a published data set from a folder that stands in for the hub."""

import dataclasses
import hashlib
import json
import shutil

import huggingface_hub
import numpy as np
import pytest

from pgolf_jax.data.download import PUBLISHED, download
from pgolf_jax.data.manifest import TOKENIZER
from pgolf_jax.data.shards import read_shard, write_shard
from pgolf_jax.errors import UserError

REPO = PUBLISHED["caseops"].repo
SHARDS = f"datasets/datasets/{PUBLISHED['caseops'].shards}"
MODEL = f"datasets/tokenizers/{PUBLISHED['caseops'].files[0]}"


class Hub:
  """A local copy of a hub repository that logs what is fetched."""

  def __init__(self, root):
    self.root, self.fetched, self.announced = root, [], {}

  def list_repo_tree(self, repo, *, recursive, repo_type):
    assert (repo, recursive, repo_type) == (REPO, True, "dataset")
    for path in self.root.rglob("*"):
      if path.is_file():
        data, name = path.read_bytes(), str(path.relative_to(self.root))
        lfs = {"size": len(data), "oid": hashlib.sha256(data).hexdigest(), "pointerSize": 1}
        oid = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        file = {"path": name, "size": len(data), "oid": oid, "lfs": lfs if name.endswith(".bin") else None}
        yield huggingface_hub.hf_api.RepoFile(**file | self.announced.get(path.name, {}))

  def hf_hub_download(self, repo, filename, *, repo_type, local_dir):
    assert (repo, repo_type) == (REPO, "dataset")
    self.fetched.append(filename.rpartition("/")[2])
    target = local_dir / filename
    target.parent.mkdir(parents=True, exist_ok=True)
    return str(shutil.copy(self.root / filename, target))


@pytest.fixture
def hub(tmp_path, monkeypatch, lossless):
  root = tmp_path / "hub"
  (root / SHARDS).mkdir(parents=True)
  (root / "datasets" / "datasets" / "another").mkdir()
  (root / MODEL).parent.mkdir()
  (root / MODEL).write_bytes(lossless.model)
  for i in range(4):
    write_shard(root / SHARDS / f"fineweb_train_{i:06d}.bin", np.full(10, i))
  for split in ("val", "val_bytes"):
    write_shard(root / SHARDS / f"fineweb_{split}_000000.bin", np.arange(7))
  write_shard(root / "datasets" / "datasets" / "another" / "fineweb_train_000004.bin", np.arange(3))
  stats = {"tokens_train": 40, "tokens_val": 7}
  manifest = {"datasets": [{"name": "another"}, {"name": PUBLISHED["caseops"].shards, "stats": stats}]}
  (root / "datasets" / "manifest.json").write_text(json.dumps(manifest))
  hub = Hub(root)
  monkeypatch.setattr(huggingface_hub, "list_repo_tree", hub.list_repo_tree)
  monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.hf_hub_download)
  return hub


def test_a_sidecar_that_is_not_published_is_made(hub, tmp_path, monkeypatch):
  monkeypatch.setitem(PUBLISHED, "caseops", dataclasses.replace(PUBLISHED["caseops"], has_sidecar=False))
  download("caseops", tmp_path / "out", train_shards=1)
  # Pad, bos, eos and unknowns stand for nothing; the rest are CaseOps' markers, of three bytes where they are text.
  assert read_shard(tmp_path / "out/fineweb_val_bytes_000000.bin").tolist() == [0, 0, 0, 0, 3, 3, 3]


def test_everything_that_training_needs_comes_in_one_folder(hub, tmp_path, lossless):
  paths = download("caseops", tmp_path / "out", train_shards=2)
  names = [
    "fineweb_train_000000.bin",
    "fineweb_train_000001.bin",
    "fineweb_val_000000.bin",
    "fineweb_val_bytes_000000.bin",
  ]
  assert [path.name for path in paths] == [*names, TOKENIZER]
  assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
    [*names, TOKENIZER, "published_manifest.json"]
  )
  assert read_shard(paths[1]).tolist() == [1] * 10
  assert (tmp_path / "out" / TOKENIZER).read_bytes() == lossless.model


def test_complete_files_are_not_fetched_again_and_more_shards_can_be_added(hub, tmp_path):
  download("caseops", tmp_path / "out", train_shards=2)
  hub.fetched.clear()
  download("caseops", tmp_path / "out", train_shards=4)
  assert hub.fetched == ["fineweb_train_000002.bin", "fineweb_train_000003.bin"]


def test_a_damaged_file_in_the_folder_is_fetched_again(hub, tmp_path):
  paths = download("caseops", tmp_path / "out", train_shards=1)
  paths[0].write_bytes(paths[0].read_bytes()[:-1])
  hub.fetched.clear()
  download("caseops", tmp_path / "out", train_shards=1)
  assert hub.fetched == ["fineweb_train_000000.bin"] and read_shard(paths[0]).size == 10


def test_a_damaged_file_on_the_hub_is_refused_and_deleted(hub, tmp_path):
  shard = hub.root / SHARDS / "fineweb_train_000001.bin"
  whole = shard.read_bytes()
  shard.write_bytes(whole[:-1])
  with pytest.raises(UserError, match=r"fineweb_train_000001\.bin: 1043 bytes"):
    download("caseops", tmp_path / "out", train_shards=2)
  shard.write_bytes(whole)
  assert len(download("caseops", tmp_path / "out", train_shards=2)) == 5


def test_token_counts_are_compared_with_the_publishers(hub, tmp_path):
  write_shard(hub.root / SHARDS / "fineweb_train_000003.bin", np.full(9, 3))
  download("caseops", tmp_path / "three", train_shards=3)
  with pytest.raises(UserError, match="39 train tokens, the publisher's manifest has 40"):
    download("caseops", tmp_path / "all", train_shards=4)


def test_sidecar_of_another_length_is_refused(hub, tmp_path):
  write_shard(hub.root / SHARDS / "fineweb_val_bytes_000000.bin", np.arange(6))
  with pytest.raises(UserError, match="6 sidecar entries for 7 validation tokens"):
    download("caseops", tmp_path / "out", train_shards=1)


@pytest.mark.parametrize("count", [0, 5])
def test_a_number_of_shards_that_the_hub_does_not_have_is_refused(hub, tmp_path, count):
  with pytest.raises(UserError, match=f"4 training shards; ask for 1 to 4, not {count}"):
    download("caseops", tmp_path / "out", train_shards=count)


def test_a_file_that_the_publisher_deleted_is_named(hub, tmp_path):
  (hub.root / MODEL).unlink()
  with pytest.raises(UserError, match=r"no longer has .*\.model"):
    download("caseops", tmp_path / "out", train_shards=1)


def test_unknown_name(tmp_path):
  with pytest.raises(UserError, match="choose one of caseops, sp1024, documents"):
    download("fineweb", tmp_path / "out")


def test_no_connection(hub, tmp_path, monkeypatch):
  def fail(*_, **__):
    raise OSError("network is unreachable")

  monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
  with pytest.raises(UserError, match=r"network is unreachable.* again to continue"):
    download("caseops", tmp_path / "out", train_shards=1)
  monkeypatch.setattr(huggingface_hub, "list_repo_tree", fail)
  with pytest.raises(UserError, match="cannot list"):
    download("caseops", tmp_path / "out", train_shards=1)


@pytest.mark.parametrize("name", ["fineweb_train_000000.bin", "manifest.json"])
def test_the_hash_announced_is_the_hash_checked(hub, tmp_path, name):
  lfs = {"size": 1044, "oid": "0" * 64, "pointerSize": 1} if name.endswith(".bin") else None
  hub.announced[name] = {"oid": "0" * 40, "lfs": lfs}
  with pytest.raises(UserError, match=f"{name} of .* is not what the hub announced"):
    download("caseops", tmp_path / "out", train_shards=1)
  assert not (tmp_path / "out" / name).exists()
  hub.announced.clear()
  assert len(download("caseops", tmp_path / "out", train_shards=1)) == 4


def test_a_file_of_the_right_size_but_another_hash_is_fetched_again(hub, tmp_path):
  path = download("caseops", tmp_path / "out", train_shards=1)[0]
  path.write_bytes(path.read_bytes()[:-1] + b"\7")
  hub.fetched.clear()
  download("caseops", tmp_path / "out", train_shards=1)
  assert hub.fetched == [path.name] and read_shard(path).tolist() == [0] * 10


def test_sizes_are_capped_before_anything_is_fetched(hub, tmp_path):
  hub.announced["fineweb_train_000000.bin"] = {"size": 1 << 40}
  with pytest.raises(UserError, match=r"fineweb_train_000000\.bin of .* has 1099511627776 bytes, more than"):
    download("caseops", tmp_path / "out", train_shards=1)
  assert hub.fetched == []


@pytest.mark.parametrize("text", ['{"datasets": [', '{"datasets": {}}', '{"datasets": [1]}', "[" * 100_000, "[]"])
def test_a_damaged_manifest_is_removed(hub, tmp_path, text):
  manifest = hub.root / "datasets" / "manifest.json"
  whole = manifest.read_text()
  manifest.write_text(text)
  with pytest.raises(UserError, match=r"manifest\.json"):
    download("caseops", tmp_path / "out", train_shards=1)
  assert not (tmp_path / "out" / "published_manifest.json").exists()
  manifest.write_text(whole)
  assert len(download("caseops", tmp_path / "out", train_shards=1)) == 4


def test_paths_that_lead_out_of_the_folder_are_not_fetched(hub, tmp_path):
  hub.announced["fineweb_train_000001.bin"] = {"path": f"../{SHARDS}/fineweb_train_000001.bin"}
  hub.announced["fineweb_train_000002.bin"] = {"path": f"/tmp/{SHARDS}/fineweb_train_000002.bin"}
  hub.announced["fineweb_train_000003.bin"] = {"path": f"{SHARDS}/../fineweb_train_000003.bin"}
  with pytest.raises(UserError, match="has 1 training shards"):
    download("caseops", tmp_path / "out", train_shards=4)
