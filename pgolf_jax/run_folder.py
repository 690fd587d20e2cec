"""A run folder: everything one run writes, and what its stages need to continue where they were cut off.

config.toml          the resolved settings
paths.json           the folder that their relative paths count from
metrics.jsonl        one line a step
tensorboard/         the same as events, and the score of each stage
wandb/               what Weights & Biases keeps, with --wandb
run.log              what was printed, with times
checkpoints/         Orbax: parameters, average, optimizer state, progress
results.json         what each finished stage reported
artifact.pgolf       the quantised model
artifact_nll.npy     nats of every validation target under it, without test-time training
scores/              per-document scores
report/              a page with figures, where the extra `report` is installed
damaged/             checkpoints that were not as they were written; nothing reads them
converted.json       in place of training: where the weights came from that `pgolf convert` put here
"""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pgolf_jax.data.manifest import MANIFEST, sha256_of, tokenizer_file
from pgolf_jax.data.shards import list_shards
from pgolf_jax.errors import UserError, shown
from pgolf_jax.runtime.events import Events, Sink
from pgolf_jax.runtime.files import (
  is_sealed,
  json_hash,
  read_json,
  read_json_lines,
  remove,
  remove_partials,
  seal,
  unsealed,
  write_json,
  write_json_lines,
  write_text,
)
from pgolf_jax.runtime.log import log, progress
from pgolf_jax.settings import Settings
from pgolf_jax.settings.load import differences, from_toml, to_dict


