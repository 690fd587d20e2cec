"""What a run folder holds, as the numbers that a report shows; what is missing is named with the reason."""

import dataclasses
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pgolf_jax.audit.verdict import Verdict, verdict
from pgolf_jax.data.folder import locate_prepared
from pgolf_jax.data.shards import load_validation
from pgolf_jax.errors import Check, UserError
from pgolf_jax.kernels.hardware import Peaks, peaks
from pgolf_jax.model import flops
from pgolf_jax.quantize import artifact
from pgolf_jax.quantize.artifact import header
from pgolf_jax.run_folder import RunFolder, read_metrics
from pgolf_jax.runtime.files import file_hash, json_hash, read_json_lines
from pgolf_jax.scoring.record import read_scores
from pgolf_jax.settings import Settings
from pgolf_jax.settings.load import to_dict


class Absent(Exception):
  """A part of a report that cannot be shown; the message is one sentence that says why."""


class Curves(NamedTuple):
  """Training by step, one entry a step."""

  step: np.ndarray
  loss: np.ndarray  # nats per target
  lr_scale: np.ndarray
  momentum: np.ndarray
  seq_len: np.ndarray
  looping: np.ndarray
  seconds: np.ndarray  # of the training clock
  val_loss: np.ndarray  # nats per target of the validation text, NaN at steps without
  peak_memory_bytes: np.ndarray


class Documents(NamedTuple):
  """Scores by document, in the order of scoring."""

  index: np.ndarray
  start: np.ndarray  # its first target
  targets: np.ndarray
  text_bytes: np.ndarray
  nats: np.ndarray  # with test-time training and hints
  nats_untilted: np.ndarray  # the same pass without hints
  hints: np.ndarray
  nats_plain: np.ndarray | None  # of the artifact without test-time training
  hits: np.ndarray | None  # hints that were right

  def bpb(self, nats: np.ndarray) -> np.ndarray:
    """Returns bits per byte of every document."""
    return nats / math.log(2) / np.maximum(self.text_bytes, 1)


class Position(NamedTuple):
  """Scores by the place of a target in its document, one entry a bin."""

  first: np.ndarray  # place of the bin's first target, from 0
  end: np.ndarray  # place after its last
  text_bytes: np.ndarray
  nats: np.ndarray
  nats_untilted: np.ndarray
  nats_plain: np.ndarray | None


class StreamSize(NamedTuple):
  """A stream of an artifact: its compressed bytes, and how many values they hold."""

  name: str
  num_bytes: int
  values: int


@dataclasses.dataclass(frozen=True)
class RunData:
  """What a report shows of one run.

  Attributes:
    name: in the report.
    results: stage → what it reported.
    device, devices: kind and number of what trains it; None where that is not known.
    curves, documents, position, streams: the parts that may be missing.
    absent: part → why it is missing.
    stale: sentences on results that belong to other files than the folder has now.
    lacking: stage → why its results, of another version of the program or of its inputs, are not shown.
  """

  name: str
  path: Path
  settings: Settings
  results: dict[str, dict]
  device: str | None
  devices: int | None
  curves: Curves | None
  documents: Documents | None
  position: Position | None
  streams: list[StreamSize] | None
  absent: dict[str, str]
  stale: list[str]
  lacking: dict[str, str]

  def need(self, part: str):
    """Returns a part; raises Absent with the reason if it is missing."""
    value = getattr(self, part)
    if value is None:
      raise Absent(f"{self.name}: {self.absent[part]}")
    return value

  @property
  def checks(self) -> list[Check]:
    """The audit's checks, none if the run was not audited."""
    return [Check(**check) for check in self.results.get("audit", {}).get("checks", [])]

  @property
  def verdict(self) -> Verdict | None:
    """What the audit's checks amount to under the rules; None without an audit."""
    return verdict(self.checks) if "audit" in self.results else None

  @property
  def final_stage(self) -> str | None:
    """The last stage with a score."""
    return next((stage for stage in ("ttt", "artifact", "plain") if stage in self.results), None)

  @property
  def validation_set(self) -> tuple[int, int] | None:
    """Targets and bytes of what was scored."""
    stage = self.final_stage
    return None if stage is None else (self.results[stage]["targets"], self.results[stage]["bytes"])

  @property
  def config(self) -> str:
    """A hash of all settings but the seed: runs of one config are seeds of one set."""
    return json_hash(to_dict(dataclasses.replace(self.settings, seed=0)))

  @property
  def peaks(self) -> Peaks | None:
    """Highest rates of one of its devices; None where they are not known."""
    return peaks(self.device) if self.device else None


