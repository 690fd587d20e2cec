"""The trace of an evaluation: which state scored which document, and whether one order of documents explains it."""

import dataclasses
import graphlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from pgolf_jax.runtime.files import read_json_lines


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


def read(path: Path) -> list[Event]:
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
