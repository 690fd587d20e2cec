"""A record of which state scored which document, and whether one order of documents can explain it.

Events, one JSON object each:
  {"event": "hints", "documents": […]}     the n-gram counts were extended by these, in this order; each one's hints
                                           come from the counts before it
  {"event": "score", "batch": b, "documents": […], "weights": v, "adapters": s, "carried": c}
                                           scored under weights version v with adapters of set s, whose A comes from
                                           the c batches that used that set before
  {"event": "weights", "version": v, "documents": […]}   a global phase over these made version v
"""

import graphlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from pgolf_jax.scoring.documents import Document


class Trace:
  """Events in the order in which they happened."""

  def __init__(self, events: Sequence[dict] = ()):
    self.events = list(events)

  def hints(self, documents: Iterable[Document]) -> None:
    self._add({"event": "hints", "documents": [d.index for d in documents]})

  def score(self, batch: int, documents: Sequence[Document], *, weights: int, adapters: str, carried: int) -> None:
    indices = [d.index for d in documents]
    self._add(
      {
        "event": "score",
        "batch": batch,
        "documents": indices,
        "weights": weights,
        "adapters": adapters,
        "carried": carried,
      }
    )

  def weights(self, version: int, documents: Sequence[Document]) -> None:
    self._add({"event": "weights", "version": version, "documents": [d.index for d in documents]})

  def _add(self, event: dict) -> None:
    self.events.append(event)


def read(path: Path) -> list[dict]:
  """The events of a trace file."""
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def find_cycle(events: Sequence[dict]) -> list[str] | None:
  """A cycle among "depends on" of scores and states, or None if some order of documents explains all scores.

  A state that a document's tokens went into comes after that document's score; a score comes after the states
  that it was made with.
  """
  graph: dict[str, set[str]] = {}

  def after(later: str, earlier: str) -> None:
    graph.setdefault(later, set()).add(earlier)

  table = None
  carried: dict[str, str] = {}
  for event in events:
    documents = [f"score of document {i}" for i in event["documents"]]
    if event["event"] == "hints":
      for index, score in zip(event["documents"], documents, strict=True):
        counts = f"counts with document {index}"
        if table is not None:
          after(score, table)
          after(counts, table)
        after(counts, score)
        table = counts
    elif event["event"] == "score":
      state = f"adapters {event['adapters']} after batch {event['batch']}"
      before = carried.get(event["adapters"]) if event["carried"] else None
      for score in documents:
        after(score, f"weights {event['weights']}")
        after(state, score)
        if before is not None:
          after(score, before)
      carried[event["adapters"]] = state
    elif event["event"] == "weights":
      state = f"weights {event['version']}"
      after(state, f"weights {event['version'] - 1}")
      for score in documents:
        after(state, score)
  try:
    graphlib.TopologicalSorter(graph).prepare()
  except graphlib.CycleError as error:
    return list(error.args[1])
  return None


def times_scored(events: Sequence[dict]) -> dict[int, int]:
  """Document index → how often it was scored."""
  times: dict[int, int] = {}
  for event in events:
    if event["event"] == "score":
      for index in event["documents"]:
        times[index] = times.get(index, 0) + 1
  return times