_SCORE = {"loss", "bpb", "targets", "bytes", "seconds"}
_NEEDED = {
  "train": {"steps", "seconds"},
  "plain": _SCORE,
  "artifact": _SCORE,
  "ttt": _SCORE | {"bpb_without_hints", "order"},
  "audit": {"checks"},
}


def gather(run: RunFolder, name: str | None = None) -> RunData:
  """Reads a run folder. Missing and damaged parts are left out, with the reason in `absent`.

  Args:
    name: of the run in the report; its folder's if not given.
  """
  results, absent = run.figures(), {}
  replaced = "what it read has been made anew since; `pgolf run` with the same command makes its results again."
  lacking = {stage: replaced for stage in run.results() if stage not in results}
  for stage, names in _NEEDED.items():
    if missing := sorted(names - results.get(stage, dict.fromkeys(names)).keys()):
      del results[stage]
      lacking[stage] = f"its results lack {', '.join(missing)}; `pgolf run` with the same command makes them again."

  def part(what: str, read, *arguments):
    try:
      return read(*arguments)
    except (Absent, UserError) as reason:
      absent[what] = str(reason)
    except (KeyError, TypeError, ValueError, OSError) as error:
      absent[what] = f"what the folder holds of it cannot be read ({type(error).__name__}: {error})."
    return None

  documents = part("documents", _documents, run, results)
  device, devices = _devices(run, results)
  return RunData(
    name=name or run.path.resolve().name,
    path=run.path,
    settings=run.settings,
    results=results,
    device=device,
    devices=devices,
    curves=part("curves", _curves, run, results),
    documents=documents,
    position=part("position", _position, run, documents, absent),
    streams=part("streams", _streams, run),
    absent=absent,
    stale=_stale(run, results),
    lacking=lacking,
  )


def _devices(run: RunFolder, results: dict) -> tuple[str | None, int | None]:
  """Returns the kind of the devices that train and their number; from the log where the results do not say it."""
  train = results.get("train", {})
  kind, count = train.get("device"), train.get("devices")
  if kind is None or count is None:
    try:
      with run.log.open(encoding="utf-8", errors="replace") as file:
        found = re.search(r"run folder .*, (\d+) × (.+?)(?: of \d+, .*)?$", file.read(1 << 16), re.MULTILINE)
    except OSError:
      found = None
    if found:
      kind, count = kind or found[2].strip(), count or int(found[1])
  return kind, count


def _curves(run: RunFolder, results: dict) -> Curves:
  if source := results.get("train", {}).get("converted_from"):
    raise Absent(f"its weights were converted from {source}, not trained here.")
  lines = [line for line in read_metrics(run.metrics) if "loss" in line and "step" in line]
  if not lines:
    raise Absent("no training step is recorded yet.")
  columns = [np.array([float(line.get(name, math.nan)) for line in lines]) for name in Curves._fields]
  return Curves(*columns)


def _documents(run: RunFolder, results: dict) -> Documents:
  if "ttt" not in results:
    if not run.settings.ttt.enabled:
      raise Absent("the run has no test-time training (ttt.enabled = false), which is what scores documents.")
    raise Absent("test-time training has not finished yet; `pgolf run` with the same command goes on.")
  lines = read_json_lines(run.scores / "documents.jsonl")
  if not lines:
    raise Absent(f"{run.scores / 'documents.jsonl'} is empty; score the run again.")
  names = ("document", "start", "targets", "bytes", "nats", "nats_untilted", "hints")
  columns = [np.array([line[name] for line in lines]) for name in names]
  # Older runs do not tell which hints were right.
  hits = np.array([line["right"] for line in lines]) if all("right" in line for line in lines) else None
  documents = Documents(*columns, nats_plain=None, hits=hits)
  plain_N = _artifact_nll(run, results)
  if plain_N is not None:
    documents = documents._replace(nats_plain=_sums(plain_N, documents))
  return documents


def _sums(x_N: np.ndarray, documents: Documents) -> np.ndarray:
  """Returns the sum over each document's targets."""
  spans = zip(documents.start, documents.targets, strict=True)
  return np.array([x_N[start : start + targets].sum(dtype=np.float64) for start, targets in spans])


