"""From documents to tokens: one batch at a time, batches shared out over processes, results in order."""

import collections
import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from jaxtyping import UInt16

from pgolf_jax.data import caseops
from pgolf_jax.data.documents import Batch, Position, Record
from pgolf_jax.data.shards import BOS
from pgolf_jax.data.sidecar import token_bytes
from pgolf_jax.data.split import digest
from pgolf_jax.data.tokenizer import Tokenizer
from pgolf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Encoded:
  """The tokens of a batch and what became of its documents."""

  start: Position  # of the batch
  read: int  # bytes of input read so far
  tokens_N: UInt16[np.ndarray, "N"]
  bytes_N: UInt16[np.ndarray, "N"] | None  # sidecar, for validation
  documents: int
  text_bytes: int  # UTF-8 bytes of the documents' text
  duplicates: int  # documents left out because they are held out for validation


class Encoder:
  """Turns documents into tokens, each document as bos and the pieces of its (rewritten) text."""

  def __init__(self, tokenizer: Tokenizer, *, is_caseops: bool, held_out: frozenset[bytes] | None):
    """Pickles, so that worker processes can have it.

    Args:
      tokenizer: whose pieces to use.
      is_caseops: whether to rewrite the text by CaseOps first.
      held_out: digests of documents to leave out, for training; None for validation, which gets a sidecar.
    """
    self._tokenizer, self._is_caseops, self._held_out = tokenizer, is_caseops, held_out

  def __call__(self, batch: Batch) -> Encoded:
    """Encodes a batch.

    Raises:
      UserError: a faulty document, or one whose bytes a lossless tokenizer does not account for; names it.
    """
    tokens, sidecar, duplicates, text_bytes = [], [], 0, 0
    for record in batch.records:
      utf8 = (text := record.text()).encode()
      if self._held_out is not None and digest(utf8) in self._held_out:
        duplicates += 1
        continue
      text_bytes += len(utf8)
      tokens_N, bytes_N = self._encode(record, text, len(utf8))
      tokens += [_BOS, tokens_N]
      sidecar += [_NO_BYTES, bytes_N]
    return Encoded(
      batch.start,
      batch.read,
      np.concatenate(tokens) if tokens else np.empty(0, np.uint16),
      np.concatenate(sidecar) if self._held_out is None else None,
      len(tokens) // 2,
      text_bytes,
      duplicates,
    )

  def _encode(self, record: Record, text: str, size: int):
    coded = caseops.encode(text) if self._is_caseops else text
    tokens_N = self._tokenizer.encode(coded)
    if not tokens_N.size:
      raise UserError(f"{record.name}: nothing is left of this document after normalising; leave it out")
    if self._held_out is not None:
      return tokens_N, None
    try:
      bytes_N = token_bytes(self._tokenizer, coded, tokens_N, is_caseops=self._is_caseops)
    except UserError as error:
      raise UserError(f"{record.name}: {error}") from error
    if self._tokenizer.kind == "lossless" and bytes_N.sum() != size:
      raise UserError(
        f"{record.name}: its tokens stand for {bytes_N.sum()} bytes and its text has {size}; the tokenizer is not "
        "lossless, use another"
      )
    return tokens_N, bytes_N


_BOS = np.array([BOS], np.uint16)
_NO_BYTES = np.zeros(1, np.uint16)


def encode_all(encoder: Encoder, source: Iterable[Batch], workers: int) -> Iterator[Encoded]:
  """Encodes every batch of `source`, in order, in `workers` processes (in this one if 1).

  At most four batches per worker are under way at a time, so memory does not grow with the text.

  Raises:
    UserError: as the encoder, or a worker process was killed.
  """
  if workers == 1:
    yield from map(encoder, source)
    return
  # Spawned, not forked: the caller may hold threads (JAX does), which a fork would leave in an unknown state.
  spawn = multiprocessing.get_context("spawn")
  pool = ProcessPoolExecutor(workers, spawn, initializer=_start_worker, initargs=(encoder,))
  try:
    pending = collections.deque()
    for batch in source:
      pending.append(pool.submit(_encode_in_worker, batch))
      if len(pending) >= 4 * workers:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()
  except BrokenProcessPool as error:
    raise UserError("a worker process was killed, perhaps for want of memory; use fewer workers") from error
  finally:
    pool.shutdown(cancel_futures=True)


_encoder: Encoder | None = None  # of this worker process


def _start_worker(encoder: Encoder) -> None:
  global _encoder
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends the workers
  threading.Thread(target=_exit_with_parent, daemon=True).start()
  _encoder = encoder


def _encode_in_worker(batch: Batch) -> Encoded:
  return _encoder(batch)


def _exit_with_parent() -> None:
  """Ends this worker when its parent is killed; the pool's own queue would keep it waiting for ever."""
  with contextlib.suppress(OSError):
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
  os._exit(1)
