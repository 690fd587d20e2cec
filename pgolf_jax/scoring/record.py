"""The scores of an evaluation, their identity and trace, and the folder from which a killed evaluation goes on.

nll.npy          nats of every target, tilted; NaN where it was not to be scored
model_nll.npy    the same before the tilt
hint_nll.npy     nats of the token hinted at, before the tilt; means nothing where no hint was given
times.npy        how often each target was scored
trace.jsonl      one event a line: which state scored which document
documents.jsonl  one line a document

These are there when all is scored; until then the scores lie in the saves of `scoring.store`.
"""

import dataclasses
import graphlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import ClassVar, NamedTuple

import numpy as np

from pgolf_jax.data.shards import ValidationData, stream_hash
from pgolf_jax.errors import UserError
from pgolf_jax.model import params as parameters
from pgolf_jax.model.params import Params
from pgolf_jax.runtime.files import read_json_lines, write_json_lines
from pgolf_jax.scoring.documents import Batch, Document
from pgolf_jax.scoring.plain import Score
from pgolf_jax.scoring.store import Store
from pgolf_jax.settings import Settings
from pgolf_jax.settings.load import to_dict


@dataclasses.dataclass(frozen=True)
class HintsEvent:
  """The n-gram counts were extended by these documents, in this order; each one's hints come from the counts before."""

  kind: ClassVar[str] = "hints"
  documents: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ScoreEvent:
  """Documents were scored.

  Attributes:
    batch: index of their batch.
    documents: their indices.
    weights: version of the model weights.
    adapters: label of the adapter set.
    carried: batches that used this set before, and whose learning is in its A.
  """

  kind: ClassVar[str] = "score"
  batch: int
  documents: tuple[int, ...]
  weights: int
  adapters: str
  carried: int


@dataclasses.dataclass(frozen=True)
class WeightsEvent:
  """A global phase over these documents made a version of the model weights."""

  kind: ClassVar[str] = "weights"
  version: int
  documents: tuple[int, ...]


Event = HintsEvent | ScoreEvent | WeightsEvent

_KINDS = {event.kind: event for event in (HintsEvent, ScoreEvent, WeightsEvent)}


def to_json(event: Event) -> dict:
  """Returns the event as a JSON object."""
  return {"event": event.kind, **dataclasses.asdict(event)}


def from_json(line: dict) -> Event:
  """Inverse of `to_json`."""
  fields = {name: tuple(value) if name == "documents" else value for name, value in line.items() if name != "event"}
  return _KINDS[line["event"]](**fields)


def read_trace(path: Path) -> list[Event]:
  """Returns the events of a trace file, one JSON object a line."""
  return [from_json(line) for line in read_json_lines(path)]


def find_cycle(events: Sequence[Event]) -> list[str] | None:
  """Returns a cycle among "depends on" of scores and states, or None if some order of documents explains all scores.

  A state that a document's tokens went into comes after that document's score; a score comes after the states
  that it was made with.
  """
  graph: dict[str, set[str]] = {}

  def after(later: str, *earlier: str | None) -> None:
    graph.setdefault(later, set()).update(filter(None, earlier))

  counts = None
  carried: dict[str, str] = {}
  for event in events:
    scores = [_score(index) for index in event.documents]
    match event:
      case HintsEvent():
        for index in event.documents:
          extended = f"counts with document {index}"
          after(_score(index), counts)
          after(extended, counts, _score(index))
          counts = extended
      case ScoreEvent():
        state = f"adapters {event.adapters} after batch {event.batch}"
        before = carried.get(event.adapters) if event.carried else None
        for score in scores:
          after(score, f"weights {event.weights}", before)
        after(state, *scores)
        carried[event.adapters] = state
      case WeightsEvent():
        after(f"weights {event.version}", f"weights {event.version - 1}", *scores)
  try:
    graphlib.TopologicalSorter(graph).prepare()
  except graphlib.CycleError as error:
    return list(error.args[1])
  return None


def _score(document: int) -> str:
  return f"score of document {document}"


def times_scored(events: Iterable[Event]) -> dict[int, int]:
  """Returns document index → how often it was scored."""
  times: dict[int, int] = {}
  for event in events:
    if isinstance(event, ScoreEvent):
      for index in event.documents:
        times[index] = times.get(index, 0) + 1
  return times


