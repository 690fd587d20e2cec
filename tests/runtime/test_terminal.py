"""Progress and log lines on a real terminal."""

import re
import subprocess
import sys

from terminal import Terminal, python

TALK = """
import sys, time
from pathlib import Path
from pgolf_jax.runtime.log import log, log_to, progress
log_to(Path(sys.argv[1]) / "run.log")
with progress("training", total=100, unit="steps") as bar:
  time.sleep(0.9)
  for i in range(20):
    log.info("line %d of the log, which says something of about this length", i)
    if i == 5:
      print("printed by another")
    with progress("compiling", total=2, unit="programs") as inner:
      inner.advance()
      time.sleep(0.05 if i != 10 else 0.9)
    bar.note("loss 2.5")
    bar.advance(5)
log.info("the end")
"""
LINES = [f"line {i} of the log, which says something of about this length" for i in range(20)]


def test_log_lines_stand_above_the_bars_and_the_bars_vanish(tmp_path):
  terminal = Terminal([*python(TALK), str(tmp_path)])
  terminal.read()
  said = terminal.everything()
  assert said == [*LINES[:6], "printed by another", *LINES[6:], "the end"]
  with_bars = [lines for _, lines in terminal.frames if any("steps" in line for line in lines)]
  assert len(with_bars) > 5
  for lines in with_bars:
    first = next(i for i, line in enumerate(lines) if re.match("training|compiling", line))
    assert all(re.match("training|compiling", line) for line in lines[first:]), lines
    assert all(line in said for line in lines[:first]), lines
  assert any("compiling" in lines[-1] and "training" in lines[-2] for lines in with_bars)  # both at once
  assert any("5/100 steps" in line and "loss 2.5" in line for lines in with_bars for line in lines)
  assert [line.split(" ", 1)[1] for line in (tmp_path / "run.log").read_text().splitlines()] == [*LINES, "the end"]


def test_a_bar_fits_a_narrow_terminal(tmp_path):
  terminal = Terminal([*python(TALK), str(tmp_path)], columns=40)
  terminal.read()
  bars = {line for _, lines in terminal.frames for line in lines if line.startswith("training")}
  assert bars and all(len(line) <= 40 for line in bars)
  text = " ".join(terminal.everything())
  assert all(word in text for line in LINES for word in line.split()) and "the end" in text


def test_what_goes_into_a_pipe_is_not_drawn_with_the_bars(tmp_path):
  with (tmp_path / "out").open("w") as out:
    Terminal([*python(TALK), str(tmp_path)], stdout=out).read()
  assert (tmp_path / "out").read_text().splitlines() == [*LINES[:6], "printed by another", *LINES[6:], "the end"]


def test_a_sign_of_life_comes_before_anything_is_counted():
  waits = "import time; from pgolf_jax.runtime.log import progress\nwith progress('encoding'): time.sleep(1.8)"
  terminal = Terminal(python(waits))
  terminal.read()
  assert any("encoding" in lines[0] and "0:01" in lines[0] for _, lines in terminal.frames)


def test_nothing_is_drawn_on_a_terminal_that_cannot_move_its_cursor():
  waits = "import time; from pgolf_jax.runtime.log import progress\nwith progress('encoding'): time.sleep(0.8)"
  for term in ("dumb", ""):
    terminal = Terminal(python(waits), environ={"TERM": term})
    assert terminal.read() == [""]


def test_a_reader_that_goes_does_not_end_the_work(tmp_path):
  talk = TALK.replace('print("printed by another")', "pass")
  program = subprocess.Popen([*python(talk), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  assert program.stdout.readline().strip() == LINES[0]
  program.stdout.close()
  error = program.communicate(timeout=60)[1]
  assert "the end" in (tmp_path / "run.log").read_text() and program.returncode == 0 and error == ""


def test_the_start_is_shown_until_there_is_something_else_to_say():
  program = (
    "import time, sys; from pgolf_jax import cli\n"
    "def command():\n  'Waits.'\n  time.sleep(1.2); print('ready')\n"
    "cli.commands = lambda verb: {'': command}\n"
    "sys.exit(cli.main(['package']))"
  )
  terminal = Terminal([sys.executable, "-c", program])
  terminal.read()
  assert any("starting" in lines[0] for _, lines in terminal.frames)
  assert terminal.everything() == ["ready"]
