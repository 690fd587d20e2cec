"""Metrics as TensorBoard events, by a thread of their own that can neither hold a run up nor end it."""

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from pgolf_jax.runtime.log import log

_MOST = 100_000  # waiting; a disk that is slower than this loses events
_PATIENCE = 10.0  # seconds that closing waits for


class Events:
  """Writes an event file; once one cannot be written it writes no more, and says so once.

  Args:
    folder: of the event files.
    first_step: steps done so far; TensorBoard drops later events of other files.
  """

  def __init__(self, folder: Path, first_step: int):
    self._folder, self._first_step = folder, first_step
    self._lines: queue.Queue[Mapping | None] = queue.Queue(_MOST)
    self._thread = threading.Thread(target=self._run, daemon=True, name="tensorboard")
    self._thread.start()

  def write(self, line: Mapping) -> None:
    """Hands over the metrics of one step; returns at once."""
    self._put(dict(line))

  def close(self) -> None:
    """Waits until all is written, but not for long."""
    self._put(None)
    self._thread.join(_PATIENCE)

  def _put(self, line: Mapping | None) -> None:
    with contextlib.suppress(queue.Full):
      self._lines.put_nowait(line)

  def _run(self) -> None:
    try:
      self._write_all()
    except OSError as error:
      log.warning(
        "%s cannot be written (%s); the run goes on without TensorBoard events.", self._folder, error.strerror
      )

  def _write_all(self) -> None:
    self._folder.mkdir(parents=True, exist_ok=True)
    path = self._folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
    writer = RecordWriter(str(path))
    try:
      step = self._first_step + 1
      for event in (Event(file_version="brain.Event:2"), Event(session_log=SessionLog(status=SessionLog.START))):
        event.wall_time, event.step = time.time(), step
        writer.write(event.SerializeToString())
      while (line := self._lines.get()) is not None:
        for name, value in line.items():
          if name != "step":
            event = Event(wall_time=time.time(), step=line["step"], summary=scalar(name, float(value)))
            writer.write(event.SerializeToString())
        if self._lines.empty():
          writer.flush()
    finally:
      writer.close()
