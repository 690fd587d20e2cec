"""Faults that must lose nothing: kills, signals, damaged files, full disks, two processes on one folder.

    python tests/soak/faults.py --kills 300 --signals 60 --damages 100 --full 30 --two 20 --seed 0

Every case runs `pgolf data prepare`, `pgolf run` (without the audit) and `pgolf package` in processes of their own,
disturbs them, gives the same commands again, and compares all that they leave with what an undisturbed run left, bit
for bit. Processes are forked from this one, which has imported everything and touched no device. Exit status 1 if a
count of the table that should be 0 is not.
"""

import argparse
import collections
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

from pgolf_jax import stages
from pgolf_jax.cli import commands, main
from pgolf_jax.scoring import ttt
from pgolf_jax.submission import bundle

HANGS_AFTER = 240.0  # seconds of one command
MOST_MEMORY = 4096  # MiB
CONFIG = """
seed = 1337
[data]
caseops = false
[model]
vocab_size = 1088
num_layers = 2
model_dim = 64
num_heads = 4
num_kv_heads = 2
mlp_mult = 2.0
num_loops = 0
parallel_start_layer = 1
rope_dims = 8
xsa_last_n = 2
[optimizer]
muon_dtype = "float32"
[train]
compute_dtype = "float32"
iterations = 40
max_wallclock_seconds = 0.0
batch_tokens = 256
micro_batches = 1
world_size = 1
seq_len = 32
seq_schedule = "32@1.0"
warmup_steps = 1
ema_decay = 0.9
checkpoint_every_steps = 5
[eval]
batch_tokens = 512
micro_batches = 1
seq_len = 32
[quantize]
calibration_batches = 2
calibration_micro_batches = 1
reserve_seconds = 0.0
[ttt]
method = "cached"
batch_size = 3
seq_len = 32
chunk_size = 16
[ttt.lora]
rank = 4
lr = 0.01
[ttt.short]
score_first = false
[ttt.phase]
prefix_docs = 9
count = 3
chunk_tokens = 96
lr = 0.02
[hints]
order = 4
threshold = 0.5
"""
COUNTS = ("wrong results", "hangs", "crashes", "foreign exceptions")


class Wrong(Exception):
  """What a case found; `kind` is one of COUNTS."""

  def __init__(self, kind: str, message: str):
    super().__init__(message)
    self.kind = kind


