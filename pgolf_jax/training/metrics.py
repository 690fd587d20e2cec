"""metrics.jsonl and TensorBoard events of a training run."""

import json
from pathlib import Path

from pgolf_jax.run_folder import read_metrics
from pgolf_jax.runtime.files import write_text


class MetricsWriter:
  """Appends one line a step; on continuing, drops the lines of steps that will be done again.

  Args:
    jsonl: path of metrics.jsonl.
    tensorboard: folder of the event files.
    first_step: steps already done; later lines are dropped.
  """

  def __init__(self, jsonl: Path, tensorboard: Path, *, first_step: int):
    kept = [line for line in read_metrics(jsonl) if line["step"] <= first_step]
    write_text(jsonl, "".join(json.dumps(line) + "\n" for line in kept))
    self._file = jsonl.open("a", encoding="utf-8")
    from tensorboardX import SummaryWriter

    self._events = SummaryWriter(str(tensorboard), purge_step=first_step + 1, flush_secs=30)

  def write(self, line: dict) -> None:
    """Writes the metrics of one step; `line["step"]` counts from 1."""
    self._file.write(json.dumps(line) + "\n")
    self._file.flush()
    for name, value in line.items():
      if name != "step":
        self._events.add_scalar(name, float(value), line["step"])

  def close(self) -> None:
    self._file.close()
    self._events.close()
