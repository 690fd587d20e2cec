"""Preparing a folder: its files, which documents are held out, and the same result after a kill."""

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

from pgolf_jax.data import caseops, corpus
from pgolf_jax.data import encode as encode_module
from pgolf_jax.data import prepare as prepare_module
from pgolf_jax.data.corpus import Holdout, open_corpus
from pgolf_jax.data.manifest import JOURNAL, MANIFEST, TOKENIZER, Manifest
from pgolf_jax.data.prepare import Preparation, prepare
from pgolf_jax.data.shards import iter_documents, list_shards, read_shard, write_shard
from pgolf_jax.data.tokenizer import Tokenizer
from pgolf_jax.errors import UserError

TEXTS = [f"The Document No. {i} of Many\n\n" + "Fellow-Citizens of the Senate, " * (i % 5 + 1) for i in range(60)]
FIRST_FIVE = Holdout(5)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
  monkeypatch.setattr(corpus, "BATCH_BYTES", 500)


@pytest.fixture
def docs(write_jsonl):
  return open_corpus(write_jsonl("docs.jsonl", TEXTS))


def plan(train, tokenizer, *, val=None, holdout=FIRST_FIVE, **options):
  return Preparation(train, val, holdout, tokenizer, tokenizer.vocab_size, **options)


def texts_in(folder: Path, split: str, tokenizer: Tokenizer) -> list[str]:
  return [
    caseops.decode(tokenizer.decode(document.tokens_N)) for document in iter_documents(list_shards(folder, split))
  ]


def contents(folder: Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_system_that_does_not_say_which_cores_may_be_used_prepares_too(docs, lossless, tmp_path, monkeypatch):
  monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
  monkeypatch.setattr(os, "cpu_count", lambda: 1)
  assert prepare(tmp_path / "out", plan(docs, lossless)).val.documents == 5


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


@pytest.mark.parametrize("holdout, held_out", [(Holdout(None, 10), TEXTS[9::10]), (Holdout(2, 10), TEXTS[9:20:10])])
def test_every_nth_document_is_held_out(docs, lossless, tmp_path, holdout, held_out):
  prepare(tmp_path, plan(docs, lossless, holdout=holdout), workers=1)
  assert texts_in(tmp_path, "val", lossless) == held_out
  assert texts_in(tmp_path, "train", lossless) == [text for text in TEXTS if text not in held_out]


def test_validation_from_a_file_of_its_own(docs, lossless, write_jsonl, tmp_path):
  held_out = open_corpus(write_jsonl("val.jsonl", ["Held out I", "Held out II", "Held out III"]))
  manifest = prepare(tmp_path / "all", plan(docs, lossless, val=held_out, holdout=Holdout(None)), workers=1)
  assert texts_in(tmp_path / "all", "val", lossless) == ["Held out I", "Held out II", "Held out III"]
  assert texts_in(tmp_path / "all", "train", lossless) == TEXTS
  assert manifest.validation == "all documents of val.jsonl"
  prepare(tmp_path / "two", plan(docs, lossless, val=held_out, holdout=Holdout(2)), workers=1)
  assert texts_in(tmp_path / "two", "val", lossless) == ["Held out I", "Held out II"]


@pytest.mark.parametrize("separate", [False, True])
def test_copies_of_held_out_documents_never_reach_training(write_jsonl, lossless, tmp_path, separate):
  train = open_corpus(write_jsonl("docs.jsonl", [*TEXTS, TEXTS[0], "new", TEXTS[4]]))
  val = open_corpus(write_jsonl("val.jsonl", TEXTS[:5])) if separate else None
  manifest = prepare(tmp_path / "out", plan(train, lossless, val=val, holdout=Holdout(5)), workers=1)
  assert texts_in(tmp_path / "out", "train", lossless) == [*TEXTS[5:], "new"]
  assert manifest.train.duplicates == (7 if separate else 2)


def test_a_tokenizer_is_trained_on_training_text_alone(write_jsonl, tmp_path):
  secret = "Zyzzogeton " * 400
  texts = [secret, *(text * 3 for text in TEXTS), secret]
  train = open_corpus(write_jsonl("docs.jsonl", texts))
  manifest = prepare(tmp_path / "out", Preparation(train, None, Holdout(1), None, 350), workers=1)
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


def test_a_script_without_a_guard_prepares_with_several_processes(write_jsonl, tmp_path):
  """Workers do not run the script that starts them: it would prepare the same folder in each."""
  source = write_jsonl("docs.jsonl", TEXTS)
  script = tmp_path / "script.py"
  script.write_text(
    "import pgolf_jax\n"
    "print('script')\n"
    f"pgolf_jax.prepare({str(tmp_path / 'out')!r}, {str(source)!r}, val_docs=4, vocab_size=350, workers=2)\n"
  )
  run = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True, timeout=120)
  assert run.stdout.splitlines() == ["script"]


