"""Proving that a data folder is what it should be: every check, and what it found."""

import hashlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from pgolf_jax.data import caseops
from pgolf_jax.data.manifest import TOKENIZER, Manifest, sha256_of
from pgolf_jax.data.shards import BOS, Document, iter_documents, list_shards, read_count, read_shard, shard_path
from pgolf_jax.data.sidecar import token_bytes
from pgolf_jax.data.split import digest
from pgolf_jax.data.tokenizer import Tokenizer
from pgolf_jax.errors import UserError
from pgolf_jax.runtime.checks import Check
from pgolf_jax.runtime.progress import progress


class _Failed(Exception):
  pass


class _NotApplicable(Exception):
  pass


def verify(folder: Path, tokenizer: Path | None = None) -> Iterator[Check]:
  """Checks a data folder, each check on its own.

  Args:
    folder: shards, and perhaps sidecar, tokenizer and manifest.
    tokenizer: a .model file, if not the folder's own.
  """
  data = _Folder(Path(folder), tokenizer)
  with progress("verifying", total=len(_CHECKS), unit="checks") as bar:
    for name, check in _CHECKS.items():
      bar.note(name)
      bar.advance(0)
      try:
        yield Check(name, True, check(data))
      except _NotApplicable as reason:
        yield Check(name, None, f"not checked: {reason}")
      except (_Failed, UserError) as fault:
        yield Check(name, False, str(fault))
      bar.advance()


class _Folder:
  def __init__(self, folder: Path, tokenizer: Path | None):
    self.path = folder
    self._tokenizer = tokenizer

  @cached_property
  def manifest(self) -> Manifest | None:
    return Manifest.read(self.path)

  @cached_property
  def tokenizer(self) -> Tokenizer:
    path = self._tokenizer or self.path / TOKENIZER
    if not path.exists():
      raise _NotApplicable(f"no {TOKENIZER} in the folder; name one with --tokenizer")
    return Tokenizer.load(path)

  @cached_property
  def is_caseops(self) -> bool:
    return self.manifest.is_caseops if self.manifest else self.tokenizer.has_caseops

  def shards(self, split: str) -> list[Path]:
    return list_shards(self.path, split)

  def sidecar(self) -> list[Path]:
    """Files of the byte sidecar; data in which nothing was rewritten may go without."""
    if not any(self.path.glob("fineweb_val_bytes_*.bin")) and not self.manifest and not self.tokenizer.has_caseops:
      raise _NotApplicable("no sidecar, and text without CaseOps needs none")
    return self.shards("val_bytes")

  def documents(self, split: str) -> Iterator[Document]:
    return iter_documents(self.shards(split))


def _headers(data: _Folder) -> str:
  found = []
  for split in ("train", "val"):
    paths = data.shards(split)
    counts = [read_count(path) for path in paths]
    for index, path in enumerate(paths):
      if path != (expected := shard_path(data.path, split, index)):
        raise _Failed(f"{expected} is missing: {path.name} comes next; fetch or prepare it")
    found.append(f"{split}: {len(paths)} shards, {sum(counts):,} tokens")
  return "; ".join(found)


def _range(data: _Folder) -> str:
  size, highest = data.tokenizer.vocab_size, 0
  for path in [*data.shards("train"), *data.shards("val")]:
    tokens_N = read_shard(path)
    highest = max(highest, int(tokens_N.max(initial=0)))
    if highest >= size:
      at = int(np.argmax(tokens_N >= size))
      raise _Failed(
        f"{path}: token {tokens_N[at]} at {at} lies outside the tokenizer's {size} pieces; one of both is wrong"
      )
  return f"all below {size}; highest {highest}"


def _structure(data: _Folder) -> str:
  found = []
  for split in ("train", "val"):
    count, longest = 0, 0
    for document in data.documents(split):
      if document.tokens_N[0] != BOS:
        raise _Failed(
          f"{document.place}: the first document does not start with bos ({BOS}) but {document.tokens_N[0]}"
        )
      if len(document.tokens_N) == 1:
        raise _Failed(f"{document.place}: an empty document, bos alone")
      count += 1
      longest = max(longest, len(document.tokens_N))
    found.append(f"{split}: {count:,} documents, the longest of {longest:,} tokens")
  for path in data.shards("train"):
    if BOS not in read_shard(path):
      raise _Failed(
        f"{path}: no document starts in it, so a training run would find no place to start; use larger shards"
      )
  return "; ".join(found)


def _sidecar(data: _Folder) -> str:
  paths, sidecar_paths = data.shards("val"), data.sidecar()
  if len(paths) != len(sidecar_paths):
    raise _Failed(
      f"{data.path}: {len(sidecar_paths)} sidecar files for {len(paths)} validation shards; prepare both again"
    )
  total, before = 0, BOS  # the token before the shard
  for path, sidecar_path in zip(paths, sidecar_paths, strict=True):
    tokens_N, bytes_N = read_shard(path), read_shard(sidecar_path)
    if len(tokens_N) != len(bytes_N):
      raise _Failed(
        f"{sidecar_path}: {len(bytes_N)} entries for {len(tokens_N)} tokens of {path.name}; prepare both again"
      )
    wrong_N = _stands_for_nothing(data, tokens_N, before) & (bytes_N != 0)
    if wrong_N.any():
      at = int(np.argmax(wrong_N))
      raise _Failed(f"{sidecar_path}: {bytes_N[at]} bytes at {at} for token {tokens_N[at]}, which stands for none")
    total += int(bytes_N.sum(dtype=np.int64))
    before = int(tokens_N[-1]) if len(tokens_N) else before
  return f"{total:,} bytes of text"


