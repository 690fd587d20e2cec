"""The sample on which a run's evaluator is probed: a small stream, and settings under which all states change."""

import dataclasses

import numpy as np
from jax.sharding import Mesh

from pgolf_jax.audit import probes
from pgolf_jax.data.validation import ValidationData
from pgolf_jax.model.params import Params
from pgolf_jax.runtime.checks import Check
from pgolf_jax.scoring import ttt
from pgolf_jax.scoring.documents import find_documents
from pgolf_jax.settings.config import Settings


def probe(
  settings: Settings, params: Params, data: ValidationData, mesh: Mesh, *, tokens: int, count: int
) -> list[Check]:
  """Probes the evaluator that scored a run, on a small stream of its validation text.

  Args:
    tokens: of the stream, about.
    count: perturbations of each kind.
  """
  sample = probe_stream(data, settings, tokens)
  fitted = probe_settings(settings, sample)
  options, programs = ttt.Options(distributions=True), ttt.Programs(fitted, mesh, distributions=True)

  def evaluate(stream_N1):
    return ttt.evaluate(fitted, params, ValidationData(stream_N1, sample.token_bytes), mesh, options, programs)

  model = settings.model
  return probes.run(
    evaluate, sample.tokens, bos_id=model.bos_id, vocab_size=model.vocab_size, probes=count, seed=settings.seed
  )


def probe_settings(settings: Settings, sample: ValidationData) -> Settings:
  """Fits batches and the global phase to a small stream: there are several batches, and a phase if the run has one."""
  documents = len(find_documents(sample.tokens, settings.model.bos_id))
  small = dataclasses.replace(
    settings.ttt,
    batch_size=min(settings.ttt.batch_size, max(2, documents // 3)),
    phase=dataclasses.replace(
      settings.ttt.phase,
      prefix_docs=documents // 2 if settings.ttt.phase.prefix_docs else 0,
      chunk_tokens=min(settings.ttt.phase.chunk_tokens, max(len(sample.tokens) // 8, 16)),
    ),
    eval_batches=(),
  )
  seq_len = min(settings.eval.seq_len, small.phase.chunk_tokens)
  return dataclasses.replace(
    settings, ttt=small, eval=dataclasses.replace(settings.eval, seq_len=seq_len, doc_fraction=1.0)
  )


def probe_stream(data: ValidationData, settings: Settings, tokens: int) -> ValidationData:
  """Joins the beginnings of documents; every other one repeats a stretch of the one before, so that hints occur."""
  documents = find_documents(data.tokens, settings.model.bos_id)
  each = max(tokens // 8, 2 * settings.hints.order + 8)
  parts: list[np.ndarray] = []
  for document in documents[: max(tokens // each, 4)]:
    # Different lengths, so that documents end at different chunks.
    length = min(document.targets, each - len(parts) % 4 * (each // 8))
    part = data.tokens[document.start : document.start + length].copy()
    if len(parts) % 2 and len(part) > 8:
      stretch = parts[-1][1 : 1 + max(len(part) - 4, 1)]
      part[1 : 1 + len(stretch)] = stretch
    parts.append(part)
  stream = np.concatenate(parts)
  return ValidationData(stream, np.where(stream == settings.model.bos_id, 0, 1).astype(np.int32))
