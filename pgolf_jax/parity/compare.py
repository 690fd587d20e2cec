"""Two runs side by side: what their settings, losses, scores and times differ by, and from where on.

**The noise floor.** The difference of the losses at step t is averaged over the w common steps that end at t, w a
fiftieth of them. The runs part at the first t at which this mean exceeds, in size, q·s, where s is its standard error
and q a quantile of Student's t such that two equal runs part anywhere in fewer than one comparison of a hundred.

- On their own, the runs' step-to-step noise gives s: the root mean square of the changes of the difference from one
  common step to the next, around t, over √(2w). A drift does not count as noise, so this floor answers from where on
  the curves are two curves, even where the cause is only another seed.
- With a noise run, a second run of A's settings (another seed, or the same one on the same device), s is at least the
  root mean square, around t, of the same mean of *its* difference from A: the floor then answers whether B differs by
  more than A from itself.

What a log printed with four decimals is known to half of the last: a smaller mean is no difference.
"""

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from pgolf_jax.errors import UserError
from pgolf_jax.parity import torch_log
from pgolf_jax.parity.torch_log import ARTIFACT, AVERAGED, TTT, RunRecord, Scored, Stage
from pgolf_jax.report.statistics import Ratio, ratio
from pgolf_jax.run_folder import RunFolder
from pgolf_jax.runtime.files import read_json_lines
from pgolf_jax.settings import Settings
from pgolf_jax.settings.load import FIXED, as_written, changed, env_names, flattened, from_env

_MOST_BYTES = 1 << 28
_FALSE_ALARM = 0.002
BLOCKS = 20  # that a series is cut into for the error of its mean
_LEAST_STEPS = 8  # common steps below which no noise is estimated

_STAGES = {"plain": AVERAGED, "artifact": ARTIFACT, "ttt": TTT}
WITHOUT_HINTS = f"{TTT} without hints"


@dataclasses.dataclass(frozen=True)
class Side:
  """One of the runs that are compared."""

  name: str  # as given on the command line
  kind: str  # what it was read from
  record: RunRecord
  settings: Settings | None = None  # of a run folder


def read(path: Path) -> Side:
  """Reads a run folder, a metrics.jsonl, or the log text of a PyTorch script.

  Raises:
    UserError: it is none of these, or damaged.
  """
  if path.is_dir():
    if (path / "config.toml").is_file():
      return _read_folder(path)
    raise UserError(f"{path} is no run folder: it has no config.toml; give a run folder, metrics.jsonl or a log.")
  try:
    if path.stat().st_size > _MOST_BYTES:
      raise UserError(f"{path} is larger than {_MOST_BYTES:,} bytes, and no log of a run.")
    data = path.read_bytes()
  except FileNotFoundError:
    raise UserError(f"There is no file or folder {path}.") from None
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror}).") from None
  if path.suffix == ".jsonl" or data.lstrip()[:1] == b"{":
    return Side(str(path), "metrics", _read_metrics(path))
  record = torch_log.parse(data.decode(errors="replace"))
  if not record.losses and not record.stages:
    raise UserError(
      f"{path} is no log of a PyTorch script (no line has train_loss or val_bpb); of a run made here give the folder."
    )
  return Side(str(path), "log", record)


