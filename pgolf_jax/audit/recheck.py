"""The scores themselves, without the model: hints built again, every tilt computed again, every sum added up again.

The model's probability of a hint is part of the record, so that each tilted score follows from the record by the
formula of `scoring.hints.tilt`; whether that probability is the model's is for the replay to find out.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pgolf_jax.data.shards import ValidationData
from pgolf_jax.errors import Check, UserError, shown
from pgolf_jax.kernels.ngram import NgramState
from pgolf_jax.runtime.files import read_json, read_json_lines
from pgolf_jax.runtime.memory import cores
from pgolf_jax.scoring import record
from pgolf_jax.scoring.documents import Document, find_documents
from pgolf_jax.scoring.hints import CLASSES, SHARES, TOTALS
from pgolf_jax.scoring.record import Event, HintsEvent, ScoreEvent, Scores, WeightsEvent
from pgolf_jax.scoring.strength import SHIFTS, SLOPES
from pgolf_jax.settings import Settings
from pgolf_jax.settings.load import changed

_TILT_ERROR = 5e-5  # nats; scores are float32 numbers of up to some tens of nats
_PROBABILITY_ERROR = 1e-4
_SUM_ERROR = 1e-9  # of a sum, relative; both are float64 sums of the same numbers
_PRINTED_ERROR = 5.1e-6  # bits per byte, of a figure printed with five digits
_BLOCK = 1 << 16  # targets whose strengths are computed at once
_MOST_RANKS = 1 << 10
_KEPT = 8  # results about streams that a subject remembers: those of the run and of a few cuts


class Hinted(NamedTuple):
  """The hint of each target of a stream."""

  ids_N: np.ndarray  # the token hinted at; 0 where the gate is shut
  gate_N: np.ndarray
  kind_N: np.ndarray  # 0 where the gate is shut


@dataclasses.dataclass(frozen=True)
class Subject:
  """What is audited: the scores of a stream and the trace of how they came about."""

  settings: Settings
  data: ValidationData
  scores: Scores
  trace: Sequence[Event]

  @classmethod
  def read(cls, folder: Path, settings: Settings, data: ValidationData) -> "Subject":
    """Reads what an evaluation left in a folder.

    Raises:
      UserError: a file is missing or damaged.
    """
    path = folder / "trace.jsonl"
    if not path.is_file():
      raise UserError(f"{folder} has no trace.jsonl; score the run with test-time training.")
    try:
      trace = record.read_trace(path)
      if wrong := next((event for event in trace if not _is_sound(event)), None):
        raise TypeError(f"event {shown(str(wrong))}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise UserError(f"{path} is damaged ({error}); score the run again.") from None
    return cls(settings, data, record.read_scores(folder, len(data.tokens) - 1), trace)

  @functools.cached_property
  def documents(self) -> list[Document]:
    """All documents of the stream."""
    return find_documents(self.data.tokens, self.settings.model.bos_id)

  @functools.cached_property
  def batches(self) -> list[list[Document]]:
    """Documents in the order of scoring, those of a batch together, as the trace tells it.

    Raises:
      UserError: the trace names a document that the stream does not have.
    """
    return [self._named(event) for event in self.trace if isinstance(event, ScoreEvent)]

  @functools.cached_property
  def _results(self) -> dict[tuple, tuple]:
    """(Function's name, identities of arrays) → (the arrays, so that no others get their identities; its result)."""
    return {}

  def _once(self, function: Callable, *arrays: np.ndarray):
    """Returns a function's result, computed again only if that was long ago."""
    key = (function.__name__, *map(id, arrays))
    if key not in self._results:
      if len(self._results) >= _KEPT:
        del self._results[next(iter(self._results))]
      self._results[key] = arrays, function(*arrays)
    return self._results[key][1]

  def hints(self, tokens_N1: np.ndarray) -> Hinted:
    """Returns the hints of a stream whose documents are counted in the trace's order."""
    return self._once(self._count, tokens_N1)

  def _in_order(self) -> list[Document]:
    """Documents in the order in which they are counted."""
    return [document for event in self.trace if isinstance(event, HintsEvent) for document in self._named(event)]

  def _count(self, tokens_N1: np.ndarray) -> Hinted:
    targets = len(tokens_N1) - 1
    hinted = Hinted(np.zeros(targets, np.int32), np.zeros(targets, bool), np.zeros(targets, np.int16))
    if not self.settings.hints.enabled:
      return hinted
    if self.settings.ttt.order == "reference":
      # As published: one pass over the stream, its first target in place of its first token.
      parts = [(slice(0, targets), np.append(tokens_N1[1:2], tokens_N1[1:]))]
    else:
      parts = [(d.target_slice, tokens_N1[d.start : d.start + d.length]) for d in self._in_order()]
    # Not by the evaluator's own functions: whoever bends those must not bend the audit with them.
    config = self.settings.hints
    for place, order in enumerate(config.orders):
      counts = NgramState(
        order,
        threshold=config.threshold,
        mode=config.table,
        vocab_size=self.settings.model.vocab_size,
        expected=targets,
        threads=min(cores(), 8),  # many gain little, and 64 are the most
      )
      for where, text in parts:
        if len(text) and counts.last != text[0]:
          counts.seed(np.ascontiguousarray(text[:1]))
        share, total = np.zeros(len(text) - 1, np.float32), np.zeros(len(text) - 1, np.int32)
        ids, gate = counts.update(np.ascontiguousarray(text[1:]), confidence=share, total=total)
        gate |= config.table == "reference" and config.threshold <= 0  # a confidence of 0 passes, as published
        new = gate & ~hinted.gate_N[where]
        hinted.ids_N[where][new], hinted.gate_N[where][new] = ids[new], True
        hinted.kind_N[where][new] = (
          place * CLASSES
          + (len(TOTALS) + 1) * np.searchsorted(SHARES, share[new], side="right")
          + np.searchsorted(TOTALS, total[new], side="right")
        )
    return hinted

  def boosts(self, scores: Scores, tokens_N1: np.ndarray) -> np.ndarray:
    """Returns the strength β of every tilt, in nats; where it is learnt, as the hints before it and their scores say.

    Args:
      scores: of the stream. A target's strength does not depend on its own score, nor on later ones.
      tokens_N1: the stream.
    """
    config = self.settings.hints
    if config.strength == "fixed":
      return np.broadcast_to(np.float64(np.float32(config.boost)), len(tokens_N1) - 1)
    return self._once(self._learnt_boosts, scores.hint_nll_N, tokens_N1)

  def _learnt_boosts(self, hint_nll_N: np.ndarray, tokens_N1: np.ndarray) -> np.ndarray:
    hint_N, gate_N, kind_N = self.hints(tokens_N1)
    boost_N = np.zeros(len(hint_N))
    if not gate_N.any():
      return boost_N
    target_M = np.concatenate([np.arange(d.target_slice.start, d.target_slice.stop) for d in self._in_order()])
    target_M = target_M[gate_N[target_M]]
    for kind in np.unique(kind_N[target_M]):
      evidence_E = np.zeros(len(SLOPES) * len(SHIFTS))
      of_kind = target_M[kind_N[target_M] == kind]
      for at in np.split(of_kind, range(_BLOCK, len(of_kind), _BLOCK)):
        hint_nll = np.maximum(hint_nll_N[at].astype(np.float64), 1e-30)
        odds = np.clip(-hint_nll - np.log(-np.expm1(-hint_nll)), -16, 16)
        is_right, q = hint_N[at] == tokens_N1[at + 1], 1 / (1 + np.exp(-odds))
        expert_Exm = np.stack([1 / (1 + np.exp(-(a * odds + b))) for a in SLOPES for b in SHIFTS])
        told_Exm = np.log(np.where(is_right, expert_Exm / q, (1 - expert_Exm) / (1 - q)))
        after_Exm = evidence_E[:, None] + np.cumsum(told_Exm, axis=1)
        before_Exm = np.column_stack([evidence_E, after_Exm[:, :-1]])
        weight_Exm = np.exp(before_Exm - before_Exm.max(axis=0))
        mixed = (weight_Exm * expert_Exm).sum(axis=0) / weight_Exm.sum(axis=0)
        boost_N[at] = np.log(mixed / (1 - mixed)) - odds
        evidence_E = after_Exm[:, -1]
    return boost_N

  def _named(self, event: Event) -> list[Document]:
    if not all(0 <= index < len(self.documents) for index in event.documents):
      raise UserError(f"The trace names documents up to {max(event.documents)}; there are {len(self.documents)}.")
    return [self.documents[index] for index in event.documents]


def _is_sound(event: Event) -> bool:
  """Whether an event that was read has whole numbers where it should."""
  values = {"adapters": "", **vars(event)}
  label, documents = values.pop("adapters"), values.pop("documents")
  return isinstance(label, str) and all(type(number) is int for number in (*documents, *values.values()))


def as_scored(settings: Settings, folder: Path) -> Settings:
  """Returns settings with the ranks and chains of an evaluation in a folder: 0 leaves them to the number of devices.

  Raises:
    UserError: the settings leave them open, and what the evaluation wrote of them is missing or damaged.
  """
  if settings.train.world_size:
    return settings
  identity = read_json(folder / "identity.json")
  chains = settings.ttt.chains or identity.get("chains")
  ranks = identity.get("ranks of a global phase") if settings.ttt.phase.prefix_docs > 0 else chains
  if not all(type(count) is int and 0 < count <= _MOST_RANKS for count in (ranks, chains)):
    raise UserError(f"{folder / 'identity.json'} is damaged ({shown(chains)} chains, {shown(ranks)} ranks).")
  return changed(settings, {"train.world_size": ranks, "ttt.chains": chains})


def recheck(subject: Subject, folder: Path, reported: dict | None) -> Iterator[Check]:
  """Makes all checks that need no model.

  Args:
    folder: holds documents.jsonl.
    reported: what the run says of its evaluation in results.json; None if it says nothing.
  """
  yield scored_once(subject)
  yield one_order(subject)
  yield tilts(subject, subject.scores, np.ones(len(subject.scores.nll_N), bool))
  yield from sums(subject, folder, reported)


def scored_once(subject: Subject) -> Check:
  """Every target was scored exactly once, with a finite number."""
  name, scores = "every target scored exactly once", subject.scores
  wrong = np.flatnonzero(scores.times_N != 1)
  if len(wrong):
    times = scores.times_N[wrong[0]]
    return Check(name, False, f"{len(wrong)} targets were not: target {wrong[0]} was scored {times} times")
  for kind, x_N in (("score", scores.nll_N), ("model's score", scores.model_nll_N)):
    wrong = np.flatnonzero(~(np.isfinite(x_N) & (x_N >= -1e-5)))
    if len(wrong):
      return Check(name, False, f"the {kind} of target {wrong[0]} is {x_N[wrong[0]]} ({len(wrong)} such)")
  listed = sorted(document.index for batch in subject.batches for document in batch)
  if listed != list(range(len(subject.documents))):
    return Check(name, False, f"the trace scores {len(listed)} documents, not each of {len(subject.documents)} once")
  return Check(name, True, f"{len(scores.nll_N):,} targets of {len(listed):,} documents")


def one_order(subject: Subject) -> Check:
  """One order of documents explains the trace: whatever a score depends on was scored before."""
  name = "one order explains every score"
  version = 0
  for event in subject.trace:
    version = event.version if isinstance(event, WeightsEvent) else version
    if isinstance(event, ScoreEvent) and event.weights != version:
      return Check(name, False, f"batch {event.batch} was scored with weights {event.weights}, made were {version}")
  cycle = record.find_cycle(subject.trace)
  if cycle is None:
    return Check(name, True, f"the trace of {len(subject.documents):,} documents is acyclic")
  shown = " ← ".join(cycle[:6]) + (" ← …" if len(cycle) > 6 else "")
  events = [event for event in subject.trace if not isinstance(event, HintsEvent)]
  if subject.settings.ttt.order == "reference" and record.find_cycle(events) is None:
    text = f"not acyclic, as is the published order: hints from documents scored later ({shown})"
    return Check(name, None, f'{text}; ttt.order = "strict" can be proved')
  return Check(name, False, f"not acyclic: {shown}")


def tilts(subject: Subject, scores: Scores, where_N: np.ndarray, tokens_N1: np.ndarray | None = None) -> Check:
  """Every score follows from the model's by a tilt towards a hint that was built from earlier tokens alone.

  Args:
    scores: of the subject's stream, or of another.
    where_N: targets to look at.
    tokens_N1: the other stream.
  """
  name = "hints and tilts recomputed"
  tokens_N1 = subject.data.tokens if tokens_N1 is None else tokens_N1
  hint_N, gate_N, _ = subject.hints(tokens_N1)
  beta_N = subject.boosts(scores, tokens_N1)
  is_right_N = gate_N & (hint_N == tokens_N1[1:])
  model_N, hint_nll_N = scores.model_nll_N.astype(np.float64), scores.hint_nll_N.astype(np.float64)

  def first(wrong_N: np.ndarray, text: str) -> Check | None:
    wrong = np.flatnonzero(wrong_N & where_N)
    if not len(wrong):
      return None
    t = wrong[0]
    values = f"score {scores.nll_N[t]:.6f}, model {scores.model_nll_N[t]:.6f}, hint {scores.hint_nll_N[t]:.6f}"
    return Check(name, False, f"target {t} {text} ({values}); {len(wrong)} such")

  with np.errstate(invalid="ignore", over="ignore"):
    q_N = np.exp(-np.maximum(hint_nll_N, 0))
    expected_N = model_N - beta_N * is_right_N + np.log((1 - q_N) + q_N * np.exp(beta_N))
    apart_N = np.abs(scores.nll_N - expected_N)
    p_N = np.exp(-model_N)
    broken = (
      first(~gate_N & (scores.nll_N != scores.model_nll_N), "has no hint, yet its score is not the model's")
      or first(is_right_N & ~(np.abs(hint_nll_N - model_N) <= _TILT_ERROR), "is its hint, yet they differ")
      or first(gate_N & ~is_right_N & ~(p_N + q_N <= 1 + _PROBABILITY_ERROR), "and its hint are too probable together")
      or first(gate_N & ~(apart_N <= _TILT_ERROR), "is not scored as its hint says")
    )
  if broken:
    return broken
  gates, right = int((gate_N & where_N).sum()), int((is_right_N & where_N).sum())
  worst = float(apart_N.max(initial=0, where=gate_N & where_N))
  return Check(
    name, True, f"{gates:,} hints, {right:,} of them right; every tilt within {worst:.0e} nats of the formula"
  )


def sums(subject: Subject, folder: Path, reported: dict | None) -> Iterator[Check]:
  """Documents and results add up to the scores, and their bytes to those of the sidecar."""
  name, scores, token_bytes = "sums of the results", subject.scores, subject.data.token_bytes
  try:
    lines = read_json_lines(folder / "documents.jsonl")
    by_document = {line["document"]: line for line in lines}
    counted = sum(line["bytes"] for line in lines)
    wrong = _wrong_documents(subject, by_document)
  except (UserError, KeyError, TypeError) as error:
    yield Check(name, False, f"{folder / 'documents.jsonl'} is missing or damaged ({error}); score the run again")
    return
  nats, text_bytes = float(scores.nll_N.sum(dtype=np.float64)), int(token_bytes[1:].sum(dtype=np.int64))
  total = {
    "loss": nats / len(scores.nll_N),
    "bpb": nats / math.log(2) / max(text_bytes, 1),
    "bpb_without_hints": float(scores.model_nll_N.sum(dtype=np.float64)) / math.log(2) / max(text_bytes, 1),
    "targets": len(scores.nll_N),
    "bytes": text_bytes,
    "gated": int(subject.hints(subject.data.tokens).gate_N.sum()),
    "order": subject.settings.ttt.order,
    "method": subject.settings.ttt.method,
  }
  if len(lines) != len(subject.documents) or wrong:
    yield Check(name, False, wrong or f"documents.jsonl has {len(lines)} lines for {len(subject.documents)} documents")
  elif reported is None:
    yield Check(name, None, "not checked: results.json says nothing of the evaluation; `pgolf run` writes it")
  elif off := [key for key, value in total.items() if not _equal(reported.get(key), value)]:
    key = off[0]
    yield Check(name, False, f"results.json says {key} {reported.get(key)}, the scores add up to {total[key]}")
  else:
    yield Check(name, True, f"{len(lines):,} documents and the results: {total['bpb']:.5f} bits per byte")
  agrees = counted == text_bytes
  yield Check("bytes of the score", agrees, f"{counted:,} counted, the sidecar adds up to {text_bytes:,}")


def _wrong_documents(subject: Subject, by_document: dict[int, dict]) -> str | None:
  """The first document whose line is not what the scores and the sidecar say."""
  for document in subject.documents:
    targets, line = document.target_slice, by_document.get(document.index)
    if line is None:
      return f"documents.jsonl lacks document {document.index}"
    expected = {
      "targets": document.targets,
      "bytes": int(subject.data.token_bytes[targets.start + 1 : targets.stop + 1].sum(dtype=np.int64)),
      "nats": float(subject.scores.nll_N[targets].sum(dtype=np.float64)),
      "nats_untilted": float(subject.scores.model_nll_N[targets].sum(dtype=np.float64)),
    }
    for key, value in expected.items():
      if not _equal(line[key], value):
        return f"documents.jsonl says {key} {line[key]} of document {document.index}, the scores {value}"
  return None


def printed(log: Path, bpb: float | None) -> Check:
  """The last line of the run's log that tells the score, be it of the table or before it, tells that of the results."""
  name = "the printed table"
  try:
    told = re.findall(r"(?m)^(?:\S+Z ttt: |test-time training +)(\d+\.\d+)", log.read_text(encoding="utf-8"))
    shown = float(told[-1])
  except (OSError, ValueError, IndexError):
    return Check(name, None, f"not checked: {log} does not tell the score")
  if not _equal(bpb, bpb if isinstance(bpb, float) else 0.0):
    return Check(name, None, "not checked: results.json says nothing of the evaluation")
  return Check(name, abs(shown - bpb) <= _PRINTED_ERROR, f"{shown:.5f} printed, {bpb:.5f} in the results")


def _equal(stated: object, value: float | str) -> bool:
  if isinstance(value, str):
    return stated == value
  if isinstance(stated, bool) or not isinstance(stated, int | float):
    return False
  try:
    return abs(stated - value) <= _SUM_ERROR * max(1.0, abs(value))
  except OverflowError:  # a whole number of hundreds of digits
    return False