def test_normalising_tokenizer_reports_what_it_loses(write_jsonl, normalising, tmp_path):
  train = open_corpus(write_jsonl("docs.jsonl", ["  both ends \n", "no end", "x"]))
  manifest = prepare(tmp_path / "out", plan(train, normalising, holdout=Holdout(2)), workers=1)
  assert (manifest.val.text_bytes, manifest.val.counted_bytes) == (19, 15)


def test_plain_text_without_caseops(docs, lossless, tmp_path):
  manifest = prepare(tmp_path / "out", plan(docs, lossless, markers="none"), workers=1)
  assert manifest.text_transform == "identity"
  first = next(iter_documents(list_shards(tmp_path / "out", "val")))
  assert lossless.decode(first.tokens_N) == TEXTS[0]


def test_done_once_is_not_done_again(docs, lossless, tmp_path):
  prepare(tmp_path / "out", plan(docs, lossless), workers=1)
  before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
  prepare(tmp_path / "out", plan(docs, lossless), workers=1)
  assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_two_at_once_do_the_work_once(docs, lossless, tmp_path, monkeypatch):
  written = []

  def write_slowly(path, tokens):
    written.append(path.name)
    time.sleep(0.05)
    write_shard(path, tokens)

  monkeypatch.setattr(prepare_module, "write_shard", write_slowly)
  with ThreadPoolExecutor(2) as pool:
    first, second = pool.map(lambda _: prepare(tmp_path / "out", plan(docs, lossless), workers=1), range(2))
  assert first == second
  assert sorted(written) == ["fineweb_train_000000.bin", "fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin"]


class KilledError(BaseException):
  pass


@pytest.mark.parametrize("after", [2, 3, 7, 12])
def test_interrupted_anywhere_it_continues_from_the_last_shard(docs, lossless, tmp_path, monkeypatch, after):
  """Stops after every number of shards written, without any clean-up, and starts again."""
  preparation = plan(docs, lossless, shard_tokens=150)
  prepare(tmp_path / "whole", preparation, workers=1)
  written = []

  def write_then_die(path, tokens):
    if len(written) % (after + 1) == after:
      written.append("killed before writing")
      path.with_name(f".{path.name}.1.partial").write_bytes(b"what a killed process leaves")
      raise KilledError
    written.append(path.name)
    write_shard(path, tokens)

  monkeypatch.setattr(prepare_module, "write_shard", write_then_die)
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
import time
from pathlib import Path
from pgolf_jax.data import corpus
from pgolf_jax.data.corpus import Holdout
from pgolf_jax.data.prepare import Preparation, prepare
corpus.BATCH_BYTES = 1 << 13
class Slow(corpus.JsonLines):  # so that a kill comes before the end on any machine
  def read(self, start):
    for document in super().read(start):
      time.sleep(0.01)
      yield document
