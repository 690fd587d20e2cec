"""A run folder: everything one run writes, and what its stages need to continue where they were cut off.

config.toml          the resolved settings
metrics.jsonl        one line a step
tensorboard/         the same as events
run.log              what was printed, with times
checkpoints/         Orbax: parameters, average, optimizer state, progress
results.json         what each finished stage reported
artifact.pgolf       the quantised model
scores/              per-document scores
"""

import json
from pathlib import Path

import tomli_w
from tensorboardX import SummaryWriter

from pgolf_jax.errors import UserError
from pgolf_jax.runtime.files import write_json, write_json_lines, write_text
from pgolf_jax.settings import Settings
from pgolf_jax.settings.load import differences, from_toml, to_dict


class RunFolder:
  """Opens or creates the folder of one run.

  Args:
    path: the folder.
    settings: of the run; None opens a folder that exists with the settings it was made with.

  Raises:
    UserError: the folder was made with other settings, or does not exist and no settings are given.
  """

  def __init__(self, path: str | Path, settings: Settings | None = None):
    self.path = Path(path)
    config = self.path / "config.toml"
    if config.exists():
      made_with = from_toml(config)
      if settings is not None and made_with != settings:
        raise UserError(
          f"{self.path} was made with other settings ({_first_difference(made_with, settings)}); "
          "choose another folder with --out, or the settings it was made with."
        )
      settings = made_with
    elif settings is None:
      raise UserError(f"{self.path} is not a run folder: it has no config.toml; `pgolf run CONFIG` makes one.")
    else:
      self.path.mkdir(parents=True, exist_ok=True)
      write_text(config, tomli_w.dumps(to_dict(settings)))
    self.settings = settings

  @property
  def checkpoints(self) -> Path:
    return self.path / "checkpoints"

  @property
  def metrics(self) -> Path:
    return self.path / "metrics.jsonl"

  @property
  def artifact(self) -> Path:
    return self.path / "artifact.pgolf"

  @property
  def log(self) -> Path:
    return self.path / "run.log"

  @property
  def scores(self) -> Path:
    return self.path / "scores"

  def results(self) -> dict[str, dict]:
    """Returns stage → what it reported, for the stages that are complete."""
    path = self.path / "results.json"
    if not path.exists():
      return {}
    try:
      return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
      raise UserError(f"{path} is damaged ({e}); delete it to run the stages again.") from None

  def finish(self, stage: str, result: dict) -> None:
    """Marks a stage as complete."""
    write_json(self.path / "results.json", {**self.results(), stage: result})


def read_metrics(path: Path) -> list[dict]:
  """Returns the lines of a metrics.jsonl; a last line that a kill cut short is left out."""
  if not path.exists():
    return []
  lines = path.read_text(encoding="utf-8").split("\n")
  return [json.loads(line) for line in lines[:-1] if line]


def _first_difference(made_with: Settings, asked_for: Settings) -> str:
  name, (old, new) = next(iter(differences(made_with, asked_for).items()))
  return f"{name} was {old}, now {new}"


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
