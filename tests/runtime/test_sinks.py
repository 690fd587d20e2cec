"""A log or event file that cannot be written neither blocks nor ends a run."""

import errno
import logging
import logging.handlers
import sys
import threading
import time
import types

import pytest
from tensorboardX.record_writer import RecordWriter

from pgolf_jax.errors import UserError
from pgolf_jax.runtime import events
from pgolf_jax.runtime.events import Events, WandB
from pgolf_jax.runtime.log import log, log_to, quietly

FIGURES = {"loss": 2.5}


def test_events_are_written(tmp_path):
  sink = Events(tmp_path / "tensorboard", 0)
  sink.write(1, FIGURES)
  sink.close()
  (file,) = (tmp_path / "tensorboard").iterdir()
  assert b"loss" in file.read_bytes()


def test_a_full_disk_ends_the_events_and_not_the_run(tmp_path, monkeypatch, caplog):
  def full(self, data):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(RecordWriter, "write", full)
  monkeypatch.setattr(events, "_MOST", 10)
  sink = Events(tmp_path, 0)
  for _ in range(100):
    sink.write(1, FIGURES)
  sink.close()
  assert caplog.messages == [f"{tmp_path} cannot be written (No space left on device); the run goes on without "
                             "TensorBoard events."]  # fmt: skip


def test_a_disk_that_hangs_holds_nothing_up(tmp_path, monkeypatch):
  free = threading.Event()
  monkeypatch.setattr(RecordWriter, "write", lambda self, data: free.wait())
  monkeypatch.setattr(events, "_MOST", 10)
  monkeypatch.setattr(Events, "patience", 0.1)
  began = time.monotonic()
  sink = Events(tmp_path, 0)
  for _ in range(1000):
    sink.write(1, FIGURES)
  sink.close()
  assert time.monotonic() - began < 5
  free.set()


@pytest.fixture
def own_log():
  """The program's log, as it was afterwards."""
  handlers, propagates, level = log.handlers, log.propagate, log.level
  yield
  log.handlers, log.propagate = handlers, propagates
  log.setLevel(level)


def test_a_log_on_a_full_disk_says_so_once_and_goes_on(tmp_path, own_log, capsys):
  log_to(tmp_path / "run.log")

  class Full:
    def write(self, text):
      raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self):
      pass

  log.handlers[0].setStream(Full())
  log.info("one")
  log.info("two")
  captured = capsys.readouterr()
  said = captured.out.splitlines()
  assert [line for line in said if "cannot be written" not in line] == ["one", "two"]
  assert len(said) == 3 and "No space left on device" in "".join(said) and captured.err == ""


def test_a_log_that_cannot_be_opened_is_no_reason_to_stop(tmp_path, own_log, capsys):
  (tmp_path / "run.log").mkdir()
  log_to(tmp_path / "run.log")
  log.info("one")
  assert "cannot be written" in capsys.readouterr().out


@pytest.mark.parametrize("level", ["WARNING", "INFO"])
def test_whoever_uses_the_library_hears_what_they_asked_for(tmp_path, own_log, monkeypatch, level):
  """A handler of the root, which other libraries may have set up, and one of the program's own logger."""
  of_root, of_logger = (logging.handlers.BufferingHandler(100) for _ in range(2))
  monkeypatch.setattr(logging.root, "handlers", [of_root])
  log.handlers, log.propagate = [of_logger], True
  log.setLevel(level)
  with quietly():
    log.warning("before the run")
    log_to(tmp_path / "run.log")
    log.info("a step")
    log.warning("a fault")
  lines = ["before the run", "a step", "a fault"]
  heard = lines if level == "INFO" else ["before the run", "a fault"]
  for handler in (of_root, of_logger):
    assert [record.getMessage() for record in handler.buffer] == heard
  assert [line.split("Z ")[1] for line in (tmp_path / "run.log").read_text().splitlines()] == lines[1:]
  assert (log.handlers, log.propagate, log.level) == ([of_logger], True, getattr(logging, level))


class FakeWandB:
  """Stands for the package: a run whose `log` fails after the first figures."""

  Settings = dict

  def __init__(self):
    self.logged, self.finished = [], False

  def init(self, **given):
    self.given = given
    return self

  def log(self, figures, step):
    if self.logged:
      raise ConnectionError("the server is gone")
    self.logged.append((step, figures))

  def finish(self):
    self.finished = True


def test_wandb_failing_does_not_end_the_run(tmp_path, monkeypatch, caplog):
  fake = FakeWandB()
  monkeypatch.setitem(sys.modules, "wandb", fake)
  sink = WandB("golf", tmp_path / "run", group="set", config={"seed": 1})
  for step in (1, 2, 3):
    sink.write(step, FIGURES)
  sink.close()
  assert fake.logged == [(1, FIGURES)] and fake.finished
  assert caplog.messages == ["Weights & Biases cannot be written (the server is gone); the run goes on without it."]
  again = WandB("golf", tmp_path / "run", group="", config={})
  again.close()
  assert fake.given["id"] == (tmp_path / "run/wandb/run-id").read_text().strip() and fake.given["resume"] == "allow"


def test_wandb_that_is_not_there_or_does_not_start_is_one_sentence(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(UserError, match=r"pip install 'pgolf_jax\[wandb\]'"):
    WandB("golf", tmp_path, group="", config={})

  def refuse(**_):
    raise RuntimeError("api_key not configured (no-tty). call wandb.login()\nmore")

  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse, Settings=dict))
  with pytest.raises(UserError, match=r"did not start \(api_key not configured.*WANDB_MODE=offline") as refused:
    WandB("golf", tmp_path, group="", config={})
  assert "\n" not in str(refused.value)


def test_wandb_offline_keeps_the_figures_in_the_run_folder(tmp_path, monkeypatch):
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  sink = WandB("golf", tmp_path, group="", config={"optimizer": {"matrix_lr": 0.02}})
  for step in (1, 2):
    sink.write(step, {"bpb/artifact": 1.25})
  sink.close()
  (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
  end = time.monotonic() + 30  # a process of wandb's own writes the file, and may still be at it
  while written.read_bytes().count(b"bpb/artifact") < 2 and time.monotonic() < end:
    time.sleep(0.1)
  assert written.read_bytes().count(b"bpb/artifact") >= 2