def _read_folder(path: Path) -> Side:
  run = RunFolder(path)
  record = _read_metrics(run.metrics) if run.metrics.is_file() else RunRecord()
  results = run.figures()
  for stage, name in _STAGES.items():
    about = results.get(stage, {})
    if (bpb := _finite(about.get("bpb"))) is not None:
      record.stages[name] = Stage(bpb, _finite(about.get("loss")), _finite(about.get("seconds")))
    if (bpb := _finite(about.get("bpb_without_hints"))) is not None:
      record.stages[WITHOUT_HINTS] = Stage(bpb)
  train, made = results.get("train", {}), results.get("artifact", {})
  figures = {
    "parameters": train.get("parameters"),
    "steps": train.get("steps"),
    "train_seconds": train.get("seconds"),
    "tokens_per_second": train.get("tokens_per_second"),
    "artifact_bytes": made.get("artifact_bytes"),
    "code_bytes": made.get("code_bytes"),
    "evaluation_seconds": results.get("ttt", {}).get("seconds"),
  }
  record.figures |= {name: value for name, figure in figures.items() if (value := _finite(figure)) is not None}
  if {"artifact_bytes", "code_bytes"} <= record.figures.keys():
    record.figures["total_bytes"] = record.figures["artifact_bytes"] + record.figures["code_bytes"]
  if "ttt" in results and (documents := run.scores / "documents.jsonl").is_file():
    for line in read_json_lines(documents):
      number, size, nats = (_finite(line.get(name)) for name in ("document", "bytes", "nats"))
      if None not in (number, size, nats) and size > 0:
        record.scored["document", int(number), int(size)] = Scored(nats / math.log(2) / size, int(size))
  return Side(str(path), "run folder", record, run.settings)


def _read_metrics(path: Path) -> RunRecord:
  record = RunRecord()
  for line in read_json_lines(path):
    step, loss, seconds = (_finite(line.get(name)) for name in ("step", "loss", "seconds"))
    if step is not None and loss is not None:
      record.losses[int(step)] = loss
      record.figures["steps"] = int(step)
      if seconds is not None:
        record.seconds[int(step)] = seconds
  if not record.losses and path.stat().st_size:
    raise UserError(f"{path} is no metrics.jsonl: no line has step and loss.")
  if record.losses:
    record.resolution = 2.0**-23 * max(map(abs, record.losses.values()))  # they are float32
  return record


def _finite(value: object) -> float | None:
  is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
  return value if is_number else None


class Documents(NamedTuple):
  """Scores of the same documents, or batches of documents.

  Attributes:
    what: "documents" or "batches".
    each: the differences of `bpb_a` and `bpb_b`, every one counted once.
    by_bytes: the difference of the bits per byte of all together; None where bytes are not told.
    of: how many the run with fewer has.
  """

  what: str
  bpb_a: np.ndarray
  bpb_b: np.ndarray
  each: Ratio
  by_bytes: Ratio | None
  of: int

  @property
  def better(self) -> int:
    """How many B scores lower."""
    return int(np.sum(self.bpb_b < self.bpb_a))


def documents(a: RunRecord, b: RunRecord) -> Documents | None:
  """Returns the paired scores; None where the two did not score the same documents."""
  common = sorted(a.scored.keys() & b.scored.keys())
  of = min(len(a.scored), len(b.scored))
  is_batch = bool(common) and common[0][0] == "batch"
  # Documents are known by place and bytes. Of the batches of a log each run reports those of its first rank.
  if len(common) < 2 or (not is_batch and len(common) < 0.9 * of):
    return None
  bpb_a, bpb_b = (np.array([record.scored[key].bpb for key in common]) for record in (a, b))
  bytes_N = np.array([a.scored[key].text_bytes for key in common], np.float64)
  by_bytes = ratio((bpb_b - bpb_a) * bytes_N, bytes_N) if bytes_N.all() else None
  return Documents("batches" if is_batch else "documents", bpb_a, bpb_b, ratio(bpb_b - bpb_a), by_bytes, of)


def mean_of_series(value_N: np.ndarray) -> Ratio:
  """Returns the mean of a series; its error comes from the means of blocks, since neighbours are not independent."""
  if len(value_N) < 2 * BLOCKS:
    return ratio(value_N)
  return ratio([part.mean() for part in np.array_split(value_N, BLOCKS)])._replace(value=float(value_N.mean()))


class Curves(NamedTuple):
  """Losses at the common steps.

  Attributes:
    step, a, b: a step and both losses there.
    mean: of the differences b − a over the `window` steps that end here.
    floor: the largest size of that mean which noise explains; None for too few common steps.
    first_difference: the first step at which they differ by more than is printed; None if nowhere.
    parted: the first step at which the mean exceeds the floor; None if nowhere.
  """

  step: np.ndarray
  a: np.ndarray
  b: np.ndarray
  window: int
  mean: np.ndarray
  floor: np.ndarray | None
  first_difference: int | None
  parted: int | None

  @property
  def difference(self) -> np.ndarray:
    return self.b - self.a


