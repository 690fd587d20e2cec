"""From documents to tokens and their byte sidecar, in batches shared out over processes, with results in order."""

import collections
import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import types
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from jaxtyping import Integer, UInt16

from pgolf_jax.data import caseops
from pgolf_jax.data.caseops import Markers
from pgolf_jax.data.corpus import Position, RawBatch, RawDocument, digest
from pgolf_jax.data.shards import BOS, ValidationData
from pgolf_jax.data.tokenizer import Tokenizer
from pgolf_jax.errors import UserError

MAX_TOKEN_BYTES = 2**16 - 1  # a value of the sidecar


def token_bytes(
  tokenizer: Tokenizer, coded: str, tokens_N: Integer[np.ndarray, "N"], *, is_caseops: bool = True
) -> UInt16[np.ndarray, "N"]:
  """Returns the UTF-8 bytes of original text under the surface of each piece (recipe section 1).

  Args:
    tokenizer: whose pieces `tokens_N` are.
    coded: the text that was tokenized.
    tokens_N: its pieces, without the leading bos.
    is_caseops: whether `coded` is CaseOps text, whose markers stand for no bytes, or the original text itself.

  Raises:
    UserError: the tokens are not the pieces of `coded`, or one stands for more than 65,535 bytes.
  """
  bytes_C = caseops.original_bytes(coded) if is_caseops else caseops.utf8_bytes(coded)
  before_C = np.concatenate([[0], np.cumsum(bytes_C)])
  begin_N, end_N = tokenizer.surfaces(coded, tokens_N)
  bytes_N = before_C[end_N] - before_C[begin_N]
  if bytes_N.max(initial=0) > MAX_TOKEN_BYTES:
    raise UserError(
      f"one token stands for {bytes_N.max()} bytes, more than the sidecar's {MAX_TOKEN_BYTES}; shorten the text"
    )
  return bytes_N.astype(np.uint16)


@dataclasses.dataclass(frozen=True)
class EncodedBatch:
  """The tokens of a batch and counts of its documents."""

  start: Position  # of the batch
  bytes_read: int  # of the input files, up to the end of the batch
  tokens_N: UInt16[np.ndarray, "N"]
  bytes_N: UInt16[np.ndarray, "N"] | None  # sidecar, for validation
  documents: int
  text_bytes: int  # UTF-8 bytes of the documents' text
  duplicates: int  # documents left out because they are held out for validation


class Encoder:
  """Turns documents into tokens: for each document a bos and the pieces of its (rewritten) text."""

  def __init__(self, tokenizer: Tokenizer, *, markers: Markers, held_out: frozenset[bytes] | None):
    """Makes an encoder, which can be pickled for worker processes.

    Args:
      tokenizer: whose pieces to use.
      markers: where CaseOps puts them, which rewrites the text first.
      held_out: digests of documents to leave out, for training; None for validation, which gets a sidecar.
    """
    self._tokenizer, self._markers, self._held_out = tokenizer, markers, held_out

  def __call__(self, batch: RawBatch) -> EncodedBatch:
    """Encodes a batch.

    Raises:
      UserError: a document is faulty, or its tokens do not stand for all its bytes though the tokenizer is lossless;
        names the document.
    """
    tokens, sidecar, duplicates, text_bytes = [], [], 0, 0
    for document in batch.documents:
      utf8 = (text := document.text()).encode()
      if self._held_out is not None and digest(utf8) in self._held_out:
        duplicates += 1
        continue
      text_bytes += len(utf8)
      tokens_N, bytes_N = self._encode(document, text, len(utf8))
      tokens += [_BOS, tokens_N]
      sidecar += [_NO_BYTES, bytes_N]
    return EncodedBatch(
      batch.start,
      batch.bytes_read,
      np.concatenate(tokens) if tokens else np.empty(0, np.uint16),
      np.concatenate(sidecar) if self._held_out is None else None,
      len(tokens) // 2,
      text_bytes,
      duplicates,
    )

  def _encode(self, document: RawDocument, text: str, size: int):
    coded = caseops.encode(text, self._markers)
    tokens_N = self._tokenizer.encode(coded)
    if not tokens_N.size:
      raise UserError(f"{document.place}: nothing is left of this document after normalising; remove it")
    if self._held_out is not None:
      return tokens_N, None
    try:
      bytes_N = token_bytes(self._tokenizer, coded, tokens_N, is_caseops=self._markers != "none")
    except UserError as error:
      raise UserError(f"{document.place}: {error}") from error
    if self._tokenizer.kind == "lossless" and bytes_N.sum() != size:
      raise UserError(
        f"{document.place}: its tokens stand for {bytes_N.sum()} bytes and its text has {size}; the tokenizer is not "
        "lossless, use another"
      )
    return tokens_N, bytes_N


_BOS = np.array([BOS], np.uint16)
_NO_BYTES = np.zeros(1, np.uint16)


def encode_all(encoder: Encoder, batches: Iterable[RawBatch], workers: int) -> Iterator[EncodedBatch]:
  """Yields every batch encoded, in order, by `workers` processes (by this one if 1).

  At most four batches per worker are in progress at a time, so that memory does not grow with the corpus.

  Raises:
    UserError: as `Encoder.__call__`, or a worker process was killed.
  """
  if workers == 1:
    yield from map(encoder, batches)
    return
  # Spawned, not forked: the caller may hold threads (JAX does), which a fork would leave in an unknown state.
  spawn = multiprocessing.get_context("spawn")
  pool = ProcessPoolExecutor(workers, spawn, initializer=_start_worker, initargs=(encoder,))
  try:
    pending = collections.deque()
    for batch in batches:
      with _without_main_module():
        pending.append(pool.submit(_encode_in_worker, batch))
      if len(pending) >= 4 * workers:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()
  except BrokenProcessPool as error:
    raise UserError("a worker process was killed, perhaps because memory ran out; use fewer workers") from error
  finally:
    pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
  """Lets processes start that do not run the caller's script: a spawned process runs it again, guard or no guard."""
  main = sys.modules["__main__"]
  sys.modules["__main__"] = types.ModuleType("__main__")
  try:
    yield
  finally:
    sys.modules["__main__"] = main


_encoder: Encoder | None = None  # of this worker process


def _start_worker(encoder: Encoder) -> None:
  global _encoder
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends the workers
  threading.Thread(target=_exit_with_parent, daemon=True).start()
  _encoder = encoder


def _encode_in_worker(batch: RawBatch) -> EncodedBatch:
  return _encoder(batch)


def _exit_with_parent() -> None:
  """Ends this worker when its parent is killed; otherwise it would wait at the pool's queue for ever."""
  with contextlib.suppress(OSError):
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
  os._exit(1)


def encode_texts(texts: Sequence[str], tokenizer: Tokenizer, markers: Markers) -> ValidationData:
  """Returns texts as a stream of documents with their byte sidecar, as `prepare` would lay them out for validation.

  Raises:
    UserError: there is no text, or one is empty or no Unicode.
  """
  if not texts:
    raise UserError("There is no text to score; give one, or a list of some.")
  documents = []
  for number, text in enumerate(texts):
    try:
      documents.append(RawDocument(f"text {number}", 0, text.encode()))
    except (UnicodeEncodeError, AttributeError) as error:
      raise UserError(f"text {number} cannot be scored ({error}); give strings of whole Unicode characters.") from error
  encoder = Encoder(tokenizer, markers=markers, held_out=None)
  batch = encoder(RawBatch(Position(), documents, 0))
  return ValidationData(batch.tokens_N.astype(np.int32), batch.bytes_N.astype(np.int32))
