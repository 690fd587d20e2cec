"""A log or event file that cannot be written neither blocks nor ends a run."""

import errno
import threading
import time

import pytest
from tensorboardX.record_writer import RecordWriter

from pgolf_jax.runtime import events
from pgolf_jax.runtime.events import Events
from pgolf_jax.runtime.log import log, log_to

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
