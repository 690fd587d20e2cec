"""Shards: files of token ids, or of the byte sidecar, in a data folder; and the validation stream that they hold.

Layout: 256 little-endian int32 header words (20240520, 1, count, zeros), then `count` little-endian uint16
values. Names: `fineweb_train_%06d.bin`, `fineweb_val_%06d.bin` and, the sidecar of each validation shard,
`fineweb_val_bytes_%06d.bin`.
"""

import dataclasses
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer, UInt16

from pgolf_jax.errors import UserError
from pgolf_jax.runtime.files import replacing

MAGIC = 20240520
VERSION = 1
HEADER_WORDS = 256
HEADER_BYTES = 4 * HEADER_WORDS
TOKEN_TYPE = np.dtype("<u2")
BOS = 1  # starts every document
SPLITS = ("train", "val", "val_bytes")
MAX_COUNT = 2**31 - 1


def shard_path(folder: Path, split: str, index: int) -> Path:
  """Returns the path of shard `index` of `split` ("train", "val" or "val_bytes") in `folder`."""
  return Path(folder) / f"fineweb_{_checked(split)}_{index:06d}.bin"


def list_shards(folder: Path, split: str) -> list[Path]:
  """Returns all shards of `split` in `folder`, in name order.

  Raises:
    UserError: the folder does not exist or has no shard of this split.
  """
  folder = Path(folder)
  if not folder.is_dir():
    if folder.exists():
      raise UserError(f"{folder} is a file, but data are a folder of shards; name that folder.")
    raise UserError(f"{folder}: no such folder; `pgolf data prepare` or `pgolf data download` makes one.")
  name = re.compile(rf"fineweb_{_checked(split)}_\d+\.bin")
  paths = sorted(path for path in folder.iterdir() if name.fullmatch(path.name))
  if not paths:
    raise UserError(
      f"{folder}: no fineweb_{split}_*.bin in it; `pgolf data prepare` or `pgolf data download` makes them."
    )
  return paths


def write_shard(path: Path, tokens_N: Integer[np.ndarray, "N"]) -> None:
  """Writes `tokens_N` as one shard, which appears under its name only once it is complete and on disk.

  Raises:
    UserError: a value does not fit in 16 bits, or there are more values than the header can count.
  """
  path = Path(path)
  tokens_N = np.asarray(tokens_N)
  if tokens_N.ndim != 1 or tokens_N.size > MAX_COUNT:
    raise UserError(f"{path}: a shard holds one row of at most {MAX_COUNT} tokens, got shape {tokens_N.shape}")
  if tokens_N.size:
    low, high = int(tokens_N.min()), int(tokens_N.max())
    if low < 0 or high >= 2**16:
      raise UserError(f"{path}: values from {low} to {high} do not fit in a shard's 16 bits")
  header = np.zeros(HEADER_WORDS, "<i4")
  header[:3] = MAGIC, VERSION, tokens_N.size
  with replacing(path, is_durable=True) as partial, partial.open("wb") as file:
    file.write(header.tobytes())
    np.ascontiguousarray(tokens_N, TOKEN_TYPE).tofile(file)


def read_count(path: Path) -> int:
  """Returns the number of tokens in a shard from its header, after comparing it with the file's size.

  Raises:
    UserError: the file is missing, or its magic number, version or size is wrong; names both numbers.
  """
  path = Path(path)
  try:
    with path.open("rb") as file:
      head = file.read(HEADER_BYTES)
      size = os.fstat(file.fileno()).st_size
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror}); check the data folder") from error
  advice = "fetch or prepare this shard again"
  if len(head) < HEADER_BYTES:
    raise UserError(f"{path}: {size} bytes, but a shard's header alone has {HEADER_BYTES}; {advice}")
  magic, version, count = (int(word) for word in np.frombuffer(head, "<i4", 3))
  if magic != MAGIC:
    raise UserError(f"{path}: magic number {magic} where a token shard has {MAGIC}; {advice}")
  if version != VERSION:
    raise UserError(f"{path}: shard version {version}, this program reads version {VERSION}; {advice}")
  expected = HEADER_BYTES + TOKEN_TYPE.itemsize * count
  if count < 0 or size != expected:
    raise UserError(f"{path}: {size} bytes, but its header promises {count} tokens, {expected} bytes; {advice}")
  return count