def _stands_for_nothing(data: _Folder, tokens_N: np.ndarray, before: int) -> np.ndarray:
  """Where a bos stands, or a CaseOps marker that is not escaped."""
  silent_N = tokens_N == BOS
  if data.is_caseops:
    *others, esc = (int(data.tokenizer.encode(marker)[0]) for marker in caseops.MARKERS)
    after_esc_N = np.concatenate([[before], tokens_N])[:-1] == esc
    silent_N |= np.isin(tokens_N, [*others, esc]) & ~after_esc_N
  return silent_N


def _text(data: _Folder) -> str:
  """A lossless tokenizer gives the text back: then tokens, sidecar and hash can be made again and compared."""
  tokenizer = data.tokenizer
  if tokenizer.kind != "lossless":
    raise _NotApplicable("the tokenizer is normalising, so tokens do not give the text back")
  sidecar = _stream(data.sidecar())
  digests, at = hashlib.sha256(), 0
  for document in data.documents("val"):
    tokens_N = document.tokens_N[1:]
    try:
      coded = tokenizer.decode(tokens_N)
      text = caseops.decode(coded) if data.is_caseops else coded
    except UserError as error:
      raise _Failed(f"{document.place}: {error}") from error
    if not np.array_equal(tokenizer.encode(coded), tokens_N):
      raise _Failed(f"{document.place}: not the tokens that this tokenizer makes of this document; prepare it again")
    at += 1
    bytes_N = token_bytes(tokenizer, coded, tokens_N, is_caseops=data.is_caseops)
    wrong_N = bytes_N != sidecar[at : at + len(tokens_N)]
    if wrong_N.any():
      i = int(np.argmax(wrong_N))
      raise _Failed(
        f"{document.place}: token {i + 1} of this document stands for {bytes_N[i]} bytes, the sidecar has "
        f"{sidecar[at + i]}; prepare both again"
      )
    at += len(tokens_N)
    digests.update(digest(text.encode()))
  if data.manifest and digests.hexdigest() != data.manifest.validation_sha256:
    raise _Failed(f"{data.path}: the validation documents are not those that the manifest names; prepare them again")
  return f"{at:,} validation tokens decode to text that gives the same tokens and bytes"


def _overlap(data: _Folder) -> str:
  held_out = {digest(document.tokens_N.tobytes()): document for document in data.documents("val")}
  shared = [
    (document, held_out[key])
    for document in data.documents("train")
    if (key := digest(document.tokens_N.tobytes())) in held_out
  ]
  if shared:
    train, val = shared[0]
    raise _Failed(
      f"{len(shared)} validation documents are in the training shards, first that of {val.place} at {train.place}; "
      "prepare the folder again"
    )
  return f"none of {len(held_out):,} different validation documents is in the training shards"


def _manifest(data: _Folder) -> str:
  manifest = data.manifest
  if manifest is None:
    raise _NotApplicable(f"no manifest of this program in {data.path}")
  if data.tokenizer.sha256 != manifest.tokenizer_sha256:
    raise _Failed(f"{data.path / TOKENIZER}: not the tokenizer that the manifest names; prepare the folder again")
  listed = {"train": manifest.train.shards, "val": manifest.val.shards, "val_bytes": manifest.val.sidecar}
  for split, files in listed.items():
    if (names := [path.name for path in data.shards(split)]) != [file.name for file in files]:
      raise _Failed(
        f"{data.path}: {len(names)} {split} files, the manifest lists {len(files)}; prepare the folder again"
      )
    for file in files:
      if (found := sha256_of(data.path / file.name)) != file.sha256:
        raise _Failed(
          f"{data.path / file.name}: SHA-256 {found[:12]}…, the manifest has {file.sha256[:12]}…; fetch it again"
        )
  for split, facts in (("train", manifest.train), ("val", manifest.val)):
    if (count := sum(1 for _ in data.documents(split))) != facts.documents:
      raise _Failed(
        f"{data.path}: {count} {split} documents, the manifest has {facts.documents}; prepare the folder again"
      )
  counted = int(_stream(data.sidecar()).sum(dtype=np.int64))
  if counted != manifest.val.counted_bytes:
    raise _Failed(f"{data.path}: the sidecar adds up to {counted} bytes, the manifest has {manifest.val.counted_bytes}")
  return f"hashes of {len(manifest.files())} files and all counts as it says"


def _stream(paths: list[Path]) -> np.ndarray:
  return np.concatenate([read_shard(path) for path in paths])


_CHECKS: dict[str, Callable[[_Folder], str]] = {
  "shards": _headers,
  "token range": _range,
  "documents": _structure,
  "sidecar": _sidecar,
  "text": _text,
  "overlap": _overlap,
  "manifest": _manifest,
}
