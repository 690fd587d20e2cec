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

from pgolf_jax.errors import UserError
from pgolf_jax.runtime.files import write_json, write_text
from pgolf_jax.settings import Settings
from pgolf_jax.settings.load import from_toml, to_dict


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
    """Stage → what it reported, for the stages that are complete."""
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
  """The lines of a metrics.jsonl; a last line that a kill cut short is left out."""
  if not path.exists():
    return []
  lines = path.read_text(encoding="utf-8").split("\n")
  return [json.loads(line) for line in lines[:-1] if line]


def _first_difference(a: Settings, b: Settings) -> str:
  old, new = to_dict(a), to_dict(b)
  for section in old:
    if old[section] != new[section]:
      if not isinstance(old[section], dict):
        return f"{section} was {old[section]}, now {new[section]}"
      keys = sorted(old[section].keys() | new[section].keys())
      key = next(k for k in keys if old[section].get(k) != new[section].get(k))
      return f"{section}.{key} was {old[section].get(key)}, now {new[section].get(key)}"
  return "they differ"