def read_shard(path: Path) -> UInt16[np.ndarray, "N"]:
  """Returns the tokens of a shard, mapped read-only from disk.

  Raises:
    UserError: as `read_count`.
  """
  count = read_count(path)
  if not count:  # an empty range cannot be mapped
    return np.empty(0, TOKEN_TYPE)
  return np.memmap(path, TOKEN_TYPE, mode="r", offset=HEADER_BYTES, shape=(count,))


@dataclasses.dataclass(frozen=True)
class TokenizedDocument:
  """The tokens of a document, bos first, and the place in the shards where it starts."""

  path: Path
  start: int
  tokens_N: UInt16[np.ndarray, "N"]

  @property
  def place(self) -> str:
    """Shard and token, for messages."""
    return f"{self.path}, token {self.start}"


def iter_documents(paths: Sequence[Path]) -> Iterator[TokenizedDocument]:
  """Yields the documents of consecutive shards; one that crosses the end of a shard comes in one piece.

  Tokens before the first bos come first, as a document without a bos.
  """
  last: TokenizedDocument | None = None  # the next shard may continue it
  for path in paths:
    tokens_N = read_shard(path)
    starts = np.flatnonzero(tokens_N == BOS)
    ends = [*starts.tolist(), len(tokens_N)]
    if ends[0]:
      head_N = tokens_N[: ends[0]]
      last = (
        dataclasses.replace(last, tokens_N=np.concatenate([last.tokens_N, head_N]))
        if last
        else TokenizedDocument(path, 0, head_N)
      )
    for start, end in itertools.pairwise(ends):
      if last is not None:
        yield last
      last = TokenizedDocument(path, start, tokens_N[start:end])
  if last is not None:
    yield last


def _checked(split: str) -> str:
  if split not in SPLITS:
    raise UserError(f"unknown split {split}; choose one of {', '.join(SPLITS)}")
  return split


class ValidationData(NamedTuple):
  """The validation stream.

  Attributes:
    tokens: token ids, of which all but the first are targets.
    token_bytes: UTF-8 bytes of original text that each token stands for.
  """

  tokens: Integer[np.ndarray, "N1"]
  token_bytes: Integer[np.ndarray, "N1"]

  @property
  def tokens_sha256(self) -> str:
    """SHA-256 of the tokens, in hexadecimal; files that hold them may be cut in any way."""
    return stream_hash(self.tokens)


def stream_hash(x_N1: Integer[np.ndarray, "N1"]) -> str:
  """Returns the SHA-256 of whole numbers of 32 bits, in hexadecimal."""
  return hashlib.sha256(np.ascontiguousarray(x_N1, np.int32).tobytes()).hexdigest()


def load_validation(folder: str | Path) -> ValidationData:
  """Returns the validation stream of a data folder.

  Raises:
    UserError: a shard is damaged or missing, the sidecar has another length than the tokens, or there is no target.
  """
  tokens, token_bytes = (
    np.concatenate([np.asarray(read_shard(path)) for path in list_shards(Path(folder), split)]).astype(np.int32)
    for split in ("val", "val_bytes")
  )
  if len(tokens) != len(token_bytes):
    raise UserError(
      f"{folder}: {len(tokens)} validation tokens but {len(token_bytes)} sidecar entries; prepare the data again."
    )
  if len(tokens) < 2:
    raise UserError(f"{folder}: {len(tokens)} validation tokens leave nothing to predict; prepare the data again.")
  return ValidationData(tokens, token_bytes)