class Life:
  """One folder with data, a run and its submission, and the commands that make them."""

  def __init__(self, folder: Path, place: Path):
    self.folder, self.place, self.log = folder, place, folder.with_suffix(".log")
    self.memory = 0
    folder.mkdir(parents=True, exist_ok=True)

  @property
  def run(self) -> Path:
    return self.folder / "run"

  def commands(self) -> list[list[str]]:
    text, workers = str(self.place / "docs.jsonl"), ["--workers", "1"]
    prepared = str(self.folder / "data")
    return [
      ["data", "prepare", "--out", prepared, "--train", text, "--val-docs", "14", "--vocab-size", "1088",
       "--no-caseops", "--shard-tokens", "6000", *workers],
      ["run", str(self.place / "tiny.toml"), "--out", str(self.run), "--data.path", prepared],
      ["package", str(self.run)],
    ]  # fmt: skip

  def start(self, command: list[str], save_seconds: float = 0.0) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=_child, args=(command, self.log, save_seconds))
    process.start()
    return process

  def wait(self, process: multiprocessing.Process, until=lambda: False) -> int | None:
    """Returns the exit status, or None as soon as `until()` holds."""
    began = time.monotonic()
    while process.is_alive():
      self._look_at_memory(process.pid)
      if until():
        return None
      if time.monotonic() - began > HANGS_AFTER:
        kill(process)
        raise Wrong("hangs", f"no end after {HANGS_AFTER:.0f} s: {self.last_words()}")
      process.join(0.004)
    return process.exitcode

  def _look_at_memory(self, pid: int) -> None:
    try:
      peak = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
      return
    self.memory = max(self.memory, int(peak[1]) // 1024 if peak else 0)

  def last_words(self) -> str:
    said = self.log.read_text(errors="replace").strip() if self.log.exists() else ""
    return said.splitlines()[-1][:300] if said else "(silent)"

  def finish(self) -> None:
    """Gives all commands, none of which may fail."""
    for command in self.commands():
      if command[0] == "package" and (self.run / "submission" / "submission.json").exists():
        continue  # it is there, whole
      status = self.judge(self.wait(self.start(command)))
      if status != 0:
        raise Wrong("wrong results", f"{command[0]} refuses: {self.last_words()}")

  def judge(self, status: int) -> int:
    """Returns the exit status of a command that ended as commands may end."""
    words = self.last_words()
    if status in (0, 130, 143):
      return status
    if status != 1:
      raise Wrong("crashes", f"exit status {status}: {words}")
    if not words.startswith("pgolf: ") or re.match(r"pgolf: \w+: .*shows where\)$", words):
      raise Wrong("foreign exceptions", words)
    return status

  def fingerprint(self) -> dict[str, str]:
    """Returns what must be equal to the bit."""
    marks = {f"data/{path.name}": _hash(path) for path in (self.folder / "data").iterdir()}
    scores = ("nll.npy", "model_nll.npy", "hint_nll.npy", "times.npy", "trace.jsonl", "documents.jsonl")
    marks |= {name: _hash(self.run / "scores" / name) for name in scores}
    marks["artifact"] = _hash(self.run / "artifact.pgolf")
    lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
    marks["metrics"] = json.dumps([{k: v for k, v in line.items() if k != "seconds"} for line in lines])
    results = json.loads((self.run / "results.json").read_text())
    marks |= {f"{stage}.{n}": str(results[stage][n]) for stage in ("plain", "artifact", "ttt") for n in ("loss", "bpb")}
    marks |= {f"train.{name}": str(results["train"][name]) for name in ("steps", "weights", "parameters")}
    files = ("artifact.pgolf", "code.tar.xz", "evaluate.py", "requirements.txt", "tokenizer.model")
    marks |= {f"submission/{name}": _hash(self.run / "submission" / name) for name in files}
    score = json.loads((self.run / "submission" / "submission.json").read_text())["score"]
    return marks | {"submission bpb": str(score["bpb"])}


def _child(command: list[str], log: Path, save_seconds: float) -> None:
  os.setsid()
  output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  os.dup2(output, 1)
  os.dup2(output, 2)
  stages.STAGES.pop("audit")
  ttt.Options = partial(ttt.Options, save_seconds=save_seconds)
  sys.argv = ["pgolf", *command]
  try:
    status = main(command)
  except SystemExit as end:
    status = end.code
  except BaseException:
    traceback.print_exc()
    status = 99
  sys.stdout.flush()
  sys.exit(status)


def kill(process: multiprocessing.Process) -> None:
  try:
    os.killpg(process.pid, signal.SIGKILL)
  except ProcessLookupError:  # it has not made its group yet, or is gone
    process.kill()
  process.join()


def _hash(path: Path) -> str:
  return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "absent"


class Soak:
  """Cases, and the table of what they found."""

  def __init__(self, work: Path, seed: int, until: float):
    self.work, self.rng, self.until = work, random.Random(seed), until
    self.rows: dict[str, collections.Counter] = {}
    self.faults: list[str] = []
    words = ["".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=2 + i % 6)) for i in range(500)]
    texts = [" ".join(random.Random(i).choices(words, k=15 + i * 7 % 45)) for i in range(400)]
    (work / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (work / "tiny.toml").write_text(CONFIG)
    print("the undisturbed run", flush=True)
    self.home = work / "home"  # settings name the data folder, so that what is copied must lie where it was made
    self.whole = Life(self.home, work)
    self.seconds = []
    for _ in range(2):  # the first compiles
      shutil.rmtree(self.whole.folder)
      self.whole.folder.mkdir()
      self.seconds = []
      for command in self.whole.commands():
        began = time.monotonic()
        if self.whole.wait(self.whole.start(command)) != 0:
          raise SystemExit(f"the undisturbed run fails: {self.whole.last_words()}")
        self.seconds.append(time.monotonic() - began)
    self.truth = self.whole.fingerprint()
    self.whole.folder = self.home.rename(work / "whole")
    print("seconds of prepare, run, package:", *(f"{s:.1f}" for s in self.seconds), flush=True)

  def cases(self, kind: str, wanted: int, act) -> None:
    """Makes cases until there were as many disturbances as wanted, or the time is over."""
    row, number = self.rows.setdefault(kind, collections.Counter()), 0
    while row["count"] < wanted and time.monotonic() < self.until:
      self.case(kind, number, partial(act, number))
      number += 1
      print(f"{kind}: {row['count']} of {wanted}", flush=True)

  def case(self, kind: str, number: int, act) -> None:
    """Makes one case: `act(life)` disturbs it and returns how many disturbances there were; then all must be equal."""
    row = self.rows[kind]
    life = Life(self.home, self.work)
    note = ""
    try:
      done, note = act(life)
      row["count"] += done
      life.finish()
      found = life.fingerprint()
      if differing := [name for name in self.truth if found[name] != self.truth[name]]:
        raise Wrong("wrong results", f"differing: {', '.join(differing)}")
      if leftovers := [str(p) for p in life.folder.rglob("*.partial")]:
        raise Wrong("wrong results", f"left over: {leftovers[0]}")
    except Wrong as wrong:
      row[wrong.kind] += 1
      self.faults.append(f"{kind} {number} ({note}): {wrong}")
      print("FAULT", self.faults[-1], flush=True)
    row["memory"] = max(row["memory"], life.memory)
    self.tear_down(life)

  def tear_down(self, life: Life) -> None:
    if os.path.ismount(life.folder):
      subprocess.run(["umount", "-l", str(life.folder)], check=True)
    shutil.rmtree(life.folder, ignore_errors=True)
    life.log.unlink(missing_ok=True)

  def moment(self, life: Life, command: int):
    """Returns a condition that comes true at a random moment: after some time, or at some change in the folder."""
    began, rng = time.monotonic(), self.rng
    if rng.random() < (0.35, 0.3, 0.5)[command]:
      after = rng.uniform(0.0, min(0.9 * self.seconds[command], rng.choice((0.5, 4.0, 4.0, 20.0))))
      return lambda: time.monotonic() - began > after
    left = [int(rng.expovariate(1 / 7)) + 1]
    last = [_listing(life.folder)]
    delay, at = rng.choice((0.0, 0.002, 0.02, 0.1)), []

    def changed() -> bool:
      now = _listing(life.folder)
      if now != last[0]:
        last[0] = now
        left[0] -= 1
        if left[0] == 0:
          at.append(time.monotonic())
      return bool(at) and time.monotonic() - at[0] >= delay

    return changed

  def interrupted(self, life: Life, signums: tuple[int, ...]) -> tuple[int, str]:
    """Runs all commands, ending each a few times by a signal at a random moment."""
    done = 0
    for index, command in enumerate(life.commands()):
      for _ in range({0: 12, 1: 20, 2: 8}[index]):
        process = life.start(command, save_seconds=self.rng.choice((0.0, 0.0, 0.3, 20.0)))
        status = life.wait(process, self.moment(life, index))
        if status is not None:
          life.judge(status)
          break
        signum = self.rng.choice(signums)
        done += 1
        if signum == signal.SIGKILL:
          kill(process)
          continue
        os.kill(process.pid, signum)
        status = life.judge(life.wait(process) if process.is_alive() or process.exitcode is None else process.exitcode)
        if status not in (0, 128 + signum):
          raise Wrong("wrong results", f"{signal.Signals(signum).name} gave exit status {status}: {life.last_words()}")
        if status == 0:
          break
    return done, "interrupted"

  def bases(self) -> list[Path]:
    """Makes folders to damage: the whole one, one that is training, one that is scoring."""
    made = [self.whole.folder]
    for name, ready in (("training", "checkpoints/20"), ("scoring", "scores/progress-before.json")):
      life = Life(self.home, self.work)
      life.judge(life.wait(life.start(life.commands()[0])))
      process = life.start(life.commands()[1])
      life.wait(process, lambda life=life, ready=ready: (life.run / ready).exists())
      kill(process)
      made.append(self.home.rename(self.work / name))
    return made

  def damaged(self, life: Life, base: Path) -> tuple[int, str]:
    shutil.rmtree(life.folder)
    shutil.copytree(base, life.folder)
    files = [path for path in sorted(life.run.rglob("*")) if path.is_file()]
    path = self.rng.choice(files)
    how = self.rng.choice(("truncated", "flipped", "emptied", "removed", "made a folder", "made another text"))
    before = path.read_bytes()
    match how:
      case "truncated":
        path.write_bytes(before[: self.rng.randrange(len(before) or 1)])
      case "flipped":
        flipped = bytearray(before or b"x")
        flipped[self.rng.randrange(len(flipped))] ^= 1 << self.rng.randrange(8)
        path.write_bytes(bytes(flipped))
      case "emptied":
        path.write_bytes(b"")
      case "removed" | "made a folder":
        path.unlink()
        if how == "made a folder":
          path.mkdir()
      case "made another text":
        path.write_text(self.rng.choice(("[]", "null", "7", '{"a": 1}\n', "\xff\n")))
    if path.is_relative_to(life.run / "submission"):  # a new one takes its place
      life.judge(life.wait(life.start(life.commands()[2])))
    note = f"{base.name}: {path.relative_to(life.folder)} {how}"
    status = life.judge(life.wait(life.start(life.commands()[1])))
    if status == 1 and path.name == "config.toml":  # settings cannot be guessed: what the message says is done
      if path.is_dir():
        path.rmdir()
      path.unlink(missing_ok=True)
    elif status == 1:
      raise Wrong("wrong results", f"{note}: refused: {life.last_words()}")
    return 1, note

  def full(self, life: Life, size: int) -> tuple[int, str]:
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(life.folder)]
    subprocess.run(mount, check=True)
    done = 0
    for command in life.commands():
      status = life.judge(life.wait(life.start(command)))
      if status == 0:
        continue
      done += 1
      if "no room on the disk" not in life.last_words():
        raise Wrong("wrong results", f"{size} KiB: a full disk is not named: {life.last_words()}")
      subprocess.run(["mount", "-o", "remount,size=400m", str(life.folder)], check=True)
      break
    return done, f"{size} KiB"

  def two(self, life: Life) -> tuple[int, str]:
    life.judge(life.wait(life.start(life.commands()[0])))
    first = life.start(life.commands()[1])
    lock = life.run / ".lock"
    life.wait(first, lambda: lock.exists() and lock.stat().st_size > 0)
    began, after = time.monotonic(), self.rng.uniform(0, 0.8 * self.seconds[1])
    life.wait(first, lambda: time.monotonic() - began > after)
    other = Life(self.work / "other", self.work)
    other.commands = life.commands
    verb = self.rng.choice((1, 1, 2))
    status = other.judge(other.wait(other.start(life.commands()[verb])))
    if first.is_alive() and (status != 1 or "in use by process" not in other.last_words()):
      raise Wrong("wrong results", f"the second process was let in: {other.last_words()}")
    life.judge(life.wait(first))
    self.tear_down(other)
    return 1, "two"

  def table(self) -> str:
    head = f"{'kind':<20}{'count':>7}" + "".join(f"{name:>20}" for name in COUNTS) + f"{'peak MiB':>10}"
    lines = [head]
    for kind, row in self.rows.items():
      lines.append(f"{kind:<20}{row['count']:>7}" + "".join(f"{row[n]:>20}" for n in COUNTS) + f"{row['memory']:>10}")
    return "\n".join(lines)


