"""metrics.jsonl and TensorBoard events of a training run."""

import json
from pathlib import Path

from tensorboardX import SummaryWriter

from pgolf_jax.run_folder import read_metrics
from pgolf_jax.runtime.files import write_json_lines


class MetricsWriter:
  """Appends one line a step; a continued run loses the lines of steps that it will do again.

  Args:
    jsonl: path of metrics.jsonl.
    tensorboard: folder of the event files.
    first_step: steps done so far; later lines are dropped.
    writes: whether this is the process that writes; the others drop what they are given.
  """

  def __init__(self, jsonl: Path, tensorboard: Path, *, first_step: int, writes: bool):
    self._writes = writes
    if not writes:
      return
    write_json_lines(jsonl, (line for line in read_metrics(jsonl) if line["step"] <= first_step))
    self._file = jsonl.open("a", encoding="utf-8")
    self._events = SummaryWriter(str(tensorboard), purge_step=first_step + 1, flush_secs=30)

  def write(self, line: dict) -> None:
    """Writes the metrics of one step; `line["step"]` counts from 1."""
    if not self._writes:
      return
    self._file.write(json.dumps(line) + "\n")
    self._file.flush()
    for name, value in line.items():
      if name != "step":
        self._events.add_scalar(name, float(value), line["step"])

  def close(self) -> None:
    """Closes both files."""
    if self._writes:
      self._file.close()
      self._events.close()
