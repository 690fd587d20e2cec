import errno
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from pgolf_jax.errors import UserError
from pgolf_jax.runtime import files
from pgolf_jax.runtime.files import locked

HOLDER = """
import sys, time
from pathlib import Path
from pgolf_jax.runtime import files
from pgolf_jax.runtime.files import locked
with locked(Path(sys.argv[1])):
  print("locked", flush=True)
  time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
  """Another process that holds the lock of `tmp_path`."""
  process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "locked\n"
  yield process
  process.kill()
  process.wait()


def test_a_second_process_is_told_who_has_the_folder(tmp_path, holder):
  with pytest.raises(UserError, match=rf"in use by process {holder.pid} on .+ since 20"), locked(tmp_path):
    pass


def test_a_killed_process_leaves_no_lock(tmp_path, holder):
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  with locked(tmp_path):
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
  with locked(tmp_path):
    pass


def test_a_block_that_fails_leaves_no_holder(tmp_path):
  with pytest.raises(ValueError, match="in the block"), locked(tmp_path):
    assert files.is_held(tmp_path)
    raise ValueError("in the block")
  assert not files.is_held(tmp_path) and (tmp_path / ".lock").read_text() == ""


def test_a_torn_lock_file_still_refuses(tmp_path, holder):
  (tmp_path / ".lock").write_text('{"pid"')
  with pytest.raises(UserError, match="another process"), locked(tmp_path):
    pass


@pytest.fixture
def without_locks(monkeypatch):
  """A file system that knows no locks."""

  def flock(file, operation):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(files.fcntl, "flock", flock)


@pytest.mark.parametrize(
  "host, pid, is_free",
  [("here", "dead", True), ("here", "alive", False), ("elsewhere", "dead", False), ("", "", True)],
)
def test_where_the_file_system_has_no_locks_the_file_says_who_has_the_folder(
  tmp_path, without_locks, holder, host, pid, is_free
):
  if pid == "dead":
    holder.kill()
    holder.wait()
  owner = {"host": socket.gethostname() if host == "here" else host, "pid": holder.pid, "time": "2026-01-01"}
  (tmp_path / ".lock").write_text(json.dumps(owner) if host else "")
  if is_free:
    with locked(tmp_path):
      pass
  else:
    with pytest.raises(UserError, match=f"process {holder.pid} on .* since 2026-01-01.*delete"), locked(tmp_path):
      pass


def test_a_folder_in_the_place_of_the_lock_is_no_lock(tmp_path):
  (tmp_path / ".lock").mkdir()
  with locked(tmp_path):
    assert (tmp_path / ".lock").is_file()