def _listing(folder: Path) -> tuple:
  found = []
  for root, _, names in os.walk(folder):
    for name in names:
      try:
        stat = os.stat(os.path.join(root, name))
      except OSError:
        continue
      found.append((root, name, stat.st_size))
  return tuple(found)


def soak(options: argparse.Namespace, work: Path) -> Soak:
  for verb in ("data", "run", "package"):
    commands(verb)  # imports it, for all processes to come
  bundle.code()  # packs it, likewise
  soak = Soak(work, options.seed, time.monotonic() + options.seconds)
  soak.cases("kills", options.kills, lambda _, life: soak.interrupted(life, (signal.SIGKILL,)))
  soak.cases("signals", options.signals, lambda _, life: soak.interrupted(life, (signal.SIGTERM, signal.SIGINT)))
  bases = soak.bases() if options.damages else []
  soak.cases("damaged files", options.damages, lambda number, life: soak.damaged(life, bases[number % len(bases)]))
  if options.full and not _can_mount(work):
    print("full disks: SKIPPED, for this process may not mount a file system")
    options.full = 0
  used = sum(path.stat().st_size for path in soak.whole.folder.rglob("*") if path.is_file()) // 1024
  soak.cases("full disks", options.full, lambda _, life: soak.full(life, soak.rng.randrange(40, int(used * 1.3))))
  soak.cases("two processes", options.two, lambda _, life: soak.two(life))
  return soak


def _can_mount(work: Path) -> bool:
  probe = work / "probe"
  probe.mkdir()
  mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(probe)], capture_output=True)
  if mounted.returncode == 0:
    subprocess.run(["umount", str(probe)], check=True)
  return mounted.returncode == 0


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  for name, count in (("kills", 300), ("signals", 60), ("damages", 100), ("full", 30), ("two", 20), ("seed", 0)):
    parser.add_argument(f"--{name}", type=int, default=count)
  parser.add_argument("--seconds", type=float, default=1e9, help="begin no further case after so long")
  options = parser.parse_args()
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
  os.environ.setdefault("PGOLF_CACHE", str(Path(tempfile.gettempdir()) / "pgolf-soak-cache"))
  with tempfile.TemporaryDirectory(prefix="pgolf-faults-") as work:
    began = time.monotonic()
    done = soak(options, Path(work))
    print(f"\n{done.table()}\n\n{(time.monotonic() - began) / 60:.1f} minutes, seed {options.seed}")
  bad = sum(row[name] for row in done.rows.values() for name in COUNTS)
  bad += sum(row["memory"] > MOST_MEMORY for row in done.rows.values())
  raise SystemExit(int(bad > 0))
