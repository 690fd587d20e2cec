import json
import os
import signal
import subprocess
import sys

import pytest

from pgolf_jax.errors import UserError
from pgolf_jax.runtime.files import locked

HOLDER = """
import sys, time
from pathlib import Path
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


def test_a_torn_lock_file_still_refuses(tmp_path, holder):
  (tmp_path / ".lock").write_text('{"pid"')
  with pytest.raises(UserError, match="another process"), locked(tmp_path):
    pass