def curves(a: RunRecord, b: RunRecord, noise: RunRecord | None = None) -> Curves | None:
  """Returns the losses side by side, and where they part; None where the runs share no step.

  Raises:
    UserError: the noise run shares fewer than eight steps with both.
  """
  told = [a, b] + ([] if noise is None else [noise])
  common = sorted(set.intersection(*({s for s, loss in r.losses.items() if math.isfinite(loss)} for r in told)))
  if noise is not None and len(common) < _LEAST_STEPS:
    raise UserError(f"The noise run has {len(common)} steps in common with both runs; it needs {_LEAST_STEPS}.")
  if not common:
    return None
  step = np.array(common)
  loss_a, loss_b = (np.array([r.losses[s] for s in common]) for r in (a, b))
  resolution = a.resolution + b.resolution
  differs = np.flatnonzero(np.abs(loss_b - loss_a) > resolution)
  first = int(step[differs[0]]) if len(differs) else None
  window = min(max(len(step) // 50, 1), 50)
  mean = _trailing_mean(loss_b - loss_a, window)
  if len(step) < _LEAST_STEPS:
    return Curves(step, loss_a, loss_b, window, mean, None, first, None)
  floor = _floor(loss_b - loss_a, window)
  if noise is not None:
    loss_n = np.array([noise.losses[s] for s in common])
    floor = np.maximum(floor, _noise_floor(_trailing_mean(loss_n - loss_a, window), window))
  floor = np.maximum(floor, resolution)
  beyond = np.flatnonzero(np.abs(mean) > floor)
  parted = int(step[beyond[0]]) if len(beyond) else None
  return Curves(step, loss_a, loss_b, window, mean, floor, first, parted)


def _trailing_mean(x_N: np.ndarray, window: int) -> np.ndarray:
  """Means of the `window` entries that end at each; at the beginning of as many as there are."""
  sums = np.concatenate([[0.0], np.cumsum(x_N)])
  end = np.arange(1, len(x_N) + 1)
  begin = np.maximum(end - window, 0)
  return (sums[end] - sums[begin]) / (end - begin)


def _around(x_N: np.ndarray, reach: int, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Mean square of the entries within `reach` of each of `count` places, and how many these are."""
  sums = np.concatenate([[0.0], np.cumsum(np.square(x_N))])
  place = np.arange(count)
  begin, end = np.clip(place - reach, 0, None), np.minimum(place + reach, len(x_N))
  return (sums[end] - sums[begin]) / np.maximum(end - begin, 1), end - begin


def _quantile(degrees_N: np.ndarray, comparisons: float) -> np.ndarray:
  return stats.t.isf(_FALSE_ALARM / 2 / comparisons, np.maximum(degrees_N, 1))


def _floor(difference_N: np.ndarray, window: int) -> np.ndarray:
  """The floor from the runs' own noise. Neighbouring changes share a value: they count for two thirds."""
  count = len(difference_N)
  square_N, changes_N = _around(np.diff(difference_N), max(25, 5 * window), count)
  size_N = np.minimum(np.arange(1, count + 1), window)
  return _quantile(2 / 3 * changes_N, count) * np.sqrt(square_N / 2 / size_N)


def _noise_floor(mean_N: np.ndarray, window: int) -> np.ndarray:
  """The floor from the differences of two runs of the same settings."""
  square_N, steps_N = _around(mean_N, max(25, 10 * window), len(mean_N))
  return _quantile(steps_N / window, len(mean_N) / window) * np.sqrt(square_N)


def setting_differences(a: Side, b: Side) -> tuple[list[tuple[str, str, str]], int]:
  """Returns (name, A's value, B's value) of settings that both tell and that differ, and how many both tell."""
  ours, theirs = _settings(a), _settings(b)
  if a.settings is not None and b.settings is None:
    ours |= _fixed(theirs)
  elif a.settings is None and b.settings is not None:
    theirs |= _fixed(ours)
  common = [name for name in ours if name in theirs]
  differing = [(n, str(ours[n]), str(theirs[n])) for n in common if _plain(ours[n]) != _plain(theirs[n])]
  return differing, len(common)


def _fixed(told: dict[str, object]) -> dict[str, object]:
  """What our runs have for those of a script's settings that cannot be chosen here."""
  fixed = {}
  for name, value in told.items():
    allowed = FIXED.get(name.upper(), (None, ""))[0]
    if allowed is not None:
      fixed[name] = value if _plain(value) in map(_plain, allowed) else allowed[0]
  return fixed


_OF_A_MACHINE = {"data.path", "data.tokenizer", "train.world_size"} | {
  "artifact_dir", "data_dir", "datasets_dir", "distributed", "is_main_process", "local_rank", "logfile", "model_path",
  "quantized_model_path", "rank", "run_id", "tokenizer_path", "train_files", "val_bytes_files", "val_files",
}  # fmt: skip
"""What says where a run lay, not what it computed. The number of ranks is among the figures."""


def _settings(side: Side) -> dict[str, object]:
  """Name → value of every setting that is told: ours by their dotted names, others by the script's."""
  if side.settings is not None:
    values = _resolved(side.settings)
  else:
    known, values, changes = env_names(), {}, {}
    for name, text in side.record.told.items():
      if name.upper() in known:
        dotted = known[name.upper()]
        try:
          changes[dotted] = flattened(from_env({name.upper(): text}))[dotted]
        except UserError:
          values[dotted] = text
      else:
        values[name] = text
    resolved = _resolved(changed(Settings(), changes))
    values |= {name: resolved[name] for name in changes}
  return {name: value for name, value in values.items() if name not in _OF_A_MACHINE}


def _resolved(settings: Settings) -> dict[str, object]:
  """Every setting, with what unset ones stand for."""
  values = flattened(settings)
  lora, short = settings.ttt.lora, settings.ttt.short
  values |= {"ttt.lora.q": lora.adapts_q, "ttt.lora.v": lora.adapts_v}
  for name in ("rank", "lr", "weight_decay", "beta2"):
    if values[f"ttt.short.{name}"] is None:
      values[f"ttt.short.{name}"] = getattr(lora, name)
  if lora.warm_start_mean_doc_len is None:
    values["ttt.lora.warm_start_mean_doc_len"] = short.doc_len
  return {name: as_written(value) for name, value in values.items()}


def _plain(value: object) -> object:
  """A value such that 1, 1.0 and "1.0", True and "True" are equal."""
  text = str(value).strip().lower()
  words = {"true": 1.0, "false": 0.0}
  try:
    return words[text] if text in words else float(text)
  except ValueError:
    return text


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Two runs side by side, and a noise run if there is one."""

  a: Side
  b: Side
  noise: Side | None
  curves: Curves | None
  documents: Documents | None
  settings: list[tuple[str, str, str]]
  settings_in_common: int

  @property
  def loss_differences(self) -> dict[str, np.ndarray]:
    """Which steps → the differences of the losses there."""
    if self.curves is None:
      return {}
    steps = len(self.curves.step)
    last = max(steps // 4, 1)
    counts = {f"all {steps} common steps": steps, f"the last {last} of them": last}
    return {name: self.curves.difference[-count:] for name, count in counts.items()}


def compare(a: Side, b: Side, noise: Side | None = None) -> Comparison:
  """Compares two runs.

  Raises:
    UserError: they have nothing in common, or as `curves`.
  """
  losses = curves(a.record, b.record, None if noise is None else noise.record)
  if losses is None and not a.record.stages.keys() & b.record.stages.keys():
    raise UserError(f"{a.name} and {b.name} have neither a step nor the score of a stage in common.")
  return Comparison(a, b, noise, losses, documents(a.record, b.record), *setting_differences(a, b))