class RunFolder:
  """Opens or creates the folder of one run.

  Args:
    path: the folder.
    settings: of the run; None opens a folder that exists with the settings it was made with.

  Attributes:
    given: the settings as they are in config.toml.
    settings: the same; relative paths that lead nowhere from the current folder are given in full.
    sinks: what takes the run's figures beside metrics.jsonl and TensorBoard; who opened one closes it.

  Raises:
    UserError: the folder was made with other settings, or does not exist and no settings are given.
  """

  def __init__(self, path: str | Path, settings: Settings | None = None):
    self.path = Path(path)
    self.sinks: list[Sink] = []
    self._warned: set[str] = set()
    if settings is not None:
      self._make_way()
    config = self.path / "config.toml"
    if (made_with := _read_config(config, settings)) is not None:
      if settings is not None and made_with != settings:
        if self.has_work():
          raise UserError(
            f"{self.path} was made with other settings ({_first_difference(made_with, settings)}); "
            "choose another folder with --out, or the settings it was made with; if config.toml is damaged, delete it."
          )
        self._begin(settings)
      self.given = settings or made_with
    elif settings is None:
      raise UserError(f"{self.path} is not a run folder: it has no config.toml; `pgolf run CONFIG` makes one.")
    else:
      self._begin(settings)
      self.given = settings
    self.settings = self._with_paths_from_here(is_asked_now=settings is not None)

  def _begin(self, settings: Settings) -> None:
    """Writes what a run starts with."""
    import tomli_w  # a machine that only measures has it not

    self.path.mkdir(parents=True, exist_ok=True)
    here, path = Path.cwd(), self.path.resolve()
    above = os.path.relpath(here, path) if path.is_relative_to(here) else str(here)
    write_json(self.path / PATHS, {"relative_to": above})
    write_text(self.path / "config.toml", tomli_w.dumps(to_dict(settings)))

  def _with_paths_from_here(self, *, is_asked_now: bool) -> Settings:
    """The settings, with relative paths seen from where they were given first, or are given now and lead somewhere."""
    try:
      base = self.path / read_json(self.path / PATHS)["relative_to"]
    except (UserError, KeyError, TypeError):  # of an older version, or copied without it
      return self.given
    found = {}
    for name in ("path", "tokenizer"):
      given = getattr(self.given.data, name)
      there = (base / given).resolve()
      is_elsewhere = given not in ("", "default") and there.exists() and there != Path(given).resolve()
      if is_elsewhere and not (is_asked_now and Path(given).exists()):
        found[name] = str(there)
    return dataclasses.replace(self.given, data=dataclasses.replace(self.given.data, **found))

  def has_work(self) -> bool:
    """Returns whether there is anything in the folder that a run made and another would have to make again."""
    saved = self.checkpoints.is_dir() and any(path.name.isdigit() for path in self.checkpoints.iterdir())
    return saved or any(path.exists() for path in (self.path / "results.json", self.artifact, self.scores))

  def clear_start(self) -> None:
    """Deletes what a start left that came to nothing, and the folder if nothing else is in it."""
    if self.has_work():
      return
    for name in ("config.toml", PATHS, ".lock", "metrics.jsonl", "run.log", "tensorboard", "wandb", "checkpoints"):
      remove(self.path / name)
    with contextlib.suppress(OSError):  # something of another's is in it
      self.path.rmdir()

  def _make_way(self) -> None:
    """Deletes folders that lie where files will be written, and what a killed process left of files."""
    if self.path.is_dir():
      remove_partials(self.path)
    for path in (self.path / "config.toml", self.path / "results.json", self.metrics, self.artifact, self.log):
      if path.is_dir():
        log.warning("%s is a folder where a file belongs, and is removed.", path)
        remove(path)
    if self.scores.exists() and not self.scores.is_dir():
      log.warning("%s is a file where a folder belongs, and is removed.", self.scores)
      remove(self.scores)

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
  def artifact_nll(self) -> Path:
    return self.path / "artifact_nll.npy"

  @property
  def log(self) -> Path:
    return self.path / "run.log"

  @property
  def tensorboard(self) -> Path:
    return self.path / "tensorboard"

  @property
  def scores(self) -> Path:
    return self.path / "scores"

  def show(self, step: int, figures: Mapping[str, float]) -> None:
    """Writes figures of the run after `step` steps for TensorBoard and the sinks."""
    events = Events(self.tensorboard, step)
    for sink in (events, *self.sinks):
      sink.write(step, figures)
    events.close()

  def results(self) -> dict[str, dict]:
    """Returns stage → what it reported, for the stages that are complete.

    A damaged file counts as an absent one, and a stage that is not as `finish` wrote it as one that is not complete:
    what it reported is found again from what it left on disk.
    """
    path = self.path / "results.json"
    if not path.exists():
      return {}
    try:
      results = read_json(path)
    except UserError as damage:
      self._warn(f"{damage} The stages report again.")
      return {}
    whole = {}
    for stage in filter(results.__contains__, STAGES):
      if isinstance(results[stage], dict) and is_sealed(results[stage]):
        whole[stage] = unsealed(results[stage])
      else:
        self._warn(f"{path}: what it says of {stage} is damaged; that stage reports again.")
    return whole

  def figures(self) -> dict[str, dict]:
    """Returns the results that belong together: no stage that read what a stage before it has since replaced."""
    results = self.results()
    current, now = {}, {"results": _hash_before_audit(results)}
    for stage, result in results.items():
      read, made = result.get("made_from", {}), result.get("made", {})
      if all(read.get(name, value) == value for name, value in now.items()):
        current[stage] = result
        now |= made | ({"weights": result["weights"]} if "weights" in result else {})
      else:
        now |= dict.fromkeys(made)  # what was made of replaced files serves no later stage
    return current

  def _warn(self, message: str) -> None:
    """Says something once, however often it is found."""
    if message not in self._warned:
      log.warning(message)
      self._warned.add(message)

  def finish(self, stage: str, result: dict, made_from: dict[str, str]) -> None:
    """Marks a stage as complete: what it reports, what it read, and what it left on disk."""
    ties = {"made_from": made_from, "made": _hashes(self.path, self._outputs(stage, result))}
    path, results = self.path / "results.json", self.results() | {stage: result | ties}
    write_json(path, {name: seal(values) for name, values in results.items()})

  def changes(self, stage: str, made_from: dict[str, str]) -> list[str]:
    """Returns the names of files that are not those which a complete stage read, or left on disk.

    Args:
      made_from: what the stage would read now.
    """
    result = self.results()[stage]
    now = {"made_from": made_from, "made": _hashes(self.path, self._outputs(stage, result))}
    recorded = {name: result.get(name, {}) for name in now}
    names = {(part, name): None for values in (recorded, now) for part in values for name in values[part]}
    return [name for part, name in names if recorded[part].get(name) != now[part].get(name)]

  def _outputs(self, stage: str, result: dict) -> list[Path]:
    """Returns the files of a complete stage that later stages, or a reader of its figures, rely on."""
    match stage:
      case "train":
        return [self.metrics, *sorted((self.checkpoints / str(result["steps"])).rglob("*"))]
      case "artifact":
        return [self.artifact]
      case "ttt":
        return [self.scores / name for name in SCORES]
    return []


PATHS = "paths.json"

SCORES = ("identity.json", "nll.npy", "model_nll.npy", "hint_nll.npy", "times.npy", "trace.jsonl", "documents.jsonl")
"""Files of a finished evaluation."""

CONVERTED = "converted.json"

STAGES = ("train", "plain", "artifact", "ttt", "audit")
"""In the order in which a run does them."""

_SPLITS = {
  "train": ["train"],
  "plain": ["val", "val_bytes"],
  "artifact": ["train", "val", "val_bytes"],
  "ttt": ["val", "val_bytes"],
  "audit": ["train", "val", "val_bytes"],
}


