"""Figures for TensorBoard and Weights & Biases, each on a thread that can neither hold a run up nor end it."""

import contextlib
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgolf_jax.errors import UserError
from pgolf_jax.runtime.log import log

_MOST = 100_000  # waiting; a disk that is slower than this loses events


class Sink:
  """Hands figures to a thread; once they cannot be written it writes no more, and says so once.

  Args:
    where: what is written to, for the message when it cannot be.
    what: the figures' name in that message.

  Attributes:
    patience: seconds that closing waits for.
  """

  patience = 10.0

  def __init__(self, where: object, what: str):
    self._where, self._what = where, what
    self._waiting: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(_MOST)
    self._thread = threading.Thread(target=self._run, daemon=True, name=what)
    self._thread.start()

  def write(self, step: int, figures: Mapping[str, float]) -> None:
    """Hands over the figures after `step` steps; returns at once."""
    self._put((step, dict(figures)))

  def close(self) -> None:
    """Waits until all is written, but not for long."""
    self._put(None)
    self._thread.join(min(2.0, self.patience))
    if self._thread.is_alive():
      log.info("waiting for %s, up to %.0f s", self._where, self.patience)
      self._thread.join(self.patience)

  def _put(self, item: tuple[int, Mapping[str, float]] | None) -> None:
    with contextlib.suppress(queue.Full):
      self._waiting.put_nowait(item)

  def _run(self) -> None:
    try:
      self._write_all()
    except Exception as error:  # of a disk, a network or a library: the run is worth more than its figures
      reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
      log.warning("%s cannot be written (%s); the run goes on without %s.", self._where, reason, self._what)

  def _write_all(self) -> None:
    """Takes from `_waiting` until there comes None."""
    raise NotImplementedError


class Events(Sink):
  """Writes a TensorBoard event file.

  Args:
    folder: of the event files.
    first_step: steps done so far; TensorBoard drops later events of other files.
  """

  def __init__(self, folder: Path, first_step: int):
    self._folder, self._first_step = folder, first_step
    super().__init__(folder, "TensorBoard events")

  def _write_all(self) -> None:
    # The package loads PyTorch where that is installed, which takes longer than the rest of a verb's start.
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import RecordWriter
    from tensorboardX.summary import scalar

    self._folder.mkdir(parents=True, exist_ok=True)
    path = self._folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
    writer = RecordWriter(str(path))
    try:
      step = self._first_step + 1
      for event in (Event(file_version="brain.Event:2"), Event(session_log=SessionLog(status=SessionLog.START))):
        event.wall_time, event.step = time.time(), step
        writer.write(event.SerializeToString())
      while (item := self._waiting.get()) is not None:
        step, figures = item
        for name, value in figures.items():
          event = Event(wall_time=time.time(), step=step, summary=scalar(name, float(value)))
          writer.write(event.SerializeToString())
        if self._waiting.empty():
          writer.flush()
    finally:
      writer.close()


class WandB(Sink):
  """Logs to Weights & Biases; what it keeps on disk lies in the run folder. A continued run is one run there too.

  Args:
    project: its name there.
    folder: of the run.
    group: name of the set that the run belongs to; "" for none.
    config: nested values of the settings.

  Raises:
    UserError: the package is not installed, or no run can begin: without a network, or without a login.
  """

  patience = 60.0  # for what is still to be sent

  def __init__(self, project: str, folder: Path, *, group: str, config: Mapping[str, object]):
    wandb = _wandb()
    place = folder / "wandb"
    place.mkdir(parents=True, exist_ok=True)
    try:
      self._of_wandb = wandb.init(
        project=project, name=folder.name, group=group or None, config=dict(config), dir=str(folder),
        id=_run_id(place / "run-id"), resume="allow", settings=wandb.Settings(silent=True, console="off"),
      )  # fmt: skip
    except Exception as error:  # of whatever type the package has for it
      reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
      raise UserError(
        f"Weights & Biases did not start ({reason}); `wandb login` logs in, WANDB_MODE=offline keeps all on this "
        "machine, and without --wandb nothing is sent."
      ) from error
    if url := getattr(self._of_wandb, "url", None):
      log.info("Weights & Biases: %s", url)
    super().__init__("Weights & Biases", "it")

  def _write_all(self) -> None:
    try:
      while (item := self._waiting.get()) is not None:
        step, figures = item
        self._of_wandb.log({name: float(value) for name, value in figures.items()}, step=step)
    finally:
      self._of_wandb.finish()


def require_wandb() -> None:
  """Raises UserError if the package of Weights & Biases is not installed."""
  _wandb()


def _wandb() -> Any:
  try:
    import wandb  # optional, and a second to import
  except ImportError:
    raise UserError("--wandb needs the package wandb: pip install 'pgolf_jax[wandb]'.") from None
  return wandb


def _run_id(path: Path) -> str:
  """The run's name there, drawn once and kept in its folder."""
  if not path.is_file():
    path.write_text(secrets.token_hex(8) + os.linesep)
  return path.read_text().strip()
