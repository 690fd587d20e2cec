"""What an evaluation found, and what decides it."""

import dataclasses
import hashlib

import jax.numpy as jnp
import numpy as np

from pgolf_jax.model.params import Params
from pgolf_jax.scoring.documents import Batch, Document
from pgolf_jax.scoring.plain import Score, ValidationData
from pgolf_jax.settings.config import Settings
from pgolf_jax.settings.load import to_dict


@dataclasses.dataclass(frozen=True)
class Clocks:
  """Seconds of an evaluation. `evaluation` includes hints, global phases, and fetching and saving scores."""

  evaluation: float
  hints: float
  global_phases: float
  compilation: float  # before the clock; not counted


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What an evaluation found. Arrays are in the stream's order, one entry a target."""

  score: Score  # the result
  untilted: Score  # of the same pass, had there been no hints
  nll_N: np.ndarray  # nats after the tilt; NaN where a target was not to be scored
  model_nll_N: np.ndarray  # before the tilt
  times_N: np.ndarray  # how often each target was scored
  hint_N: np.ndarray  # 0 where the gate is shut
  gate_N: np.ndarray
  params: Params  # model weights after the last global phase
  trace: list[dict]
  clocks: Clocks
  recompilations: int  # inside the clock: a fault
  useful_flops: float  # that the documents' own windows needed
  executed_flops: float  # that ran, padding included
  distributions: dict[int, np.ndarray]  # target → log-probabilities [V] after the tilt, where asked for


def identity(settings: Settings, params: Params, data: ValidationData, dtype) -> dict:
  """What decides the result, as hashes and plain values."""
  weights = hashlib.sha256()
  for name in sorted(params):
    weights.update(name.encode() + np.asarray(params[name], np.float32).tobytes())
  plain = {k: v for k, v in to_dict(settings).items() if k in ("model", "ttt", "hints", "eval", "seed")}
  return {
    "settings": plain,
    "weights": weights.hexdigest(),
    "tokens": hashlib.sha256(np.ascontiguousarray(data.tokens, np.int32).tobytes()).hexdigest(),
    "dtype": jnp.dtype(dtype).name,
  }


def total(nll_N: np.ndarray, data: ValidationData) -> Score:
  """Sum over the targets that were scored, in float64."""
  scored = ~np.isnan(nll_N)
  nats = float(np.sum(nll_N, where=scored, dtype=np.float64))
  return Score(nats, int(scored.sum()), int(np.sum(data.token_bytes[1:], where=scored, dtype=np.int64)))


def document_lines(batches: list[Batch], found: Evaluation, data: ValidationData) -> list[dict]:
  """One line a document, in the order of scoring: where it stands, its bytes, its nats with and without the tilt."""
  return [_document_line(batch, document, found, data) for batch in batches for document in batch.documents]


def _document_line(batch: Batch, document: Document, found: Evaluation, data: ValidationData) -> dict:
  where = document.target_slice
  return {
    "document": document.index,
    "batch": batch.index,
    "start": document.start,
    "targets": document.targets,
    "bytes": int(data.token_bytes[where.start + 1 : where.stop + 1].sum(dtype=np.int64)),
    "nats": float(found.nll_N[where].sum(dtype=np.float64)),
    "nats_untilted": float(found.model_nll_N[where].sum(dtype=np.float64)),
    "hints": int(found.gate_N[where].sum()),
  }
