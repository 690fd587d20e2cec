"""Preparing a folder: what ends up in it, who is held out, and going on after a kill with the same result."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pgolf_jax.data import caseops, documents
from pgolf_jax.data import prepare as prepare_module
from pgolf_jax.data.documents import open_documents
from pgolf_jax.data.journal import JOURNAL
from pgolf_jax.data.manifest import MANIFEST, TOKENIZER, Manifest
from pgolf_jax.data.prepare import Preparation, prepare
from pgolf_jax.data.shards import iter_documents, list_shards, read_shard, write_shard
from pgolf_jax.data.split import Choice
from pgolf_jax.data.tokenizer import Tokenizer
from pgolf_jax.errors import UserError

TEXTS = [f"The Document No. {i} of Many\n\n" + "Fellow-Citizens of the Senate, " * (i % 5 + 1) for i in range(60)]
FIRST_FIVE = Choice(5)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
  monkeypatch.setattr(documents, "BATCH_BYTES", 500)


@pytest.fixture
def docs(write_jsonl):
  return open_documents(write_jsonl("docs.jsonl", TEXTS))


def plan(train, tokenizer, *, val=None, choice=FIRST_FIVE, **options):
  return Preparation(train, val, choice, tokenizer, tokenizer.vocab_size, **options)


def texts_in(folder: Path, split: str, tokenizer: Tokenizer) -> list[str]:
  return [
    caseops.decode(tokenizer.decode(document.tokens_N)) for document in iter_documents(list_shards(folder, split))
  ]


def contents(folder: Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_first_documents_are_held_out(docs, lossless, tmp_path):
  manifest = prepare(tmp_path / "out", plan(docs, lossless), workers=1)
  assert texts_in(tmp_path / "out", "val", lossless) == TEXTS[:5]
  assert texts_in(tmp_path / "out", "train", lossless) == TEXTS[5:]
  assert (manifest.train.documents, manifest.val.documents) == (55, 5)
  assert manifest.val.text_bytes == manifest.val.counted_bytes == sum(len(text.encode()) for text in TEXTS[:5])
  assert manifest.tokenizer_kind == "lossless" and manifest.validation == "the first 5 documents of docs.jsonl"
  assert Tokenizer.load(tmp_path / "out" / TOKENIZER).sha256 == lossless.sha256 == manifest.tokenizer_sha256
  assert Manifest.read(tmp_path / "out") == manifest
  assert not (tmp_path / "out" / JOURNAL).exists()


@pytest.mark.parametrize("choice, held_out", [(Choice(None, 10), TEXTS[9::10]), (Choice(2, 10), TEXTS[9:20:10])])
def test_every_nth_document_is_held_out(docs, lossless, tmp_path, choice, held_out):
  prepare(tmp_path, plan(docs, lossless, choice=choice), workers=1)
  assert texts_in(tmp_path, "val", lossless) == held_out
  assert texts_in(tmp_path, "train", lossless) == [text for text in TEXTS if text not in held_out]


def test_validation_from_a_file_of_its_own(docs, lossless, write_jsonl, tmp_path):
  held_out = open_documents(write_jsonl("val.jsonl", ["Held out I", "Held out II", "Held out III"]))
  manifest = prepare(tmp_path / "all", plan(docs, lossless, val=held_out, choice=Choice(None)), workers=1)
  assert texts_in(tmp_path / "all", "val", lossless) == ["Held out I", "Held out II", "Held out III"]
  assert texts_in(tmp_path / "all", "train", lossless) == TEXTS
  assert manifest.validation == "all documents of val.jsonl"
  prepare(tmp_path / "two", plan(docs, lossless, val=held_out, choice=Choice(2)), workers=1)
  assert texts_in(tmp_path / "two", "val", lossless) == ["Held out I", "Held out II"]


@pytest.mark.parametrize("separate", [False, True])
def test_copies_of_held_out_documents_never_reach_training(write_jsonl, lossless, tmp_path, separate):
  train = open_documents(write_jsonl("docs.jsonl", [*TEXTS, TEXTS[0], "new", TEXTS[4]]))
  val = open_documents(write_jsonl("val.jsonl", TEXTS[:5])) if separate else None
  manifest = prepare(tmp_path / "out", plan(train, lossless, val=val, choice=Choice(5)), workers=1)
  assert texts_in(tmp_path / "out", "train", lossless) == [*TEXTS[5:], "new"]
  assert manifest.train.duplicates == (7 if separate else 2)


def test_a_tokenizer_is_trained_on_training_text_alone(write_jsonl, tmp_path):
  secret = "Zyzzogeton " * 400
  texts = [secret, *(text * 3 for text in TEXTS), secret]
  train = open_documents(write_jsonl("docs.jsonl", texts))
  manifest = prepare(tmp_path / "out", Preparation(train, None, Choice(1), None, 350), workers=1)
  tokenizer = Tokenizer.load(tmp_path / "out" / TOKENIZER, 350)
  assert manifest.tokenizer_text_bytes == sum(len(text.encode()) for text in texts[1:-1])
  assert len(tokenizer.encode(" zyzzogeton")) > 8
  assert len(tokenizer.encode("document")) == 1


def test_shards_are_cut_at_a_number_of_tokens(docs, lossless, tmp_path):
  manifest = prepare(tmp_path / "cut", plan(docs, lossless, shard_tokens=100), workers=1)
  prepare(tmp_path / "whole", plan(docs, lossless), workers=1)
  for split, facts in (
    ("train", manifest.train.shards),
    ("val", manifest.val.shards),
    ("val_bytes", manifest.val.sidecar),
  ):
    paths = list_shards(tmp_path / "cut", split)
    assert [path.name for path in paths] == [file.name for file in facts] and len(paths) > 1
    assert {len(read_shard(path)) for path in paths[:-1]} == {100}
    whole = read_shard(list_shards(tmp_path / "whole", split)[0])
    assert np.array_equal(np.concatenate([read_shard(path) for path in paths]), whole)


def test_result_does_not_depend_on_the_number_of_processes(docs, lossless, tmp_path):
  for workers in (1, 2):
    prepare(tmp_path / str(workers), plan(docs, lossless, shard_tokens=300), workers=workers)
  assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_normalising_tokenizer_reports_what_it_loses(write_jsonl, normalising, tmp_path):
  train = open_documents(write_jsonl("docs.jsonl", ["  both ends \n", "no end", "x"]))
  manifest = prepare(tmp_path / "out", plan(train, normalising, choice=Choice(2)), workers=1)
  assert (manifest.val.text_bytes, manifest.val.counted_bytes) == (19, 15)


def test_plain_text_without_caseops(docs, lossless, tmp_path):
  manifest = prepare(tmp_path / "out", plan(docs, lossless, is_caseops=False), workers=1)
  assert manifest.text_transform == "identity"
  first = next(iter_documents(list_shards(tmp_path / "out", "val")))
  assert lossless.decode(first.tokens_N) == TEXTS[0]


def test_done_once_is_not_done_again(docs, lossless, tmp_path):
  prepare(tmp_path / "out", plan(docs, lossless), workers=1)
  before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
  prepare(tmp_path / "out", plan(docs, lossless), workers=1)
  assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_two_at_once_do_the_work_once(docs, lossless, tmp_path, monkeypatch):
  from pgolf_jax.data import shard_writer

  written = []

  def write_slowly(path, tokens):
    written.append(path.name)
    time.sleep(0.05)
    write_shard(path, tokens)

  monkeypatch.setattr(shard_writer, "write_shard", write_slowly)
  with ThreadPoolExecutor(2) as pool:
    first, second = pool.map(lambda _: prepare(tmp_path / "out", plan(docs, lossless), workers=1), range(2))
  assert first == second
  assert sorted(written) == ["fineweb_train_000000.bin", "fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin"]


class KilledError(BaseException):
  pass


@pytest.mark.parametrize("after", [2, 3, 7, 12])
def test_interrupted_anywhere_it_goes_on_from_the_last_shard(docs, lossless, tmp_path, monkeypatch, after):
  """Breaks off after every number of shards written, without any clean-up, and goes on."""
  from pgolf_jax.data import shard_writer

  preparation = plan(docs, lossless, shard_tokens=150)
  prepare(tmp_path / "whole", preparation, workers=1)
  written = []

  def write_then_die(path, tokens):
    if len(written) % (after + 1) == after:
      written.append("killed before writing")
      raise KilledError
    written.append(path.name)
    write_shard(path, tokens)

  monkeypatch.setattr(shard_writer, "write_shard", write_then_die)
  for _ in range(100):
    try:
      prepare(tmp_path / "cut", preparation, workers=1)
      break
    except KilledError:
      pass
  assert "killed before writing" in written
  assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
  train = [name for name in written if name.startswith("fineweb_train")]
  assert len(train) == len(set(train))  # no finished shard was written again


COMMAND = """
from pathlib import Path
from pgolf_jax.data import documents
from pgolf_jax.data.prepare import Preparation, prepare
from pgolf_jax.data.split import Choice
documents.BATCH_BYTES = 1 << 15
text = documents.open_documents(Path({docs!r}))
prepare({folder!r}, Preparation(text, None, Choice(3), None, 500, shard_tokens=20_000), workers=2)
"""


def children_of(pid: int) -> list[int]:
  path = Path(f"/proc/{pid}/task/{pid}/children")
  return [int(child) for child in path.read_text().split()] if path.exists() else []


def is_running(pid: int) -> bool:
  try:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at processes in /proc")
def test_sigkill_and_restart(tmp_path, speeches, write_jsonl):
  """Killed for real, with worker processes, as often as it takes; finished shards stay the files they are."""

  docs = write_jsonl("docs.jsonl", [f"Take {i}. {text}" for i in range(12) for text in speeches])

  def start(folder):
    return subprocess.Popen([sys.executable, "-c", COMMAND.format(docs=str(docs), folder=str(folder))])

  whole = start(tmp_path / "whole")
  folder, kills, seen, workers = tmp_path / "killed", 0, {}, set()
  while True:
    process = start(folder)
    before = len(list(folder.glob("fineweb_train_*.bin")))
    while process.poll() is None:
      finished = sorted(folder.glob("fineweb_train_*.bin"))
      if kills < 2 and len(finished) >= before + 4:
        workers.update(children_of(process.pid))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        journal = json.loads((folder / JOURNAL).read_text())
        for file in journal["splits"]["train"]["done"]["shards"]:
          seen.setdefault(file["name"], (folder / file["name"]).stat().st_ino)
        break
      time.sleep(0.005)
    else:
      assert process.returncode == 0
      break
  assert kills == 2 and len(seen) >= 6 and workers
  assert whole.wait() == 0
  assert contents(folder) == contents(tmp_path / "whole")
  assert {name: (folder / name).stat().st_ino for name in seen} == seen
  deadline = time.monotonic() + 10
  while any(map(is_running, workers)) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not any(map(is_running, workers))


def test_a_folder_of_something_else_is_left_alone(docs, lossless, tmp_path):
  folder = tmp_path / "out"
  prepare(folder, plan(docs, lossless), workers=1)
  with pytest.raises(UserError, match=r"another preparation \(it differs in validation\)"):
    prepare(folder, plan(docs, lossless, choice=Choice(6)), workers=1)
  (folder / MANIFEST).unlink()
  with pytest.raises(UserError, match="already holds fineweb_"):
    prepare(folder, plan(docs, lossless), workers=1)


def test_an_unfinished_preparation_of_something_else_is_left_alone(docs, lossless, tmp_path, monkeypatch):
  monkeypatch.setattr(prepare_module, "_tokenizer", lambda *_: (_ for _ in ()).throw(KilledError))
  with pytest.raises(KilledError):
    prepare(tmp_path / "out", plan(docs, lossless), workers=1)
  with pytest.raises(UserError, match="unfinished preparation of other text"):
    prepare(tmp_path / "out", plan(docs, lossless, choice=Choice(6)), workers=1)
  os.utime(tmp_path / "docs.jsonl", ns=(0, time.time_ns()))
  with pytest.raises(UserError, match="unfinished preparation of other text"):
    prepare(tmp_path / "out", plan(docs, lossless), workers=1)
  (tmp_path / "out" / JOURNAL).write_text("{}")
  with pytest.raises(UserError, match=r"journal\.json: damaged"):
    prepare(tmp_path / "out", plan(docs, lossless), workers=1)


def test_a_finished_folder_with_a_file_missing_is_refused(docs, lossless, tmp_path):
  prepare(tmp_path / "out", plan(docs, lossless), workers=1)
  (tmp_path / "out" / "fineweb_train_000000.bin").unlink()
  with pytest.raises(UserError, match=r"fineweb_train_000000\.bin"):
    prepare(tmp_path / "out", plan(docs, lossless), workers=1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_faulty_document_is_named(write_jsonl, lossless, tmp_path, workers):
  path = write_jsonl("docs.jsonl", TEXTS)
  with path.open("a") as file:
    file.write('{"text": ""}\n')
  with pytest.raises(UserError, match=r"docs\.jsonl, line 61: an empty document"):
    prepare(tmp_path / "out", plan(open_documents(path), lossless), workers=workers)


def test_a_document_that_normalises_to_nothing_is_named(write_jsonl, normalising, tmp_path):
  train = open_documents(write_jsonl("docs.jsonl", ["a", "b", " \n "]))
  with pytest.raises(UserError, match=r"line 3: nothing is left"):
    prepare(tmp_path / "out", plan(train, normalising, choice=Choice(1)), workers=1)


def test_a_document_whose_bytes_do_not_add_up_is_named(docs, lossless, tmp_path, monkeypatch):
  surfaces = Tokenizer.surfaces

  def forgetful(tokenizer, coded, tokens_N):
    begin_N, end_N = surfaces(tokenizer, coded, tokens_N)
    return begin_N, np.minimum(end_N, end_N[-1] - 1) if "No. 2 " in caseops.decode(coded) else end_N

  monkeypatch.setattr(Tokenizer, "surfaces", forgetful)
  with pytest.raises(UserError, match=r"docs\.jsonl, line 3: its tokens stand for \d+ bytes and its text has \d+"):
    prepare(tmp_path / "out", plan(docs, lossless), workers=1)


def test_too_few_documents(docs, lossless, tmp_path):
  with pytest.raises(UserError, match=r"docs\.jsonl: 60 documents .* 61"):
    prepare(tmp_path / "a", plan(docs, lossless, choice=Choice(61)), workers=1)
  with pytest.raises(UserError, match="no document is left for train"):
    prepare(tmp_path / "b", plan(docs, lossless, choice=Choice(60)), workers=1)
  with pytest.raises(UserError, match="no document is left for training"):
    prepare(tmp_path / "c", Preparation(docs, None, Choice(60), None, 300), workers=1)


def test_settings_that_make_no_sense(docs, lossless, train_other):
  with pytest.raises(UserError, match="600 pieces where 8192"):
    Preparation(docs, None, Choice(1), lossless, 8192)
  with pytest.raises(UserError, match="at least 1"):
    plan(docs, lossless, shard_tokens=0)
  with pytest.raises(UserError, match="at least 1"):
    Choice(0)
  with pytest.raises(UserError, match="no pieces for the CaseOps markers"):
    plan(docs, train_other(model_type="bpe", byte_fallback=True))


def test_a_killed_worker_is_reported(lossless, monkeypatch):
  from pgolf_jax.data import encoding

  monkeypatch.setattr(encoding, "_encode_in_worker", os._exit)
  with pytest.raises(UserError, match="a worker process was killed"):
    list(encoding.encode_all(encoding.Encoder(lossless, is_caseops=True, held_out=None), [0], workers=2))