@dataclasses.dataclass(frozen=True)
class Clocks:
  """Seconds of an evaluation. `evaluation` includes hints, global phases, and fetching and saving scores."""

  evaluation: float
  hints: float
  global_phases: float
  compilation: float  # before the clock; not counted


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The result of an evaluation. Arrays are in the stream's order, one entry a target."""

  score: Score  # the result
  untilted: Score  # of the same pass, had there been no hints
  nll_N: np.ndarray  # nats after the tilt; NaN where a target was not to be scored
  model_nll_N: np.ndarray  # before the tilt
  hint_nll_N: np.ndarray  # of the token hinted at, before the tilt; means nothing where the gate is shut
  times_N: np.ndarray  # how often each target was scored
  hint_N: np.ndarray  # 0 where the gate is shut
  gate_N: np.ndarray
  params: Params  # model weights after the last global phase
  trace: list[Event]
  clocks: Clocks
  recompilations: int  # inside the clock: a fault
  useful_flops: float  # that the documents' own windows needed
  executed_flops: float  # that ran, padding included
  distributions: dict[int, np.ndarray]  # sampled target → log-probabilities [V] after the tilt

  def figures(self, settings: Settings) -> dict:
    """Returns the figures of results.json."""
    return {
      "loss": self.score.loss,
      "bpb": self.score.bpb,
      "bpb_without_hints": self.untilted.bpb,
      "targets": self.score.targets,
      "bytes": self.score.text_bytes,
      "gated": int(np.sum(self.gate_N)),
      "order": settings.ttt.order,
      "method": settings.ttt.method,
      "seconds": self.clocks.evaluation,
      "hint_seconds": self.clocks.hints,
      "global_phase_seconds": self.clocks.global_phases,
      "compile_seconds": self.clocks.compilation,
      "recompilations_in_clock": self.recompilations,
      "useful_over_executed_flops": self.useful_flops / self.executed_flops,
    }


def identify(
  settings: Settings, params: Params, data: ValidationData, world: int, chains: int, *, is_drawn: bool
) -> dict:
  """Returns the identity of an evaluation: what changes its result beyond rounding, as hashes and plain values.

  The number of devices is not part of it: a document's scores do not depend on the device that it is on.

  Args:
    world: ranks that share out the rows of a global phase; they change the result where there is a phase.
    chains: of batches.
    is_drawn: whether A of new adapters comes from the seed.
  """
  plain = to_dict(settings)
  return {
    "settings": {
      "model": plain["model"],
      "ttt": {name: value for name, value in plain["ttt"].items() if name not in ("enabled", "chains")},
      "hints": plain["hints"],
      "eval": {name: plain["eval"][name] for name in ("seq_len", "doc_fraction")},
      "seed": plain["seed"],
    },
    "weights": parameters.content_hash(params),
    "tokens": data.tokens_sha256,
    "sidecar": stream_hash(data.token_bytes),
    "dtype": settings.train.compute_dtype,
    "ranks of a global phase": world if settings.ttt.phase.prefix_docs > 0 else None,
    "chains": chains,
    "adapters": "from the seed" if is_drawn else "given",
  }


@dataclasses.dataclass
class EvaluationProgress:
  """How far an evaluation is, at the end of a batch.

  Attributes:
    batches: batches finished.
    phases: global phases done; the version of the weights.
    adapters: plain values of `AdapterSets.state`.
    events: the trace so far.
    seconds: of the evaluation, and of its hints and global phases.
    compilations: within these seconds.
  """

  batches: int = 0
  phases: int = 0
  adapters: dict = dataclasses.field(default_factory=dict)
  events: list[Event] = dataclasses.field(default_factory=list)
  seconds: dict[str, float] = dataclasses.field(
    default_factory=lambda: {"evaluation": 0.0, "hints": 0.0, "global_phases": 0.0}
  )
  compilations: int = 0


