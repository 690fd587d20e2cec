"""Saves of an evaluation: whole or absent, whatever happens to their files."""

import errno
import shutil

import numpy as np
import pytest
from ttt_case import random_documents

from pgolf_jax.runtime import files
from pgolf_jax.scoring import store
from pgolf_jax.scoring.record import EvaluationProgress, Record

DATA = random_documents([12, 9, 14])
TARGETS = len(DATA.tokens) - 1
IDENTITY = {"settings": {"seed": 1}, "weights": "abc"}


def open_record(folder, identity=IDENTITY):
  return Record(folder, DATA, identity)


def enter(record, begin, end):
  target = np.arange(begin, end)
  record.enter(target, *(np.float32(target + part) for part in (0.5, 0.25, 0.125)))


def save(record, batches, phases=0):
  record.save(EvaluationProgress(batches=batches, phases=phases), {"A": np.full(3, batches, np.float32)})


@pytest.fixture
def two_saves(tmp_path):
  """A folder with a save after 10 targets and one after 20, each with weights of its own."""
  record = open_record(tmp_path / "scores")
  for batches in (1, 2):
    enter(record, 10 * batches - 10, 10 * batches)
    record.save_weights(batches, {"w": np.full(4, batches, np.float32)})
    save(record, batches, phases=batches)
  return tmp_path / "scores"


def assert_is_save(record, batches):
  assert record.progress.batches == batches and int(record.times_N.sum()) == 10 * batches
  np.testing.assert_array_equal(record.nll_N[: 10 * batches], np.arange(10 * batches) + 0.125)
  assert np.isnan(record.nll_N[10 * batches :]).all()
  np.testing.assert_array_equal(record.arrays()["A"], np.full(3, batches))
  np.testing.assert_array_equal(record.weights(batches)["w"], np.full(4, batches))


def damage(path, how):
  before = path.read_bytes()
  path.unlink()
  match how:
    case "truncated":
      path.write_bytes(before[: len(before) // 2])
    case "flipped":
      middle = len(before) // 2
      path.write_bytes(before[:middle] + bytes([before[middle] ^ 4]) + before[middle + 1 :])
    case "emptied":
      path.write_bytes(b"")
    case "another text":
      path.write_text("[1, 2]")
    case "a folder":
      path.mkdir()


HOW = ("truncated", "flipped", "emptied", "removed", "another text", "a folder")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
  "name", ["progress.json", "part-2.safetensors", "state-2.safetensors", "weights-2.safetensors", "identity.json"]
)
def test_a_damaged_save_gives_way_to_the_one_before(two_saves, name, how, caplog):
  damage(two_saves / name, how)
  record = open_record(two_saves)
  if name == "identity.json":  # the save says by itself what it belongs to
    assert_is_save(record, 2)
    return
  assert_is_save(record, 1)
  assert (len(caplog.messages) == 1 and "the save after batch 1" in caplog.messages[0]) == (
    (name, how) != ("progress.json", "removed")
  )
  enter(record, 10, 20)  # as from the first save
  record.save_weights(2, {"w": np.full(4, 2, np.float32)})
  save(record, 2, phases=2)
  assert_is_save(open_record(two_saves), 2)


def test_with_all_saves_damaged_an_evaluation_begins_anew(two_saves, caplog):
  damage(two_saves / "part-1.safetensors", "flipped")
  record = open_record(two_saves)
  assert not record.is_resumed and np.isnan(record.nll_N).all()
  assert "from the start" in caplog.messages[0]
  assert [path.name for path in two_saves.iterdir()] == ["identity.json"]


@pytest.mark.parametrize("named", [0, 1])
def test_two_phases_between_two_saves_and_a_kill_lose_nothing(tmp_path, named):
  record = open_record(tmp_path)
  record.save_weights(1, {"w": np.full(4, 1, np.float32)})
  save(record, 1, phases=named)
  for version in (2, 3):
    record.save_weights(version, {"w": np.full(4, version, np.float32)})
  record = open_record(tmp_path)  # the process that made the phases is gone
  assert record.progress.phases == named
  if named:
    np.testing.assert_array_equal(record.weights(1)["w"], np.ones(4))
  for version in (2, 3):
    record.save_weights(version, {"w": np.full(4, version, np.float32)})
    save(record, version, phases=version)
  assert sorted(path.name for path in tmp_path.glob("weights-*")) == ["weights-2.safetensors", "weights-3.safetensors"]


@pytest.mark.parametrize("writes", range(4))
def test_a_full_disk_leaves_the_last_save(two_saves, writes, monkeypatch):
  record, left = open_record(two_saves), [writes]
  enter(record, 20, 30)

  def write_bytes(path, data, original=files.write_bytes):
    if not left[0]:
      raise OSError(errno.ENOSPC, "No space left on device", str(path))
    left[0] -= 1
    original(path, data)

  monkeypatch.setattr(store, "write_bytes", write_bytes)
  monkeypatch.setattr(files, "write_bytes", write_bytes)
  with pytest.raises(OSError, match="No space"):
    save(record, 3, phases=2)
  monkeypatch.undo()
  assert_is_save(open_record(two_saves), 2)


def test_finished_scores_are_plain_arrays_and_damage_to_them_is_seen(two_saves):
  record = open_record(two_saves)
  record._store.finish({"nll": record.nll_N, "model_nll": record.model_nll_N, "hint_nll": record.hint_nll_N,
                        "times": record.times_N})  # fmt: skip
  assert not list(two_saves.glob("part-*"))
  np.testing.assert_array_equal(np.load(two_saves / "nll.npy"), record.nll_N)
  assert_is_save(open_record(two_saves), 2)
  data = (two_saves / "nll.npy").read_bytes()
  (two_saves / "nll.npy").write_bytes(data[:-40])  # a truncated file of scores gave a better result once
  assert not open_record(two_saves).is_resumed


def test_a_save_that_does_not_tell_of_compilations_is_read(two_saves):
  path = two_saves / "progress.json"
  saved = files.read_sealed(path)
  assert saved["progress"].pop("compilations") == 0
  files.write_json(path, files.seal(saved))
  assert_is_save(open_record(two_saves), 2)


def test_no_file_is_sparse(two_saves):
  for path in two_saves.iterdir():
    assert path.stat().st_blocks * 512 >= path.stat().st_size, path


def test_another_evaluation_is_refused_even_where_its_identity_is_gone(two_saves):
  (two_saves / "identity.json").unlink()
  with pytest.raises(store.OtherEvaluation, match="weights differs"):
    open_record(two_saves, IDENTITY | {"weights": "abd"})
  shutil.rmtree(two_saves)
  assert not open_record(two_saves, IDENTITY | {"weights": "abd"}).is_resumed