def _artifact_nll(run: RunFolder, results: dict) -> np.ndarray | None:
  """Returns the nats of every target under the artifact alone; None where they are not kept or not of this artifact."""
  try:
    nll_N = np.load(run.artifact_nll, allow_pickle=False)
  except (OSError, ValueError, EOFError):
    return None
  made = results.get("artifact", {})
  is_whole = nll_N.shape == (made.get("targets"),) and nll_N.dtype == np.float32
  return nll_N if is_whole and math.isclose(nll_N.mean(dtype=np.float64), made["loss"], rel_tol=1e-6) else None


_EDGES = (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 1 << 17, 1 << 62)


def _position(run: RunFolder, documents: Documents | None, absent: dict[str, str]) -> Position:
  if documents is None:
    raise Absent(absent["documents"])
  data = load_validation(locate_prepared(run.settings))
  scores = read_scores(run.scores, len(data.tokens) - 1)
  bytes_N = np.asarray(data.token_bytes[1:])
  if not np.array_equal(_sums(bytes_N, documents), documents.text_bytes):
    raise Absent("the data folder has another byte sidecar now than when the run was scored.")
  plain_N = _artifact_nll(run, run.results())
  columns = {"text_bytes": bytes_N, "nats": scores.nll_N, "nats_untilted": scores.model_nll_N, "nats_plain": plain_N}
  sums = {name: None if x_N is None else np.zeros(len(_EDGES) - 1) for name, x_N in columns.items()}
  for start, targets in zip(documents.start, documents.targets, strict=True):
    cuts = [edge for edge in _EDGES if edge < targets]
    for name, x_N in columns.items():
      if x_N is not None:
        # Each cut begins a bin, which ends at the next one; the last bin ends with the document.
        sums[name][: len(cuts)] += np.add.reduceat(x_N[start : start + targets].astype(np.float64), cuts)
  used = np.flatnonzero(sums["text_bytes"])
  longest = int(documents.targets.max())
  return Position(
    first=np.array(_EDGES[:-1])[used],
    end=np.minimum(np.array(_EDGES[1:])[used], longest),
    **{name: None if total is None else total[used] for name, total in sums.items()},
  )


def _streams(run: RunFolder) -> list[StreamSize]:
  if not run.artifact.is_file():
    raise Absent("there is no artifact yet; the stage after training makes it.")
  held = artifact.read(run.artifact.read_bytes())
  table = [header.describe(name, tensor) for name, tensor in held.tensors.items()]
  values = {
    stream.name: sum(math.prod(shape) for *_, shape in stream.arrays) for stream in header.split(table)
  }  # fmt: skip
  return [StreamSize(name, size, values.get(name, 0)) for name, size in held.stream_bytes.items()]


def _stale(run: RunFolder, results: dict) -> list[str]:
  """Returns a sentence for each stage whose files in the run folder are not those that it read or left."""
  said = []
  for stage, result in results.items():
    files = {**result.get("made_from", {}), **result.get("made", {})}
    here = {name: hash for name, hash in files.items() if (run.path / name).is_file() and "checkpoints" not in name}
    changed = [name for name, hash in here.items() if file_hash(run.path / name) != hash]
    if changed:
      said.append(f"{changed[0]} changed after the stage “{stage}”: its figures are those of an earlier file.")
  return said


def step_seconds(curves: Curves) -> np.ndarray:
  """Returns the seconds that each step took on the training clock; NaN where the clock did not move."""
  passed = np.diff(curves.seconds, prepend=0.0 if len(curves.step) and curves.step[0] == 1 else np.nan)
  return np.where(passed > 0, passed, np.nan)


def step_flops(run: RunData) -> np.ndarray:
  """Returns the model's operations of one device for each step: three forward passes of its share of the batch."""
  curves, train = run.need("curves"), run.settings.train
  model, tokens = run.settings.model, train.batch_tokens / (run.devices or 1)
  by_shape = {
    (length, looping): flops.forward_and_gradient(model, tokens, length, looping=bool(looping))
    for length, looping in {*zip(curves.seq_len, curves.looping, strict=True)}
  }
  return np.array([by_shape[shape] for shape in zip(curves.seq_len, curves.looping, strict=True)])