def made_from(run: RunFolder, stage: str, data_folder: str | Path) -> dict[str, str]:
  """Returns name → SHA-256 of everything that a stage of this run reads, as it lies on disk now.

  A file that is not there has no entry. The weights that training made stand under the hash that it reported.

  Args:
    stage: train, plain, artifact, ttt or audit.
    data_folder: its shards, manifest and tokenizer.

  Raises:
    UserError: the data folder does not exist, or lacks the shards that the stage reads.
  """
  if stage == "train" and (run.path / CONVERTED).is_file():
    return _hashes(run.path, [run.path / CONVERTED])
  data_folder, shards = Path(data_folder), shards_of(run, stage, data_folder)
  tokenizer = tokenizer_file(run.settings, data_folder)
  hashes = {"config": json_hash(to_dict(run.given))}
  hashes |= _hashes(data_folder, [data_folder / MANIFEST, tokenizer, *shards])
  if stage in ("plain", "artifact"):
    hashes["weights"] = run.results().get("train", {}).get("weights", "")
  if stage in ("ttt", "audit"):
    hashes |= _hashes(run.path, [run.artifact])
  if stage == "audit":
    hashes |= _hashes(run.path, [run.metrics, *(run.scores / name for name in SCORES)])
    hashes["results"] = _hash_before_audit(run.results())
  return hashes


def _hash_before_audit(results: Mapping[str, dict]) -> str:
  """Returns the hash of the results that an audit reads."""
  return json_hash({stage: result for stage, result in results.items() if stage != "audit"})


def shards_of(run: RunFolder, stage: str, data_folder: Path) -> list[Path]:
  """Returns the shards that a stage of this run reads.

  Raises:
    UserError: the data folder does not exist, or lacks them.
  """
  splits = [] if stage == "train" and (run.path / CONVERTED).is_file() else _SPLITS[stage]
  return [path for split in splits for path in list_shards(data_folder, split)]


def _hashes(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
  """Returns path below `folder` (or name) → SHA-256, for those paths that are files; several are read at once."""
  paths = [path for path in paths if path.is_file()]
  names = [str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name for path in paths]
  hashes = {}
  with progress("looking at what is there", total=len(paths), unit="files") as bar, ThreadPoolExecutor() as pool:
    for name, found in zip(names, pool.map(_file_hash, paths), strict=True):
      hashes[name] = found
      bar.advance()
  return hashes


def _file_hash(path: Path) -> str:
  stat = path.stat()
  return _hash_of_version(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=10_000)
def _hash_of_version(path: Path, *version: int) -> str:
  """Training data take seconds to read: the stages of one command read them once."""
  del version
  return sha256_of(path)


def read_metrics(path: Path) -> list[dict]:
  """Returns the lines of a metrics.jsonl, none if it is absent; a last line that a kill cut short is left out.

  Raises:
    UserError: another line is damaged.
  """
  return read_json_lines(path) if path.exists() else []


def _read_config(path: Path, given: Settings | None) -> Settings | None:
  """Returns the settings that a folder was made with, None if it has none that can be read and `given` is at hand."""
  if not path.exists():
    return None
  try:
    return from_toml(path)
  except (UserError, OSError) as damage:
    if given is None:
      raise UserError(
        f"{path} is damaged ({damage}); `pgolf run CONFIG --out {path.parent}` writes it again."
      ) from damage
    # Another training's checkpoints are refused by the settings that they hold.
    log.warning("%s is damaged, and is written again.", path)
    return None


def _first_difference(made_with: Settings, asked_for: Settings) -> str:
  name, (old, new) = next(iter(differences(made_with, asked_for).items()))
  return f"{name} was {shown(old)}, now {shown(new)}"


class MetricsWriter:
  """Appends one line a step; a continued run begins with the lines of its checkpoint, whatever the file holds.

  Args:
    run: whose metrics.jsonl and sinks take the lines.
    lines: of the steps done so far; TensorBoard drops later ones that it had.
    curves: line → the figures that sinks take, by name.
    writes: whether this is the process that writes; the others drop what they are given.

  Attributes:
    lines: written so far.
  """

  def __init__(self, run: RunFolder, lines: list[dict], curves: Callable[[dict], Mapping[str, float]], *, writes: bool):
    self._writes, self._curves, self.lines = writes, curves, list(lines)
    if not writes:
      return
    write_json_lines(run.metrics, lines)
    self._file = run.metrics.open("a", encoding="utf-8")
    self._events = Events(run.tensorboard, lines[-1]["step"] if lines else 0)
    self._sinks: Sequence[Sink] = (self._events, *run.sinks)

  def write(self, line: dict) -> None:
    """Writes the metrics of one step; `line["step"]` counts from 1."""
    if not self._writes:
      return
    self.lines.append(line)
    self._file.write(json.dumps(line) + "\n")
    self._file.flush()
    figures = self._curves(line)
    for sink in self._sinks:
      sink.write(line["step"], figures)

  def close(self) -> None:
    """Closes both files; the run's sinks stay open."""
    if self._writes:
      self._events.close()
      self._file.close()