class Record:
  """Scores in memory, and in a folder if one is given.

  Args:
    folder: of a `Store`.
    data: the stream that is scored.
    identity: JSON values, see `identify`; a folder made with others is refused. Not needed without a folder.
    writes: whether this process writes; of several processes one does.

  Attributes:
    progress: of the last save in the folder, or of an evaluation that has not begun.
    is_resumed: whether the folder holds a save.

  Raises:
    OtherEvaluation: the folder holds another evaluation.
  """

  def __init__(self, folder: Path | None, data: ValidationData, identity: dict | None, *, writes: bool = True):
    self.folder, self._data = folder, data
    self._writes = writes and folder is not None
    self._store = None if folder is None else Store(folder, identity, writes=writes)
    self.progress = EvaluationProgress()
    targets = len(data.tokens) - 1
    self.nll_N, self.model_nll_N, self.hint_nll_N = (np.full(targets, np.nan, np.float32) for _ in range(3))
    self.times_N = np.zeros(targets, np.uint8)
    self.distributions: dict[int, np.ndarray] = {}
    self._running = Score(0.0, 0, 0)
    self._entered: list[tuple[np.ndarray, ...]] = []  # since the last save
    self.is_resumed = folder is not None and self._store.progress is not None
    if self.is_resumed:
      self._restore()

  def _restore(self) -> None:
    values = self._store.progress
    self.progress = EvaluationProgress(**{**values, "events": [from_json(event) for event in values["events"]]})
    for part in self._store.scores():
      if "times" in part:
        self.nll_N[:], self.model_nll_N[:], self.hint_nll_N[:] = (part[n] for n in ("nll", "model_nll", "hint_nll"))
        self.times_N[:] = part["times"]
        self._running = total(self.nll_N, self._data)
      else:
        self.enter(*(part[name] for name in _PART))
    self._entered = []

  def enter(self, target_M: np.ndarray, model_nll_M: np.ndarray, hint_nll_M: np.ndarray, nll_M: np.ndarray) -> None:
    """Enters the losses of these targets, as in `Evaluation`."""
    self.model_nll_N[target_M], self.hint_nll_N[target_M], self.nll_N[target_M] = model_nll_M, hint_nll_M, nll_M
    np.add.at(self.times_N, target_M, 1)
    nats = self._running.nats + float(nll_M.sum(dtype=np.float64))
    text_bytes = self._running.text_bytes + int(self._data.token_bytes[target_M + 1].sum(dtype=np.int64))
    self._running = Score(nats, self._running.targets + len(target_M), text_bytes)
    if self._writes:
      self._entered.append((target_M, model_nll_M, hint_nll_M, nll_M))

  @property
  def running_bpb(self) -> float:
    """Bits per byte of what is scored so far."""
    return self._running.nats / math.log(2) / max(self._running.text_bytes, 1)

  def save(self, progress: EvaluationProgress, arrays: dict[str, np.ndarray]) -> None:
    """Makes everything scored so far, and the state after it, what a restart goes on from."""
    if not self._writes:
      return
    part = {}
    if self._entered:
      part = {
        name: np.concatenate(column) for name, column in zip(_PART, zip(*self._entered, strict=True), strict=True)
      }
    values = {**dataclasses.asdict(progress), "events": [to_json(event) for event in progress.events]}
    self._store.save(values, part, arrays)
    self._entered = []

  def arrays(self) -> dict[str, np.ndarray]:
    """Returns the arrays of the last save."""
    return self._store.state()

  def save_weights(self, version: int, params: Params) -> None:
    """Writes the model weights that a global phase has made."""
    if self._writes:
      self._store.save_weights(version, {name: np.asarray(value) for name, value in params.items()})

  def weights(self, version: int) -> dict[str, np.ndarray]:
    """Returns the model weights of a version."""
    return self._store.weights(version)

  def write_results(self, batches: Sequence[Batch], result: Evaluation) -> None:
    """Writes the scores, the trace, and one line a document, in the order of scoring."""
    if self._writes:
      arrays = {"nll": self.nll_N, "model_nll": self.model_nll_N, "hint_nll": self.hint_nll_N, "times": self.times_N}
      self._store.finish(arrays)
      lines = [_document_line(batch, document, result, self._data) for batch in batches for document in batch.documents]
      write_json_lines(self.folder / "documents.jsonl", lines)
      write_json_lines(self.folder / "trace.jsonl", map(to_json, result.trace))


_PART = ("target", "model_nll", "hint_nll", "nll")
"""Arrays of a saved part, in the order of `Record.enter`."""


def total(nll_N: np.ndarray, data: ValidationData) -> Score:
  """Returns the sum over the targets that were scored, in float64."""
  scored = ~np.isnan(nll_N)
  nats = float(np.sum(nll_N, where=scored, dtype=np.float64))
  return Score(nats, int(scored.sum()), int(np.sum(data.token_bytes[1:], where=scored, dtype=np.int64)))


def _document_line(batch: Batch, document: Document, result: Evaluation, data: ValidationData) -> dict:
  """Where a document stands, its bytes, its nats with and without the tilt."""
  targets = document.target_slice
  return {
    "document": document.index,
    "batch": batch.index,
    "start": document.start,
    "targets": document.targets,
    "bytes": int(data.token_bytes[targets.start + 1 : targets.stop + 1].sum(dtype=np.int64)),
    "nats": float(result.nll_N[targets].sum(dtype=np.float64)),
    "nats_untilted": float(result.model_nll_N[targets].sum(dtype=np.float64)),
    "hints": int(result.gate_N[targets].sum()),
    "right": int(np.sum(result.hint_N[targets] == data.tokens[1:][targets], where=result.gate_N[targets])),
  }


class Scores(NamedTuple):
  """The scores of an evaluation, one entry a target in the stream's order; see `Evaluation`."""

  nll_N: np.ndarray
  model_nll_N: np.ndarray
  hint_nll_N: np.ndarray
  times_N: np.ndarray


def read_scores(folder: Path, targets: int) -> Scores:
  """Returns the scores that an evaluation left in a folder.

  Raises:
    UserError: a file is missing, or is not an array of that many numbers.
  """
  arrays = []
  for name in ("nll", "model_nll", "hint_nll", "times"):
    path = folder / f"{name}.npy"
    try:
      with path.open("rb") as file:
        array = np.lib.format.read_array(file, allow_pickle=False)  # `np.load` takes archives as well
    except (OSError, ValueError, EOFError, MemoryError, TokenError) as error:
      raise UserError(f"{path} cannot be read ({error}); score the run again.") from None
    if array.shape != (targets,) or array.dtype not in (np.float32, np.uint8):
      raise UserError(f"{path} has shape {array.shape} of {array.dtype} for {targets} targets; score the run again.")
    arrays.append(array)
  return Scores(*arrays)
