"""A program on a terminal of its own, and what its screen shows."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time

import pytest

pyte = pytest.importorskip("pyte")


class Terminal:
  """Runs a command on a pseudo-terminal.

  Args:
    command: the program and its arguments.
    columns, lines: of the screen.
    environ: variables over those of this process.
    stdout: where standard output goes if not to the terminal.

  Attributes:
    screen: what is shown now, as pyte has it.
    frames: (seconds since the start, lines shown) each time that something was drawn.
  """

  def __init__(self, command, columns=80, lines=24, environ=None, stdout=None):
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    environ = os.environ | {"TERM": "xterm-256color"} | (environ or {})
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
      environ.pop(name, None)
    self.screen = pyte.HistoryScreen(columns, lines, history=10_000)
    self._stream, self._leader = pyte.ByteStream(self.screen), leader
    self.began, self.frames = time.monotonic(), []
    self.process = subprocess.Popen(
      command, stdin=follower, stdout=follower if stdout is None else stdout, stderr=follower, env=environ,
      start_new_session=True,
    )  # fmt: skip
    os.close(follower)

  def read(self, seconds=60.0, until=None):
    """Reads what the program draws until it ends, or until `until(lines)` is true; returns the lines then shown."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
      if not select.select([self._leader], [], [], 0.1)[0]:
        continue
      try:
        data = os.read(self._leader, 65536)
      except OSError:  # the program has ended
        break
      if not data:
        break
      self._stream.feed(data)
      self.frames.append((time.monotonic() - self.began, self.shown()))
      if until is not None and until(self.frames[-1][1]):
        return self.frames[-1][1]
    else:
      raise TimeoutError("\n".join(self.shown()))
    self.process.wait(timeout=30)
    return self.shown()

  def shown(self):
    """The lines on the screen, without the empty ones at its end."""
    return "\n".join(line.rstrip() for line in self.screen.display).rstrip().split("\n")

  def everything(self):
    """The lines on the screen and those that were scrolled away."""
    history = ["".join(line[i].data for i in range(self.screen.columns)).rstrip() for line in self.screen.history.top]
    return [*history, *self.shown()]


def python(program):
  return [sys.executable, "-c", program]