text = Slow(Path({docs!r}))
prepare({folder!r}, Preparation(text, None, Holdout(3), None, 500, shard_tokens=5_000), workers={workers})
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
  """Kills the process, with two worker processes, twice; finished shards remain the files they are."""

  docs = write_jsonl("docs.jsonl", [f"Take {i}. {text}" for i in range(3) for text in speeches])

  def start(folder, workers):
    command = COMMAND.format(docs=str(docs), folder=str(folder), workers=workers)
    return subprocess.Popen([sys.executable, "-c", command])

  whole = start(tmp_path / "whole", 1)
  folder, kills, seen, workers = tmp_path / "killed", 0, {}, set()
  while True:
    process = start(folder, 2)
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
    prepare(folder, plan(docs, lossless, holdout=Holdout(6)), workers=1)
  (folder / MANIFEST).unlink()
  with pytest.raises(UserError, match="already holds fineweb_"):
    prepare(folder, plan(docs, lossless), workers=1)


def test_a_preparation_killed_before_its_first_shard_is_in_nobodys_way(docs, lossless, tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(prepare_module, "_write_split", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      prepare(tmp_path / "out", plan(docs, lossless), workers=1)
  assert (tmp_path / "out" / JOURNAL).exists()
  prepare(tmp_path / "out", plan(docs, lossless, holdout=Holdout(6)), workers=1)
  assert (tmp_path / "out" / MANIFEST).exists()


def test_an_unfinished_preparation_of_something_else_is_left_alone(docs, lossless, tmp_path, monkeypatch):
  write_split = prepare_module._write_split

  def write_one_split(split, *arguments):
    if split == "train":
      raise KilledError
    write_split(split, *arguments)

  monkeypatch.setattr(prepare_module, "_write_split", write_one_split)
  with pytest.raises(KilledError):
    prepare(tmp_path / "out", plan(docs, lossless), workers=1)
  with pytest.raises(UserError, match="unfinished preparation of other text"):
    prepare(tmp_path / "out", plan(docs, lossless, holdout=Holdout(6)), workers=1)
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
    prepare(tmp_path / "out", plan(open_corpus(path), lossless), workers=workers)


def test_a_document_that_normalises_to_nothing_is_named(write_jsonl, normalising, tmp_path):
  train = open_corpus(write_jsonl("docs.jsonl", ["a", "b", " \n "]))
  with pytest.raises(UserError, match=r"line 3: nothing is left"):
    prepare(tmp_path / "out", plan(train, normalising, holdout=Holdout(1)), workers=1)


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
    prepare(tmp_path / "a", plan(docs, lossless, holdout=Holdout(61)), workers=1)
  with pytest.raises(UserError, match="no document is left for train"):
    prepare(tmp_path / "b", plan(docs, lossless, holdout=Holdout(60)), workers=1)
  with pytest.raises(UserError, match="no document is left for training"):
    prepare(tmp_path / "c", Preparation(docs, None, Holdout(60), None, 300), workers=1)


def test_settings_that_make_no_sense(docs, lossless, train_other):
  with pytest.raises(UserError, match="600 pieces where 8192"):
    Preparation(docs, None, Holdout(1), lossless, 8192)
  with pytest.raises(UserError, match="--shard-tokens 0 must be 1 or more"):
    plan(docs, lossless, shard_tokens=0)
  with pytest.raises(UserError, match="--val-docs 0 must be 1 or more"):
    Holdout(0)
  with pytest.raises(UserError, match="no pieces for the CaseOps markers"):
    plan(docs, train_other(model_type="bpe", byte_fallback=True))


def test_a_killed_worker_is_reported(lossless, monkeypatch):
  monkeypatch.setattr(encode_module, "_encode_in_worker", os._exit)
  with pytest.raises(UserError, match="a worker process was killed"):
    list(encode_module.encode_all(encode_module.Encoder(lossless, markers="published", held_out=None), [0], workers=2))
