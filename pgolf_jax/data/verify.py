"""What a data folder holds, and checks that it is what it should be, each with its finding."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from pgolf_jax.data import caseops, overlap, sidecar
from pgolf_jax.data.caseops import Markers
from pgolf_jax.data.corpus import digest
from pgolf_jax.data.encode import token_bytes
from pgolf_jax.data.manifest import TOKENIZER, Manifest, sha256_of
from pgolf_jax.data.shards import (
  BOS,
  SPLITS,
  TokenizedDocument,
  iter_documents,
  list_shards,
  read_count,
  read_shard,
  shard_path,
)
from pgolf_jax.data.tokenizer import Tokenizer
from pgolf_jax.errors import Check, UserError
from pgolf_jax.runtime.log import progress


@dataclasses.dataclass(frozen=True)
class SplitContents:
  """One split of a folder, from its shards."""

  name: str
  shards: int
  tokens: int
  documents: int
  median_tokens: int  # of a document, bos included
  longest_tokens: int


@dataclasses.dataclass(frozen=True)
class Contents:
  """What a folder holds; None for what it lacks."""

  splits: list[SplitContents]
  sidecar_bytes: int | None  # sum of the sidecar
  tokenizer: Tokenizer | None
  manifest: Manifest | None
  opening: str | None  # first characters of the first validation document


def inspect(folder: Path) -> Contents:
  """Reads everything in `folder`.

  Raises:
    UserError: there are no shards in it, or a file is damaged.
  """
  folder = Path(folder)
  present = [split for split in SPLITS if folder.is_dir() and any(folder.glob(f"fineweb_{split}_[0-9]*.bin"))]
  if not folder.is_dir():
    raise UserError(f"{folder} is not a folder; name the folder of shards.")
  if not present:
    raise UserError(f"{folder}: no shards in it; `pgolf data prepare` or `pgolf data download` makes them")
  splits = [_split(folder, split) for split in present if split != "val_bytes"]
  sidecar = None
  if "val_bytes" in present:
    sidecar = sum(int(read_shard(path).sum(dtype=np.int64)) for path in list_shards(folder, "val_bytes"))
  path = folder / TOKENIZER
  tokenizer = Tokenizer.load(path) if path.exists() else None
  manifest = Manifest.read(folder)
  opening = _opening(folder, tokenizer, _markers(manifest, tokenizer)) if tokenizer and "val" in present else None
  return Contents(splits, sidecar, tokenizer, manifest, opening)


def _split(folder: Path, split: str) -> SplitContents:
  paths = list_shards(folder, split)
  lengths = [len(document.tokens_N) for document in iter_documents(paths)]
  return SplitContents(
    split,
    len(paths),
    sum(map(read_count, paths)),
    len(lengths),
    int(np.median(lengths)) if lengths else 0,
    max(lengths, default=0),
  )


def _markers(manifest: Manifest | None, tokenizer: Tokenizer) -> Markers:
  """Returns where CaseOps put its markers in a folder's text; without a manifest, what its tokenizer is made for."""
  return manifest.markers if manifest else "published" if tokenizer.has_caseops else "none"


def _opening(folder: Path, tokenizer: Tokenizer, markers: Markers, characters: int = 200) -> str | None:
  first = next(iter_documents(list_shards(folder, "val")), None)
  if first is None:
    return None
  return caseops.decode(tokenizer.decode(first.tokens_N[1:characters]), markers, strict=False)[:characters]


class _FailedError(Exception):
  pass


class _NotApplicableError(Exception):
  pass


def verify(folder: Path, tokenizer: Path | None = None, *, names: Sequence[str] = ()) -> Iterator[Check]:
  """Yields the result of each check of a data folder; one that fails does not stop the others.

  Args:
    folder: shards, and perhaps sidecar, tokenizer and manifest.
    tokenizer: a .model file, if not the folder's own.
    names: checks to make; all if none is named.
  """
  data = _Folder(Path(folder), tokenizer)
  checks = {name: _CHECKS[name] for name in names} or _CHECKS
  with progress("verifying", total=len(checks), unit="checks") as bar:
    for name, check in checks.items():
      bar.note(name)
      bar.advance(0)
      try:
        yield Check(name, True, check(data))
      except _NotApplicableError as reason:
        yield Check(name, None, f"not checked: {reason}")
      except (_FailedError, UserError) as fault:
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
      raise _NotApplicableError(f"no {TOKENIZER} in the folder; name one with --tokenizer")
    return Tokenizer.load(path)

  @cached_property
  def markers(self) -> Markers:
    return _markers(self.manifest, self.tokenizer)

  @cached_property
  def pieces(self) -> sidecar.PieceBytes:
    return sidecar.PieceBytes(self.tokenizer, is_caseops=self.markers != "none")

  def shards(self, split: str) -> list[Path]:
    return list_shards(self.path, split)

  def sidecar(self) -> list[Path]:
    """Returns the files of the sidecar, which data without a manifest and without CaseOps may lack."""
    if not any(self.path.glob("fineweb_val_bytes_*.bin")) and not self.manifest and not self.tokenizer.has_caseops:
      raise _NotApplicableError("no sidecar; of text without CaseOps a run makes it from the tokenizer")
    return self.shards("val_bytes")

  def documents(self, split: str) -> Iterator[TokenizedDocument]:
    return iter_documents(self.shards(split))


def _check_headers(data: _Folder) -> str:
  counted = []
  for split in ("train", "val"):
    paths = data.shards(split)
    counts = [read_count(path) for path in paths]
    for index, path in enumerate(paths):
      if path != (expected := shard_path(data.path, split, index)):
        raise _FailedError(f"{expected} is missing: {path.name} comes next; fetch or prepare it")
    counted.append(f"{split}: {len(paths)} shards, {sum(counts):,} tokens")
  return "; ".join(counted)


def _check_range(data: _Folder) -> str:
  size, highest = data.tokenizer.vocab_size, 0
  for path in [*data.shards("train"), *data.shards("val")]:
    tokens_N = read_shard(path)
    highest = max(highest, int(tokens_N.max(initial=0)))
    if highest >= size:
      at = int(np.argmax(tokens_N >= size))
      raise _FailedError(
        f"{path}: token {tokens_N[at]} at {at} lies outside the tokenizer's {size} pieces; "
        "the shards were made with another tokenizer, name it with --tokenizer"
      )
  return f"all below {size}; highest {highest}"


def _check_documents(data: _Folder) -> str:
  counted = []
  for split in ("train", "val"):
    count, longest = 0, 0
    for document in data.documents(split):
      if document.tokens_N[0] != BOS:
        raise _FailedError(
          f"{document.place}: the first document does not start with bos ({BOS}) but {document.tokens_N[0]}"
        )
      if len(document.tokens_N) == 1:
        raise _FailedError(f"{document.place}: an empty document, bos alone")
      count += 1
      longest = max(longest, len(document.tokens_N))
    counted.append(f"{split}: {count:,} documents, the longest of {longest:,} tokens")
  lengths = []
  for path in data.shards("train"):
    starts = np.flatnonzero(read_shard(path) == BOS)
    if not starts.size:
      raise _FailedError(
        f"{path}: no document starts in it, so a training run could not start there; use larger shards"
      )
    lengths.append(read_count(path) - int(starts[0]))
  least = min(lengths[:-1] or lengths)
  counted.append(f"training can read micro-batches of up to {least:,} tokens")
  if lengths[-1] < least:
    counted.append(f"it leaves the last shard out where they are larger than {lengths[-1]:,}")
  return "; ".join(counted)


def _check_sidecar(data: _Folder) -> str:
  """Each token's bytes are at most those of its text, and those of the official split are the official ones."""
  paths, sidecar_paths = data.shards("val"), data.sidecar()
  if len(paths) != len(sidecar_paths):
    raise _FailedError(
      f"{data.path}: {len(sidecar_paths)} sidecar files for {len(paths)} validation shards; prepare both again"
    )
  for path, sidecar_path in zip(paths, sidecar_paths, strict=True):
    if (count := read_count(path)) != (entries := read_count(sidecar_path)):
      raise _FailedError(f"{sidecar_path}: {entries} entries for {count} tokens of {path.name}; prepare both again")
  total = _check_bytes(data, sidecar_paths)
  return f"{total.counted:,} bytes of text; {total.finding}"


def _check_bytes(data: _Folder, sidecar_paths: list[Path]) -> sidecar.Total:
  """Compares the sidecar with the bytes that the pieces spell, and its sum with that of the text."""
  sidecar_N, at = _concatenated(sidecar_paths), 0
  total = sidecar.Total()
  for document in data.documents("val"):
    bytes_N = sidecar_N[at : at + len(document.tokens_N)].astype(np.int64)
    spelt_N = data.pieces.spelt(document.tokens_N)
    wrong_N = data.pieces.without_text(document.tokens_N) & (bytes_N != 0)
    if wrong_N.any():
      i = int(np.argmax(wrong_N))
      raise _FailedError(
        f"{data.path}: the sidecar has {bytes_N[i]} bytes at {at + i} for token {document.tokens_N[i]}, which stands "
        "for none; prepare it again"
      )
    more_N = bytes_N > spelt_N
    if data.tokenizer.kind == "lossless" and more_N.any():
      i = int(np.argmax(more_N))
      raise _FailedError(
        f"{document.place}: token {i} of this document spells {spelt_N[i]} bytes, the sidecar has {bytes_N[i]}; "
        "prepare both again"
      )
    total.add(bytes_N, spelt_N, data.pieces.has_space(document.tokens_N))
    at += len(document.tokens_N)
  if fault := total.fault(data.tokenizer.sha256):
    raise _FailedError(f"{data.path}: {fault}; prepare the sidecar again")
  if data.manifest and total.counted > data.manifest.val.text_bytes:
    raise _FailedError(
      f"{data.path}: the sidecar adds up to {total.counted:,} bytes, the documents have "
      f"{data.manifest.val.text_bytes:,}; prepare the folder again"
    )
  return total


def _check_text(data: _Folder) -> str:
  """Compares tokens, sidecar and hash with those made from the text, which a lossless tokenizer gives back."""
  tokenizer = data.tokenizer
  if tokenizer.kind != "lossless":
    raise _NotApplicableError("the tokenizer is normalising, so tokens do not give the text back")
  sidecar_N = _concatenated(data.sidecar())
  digests, at = hashlib.sha256(), 0
  for document in data.documents("val"):
    tokens_N = document.tokens_N[1:]
    try:
      coded = tokenizer.decode(tokens_N)
      text = caseops.decode(coded, data.markers)
    except UserError as error:
      raise _FailedError(f"{document.place}: {error}") from error
    if not np.array_equal(tokenizer.encode(caseops.encode(text, data.markers)), tokens_N):
      raise _FailedError(
        f"{document.place}: not the tokens that this tokenizer makes of this document; prepare it again"
      )
    at += 1
    bytes_N = token_bytes(tokenizer, coded, tokens_N, is_caseops=data.markers != "none")
    wrong_N = bytes_N != sidecar_N[at : at + len(tokens_N)]
    if wrong_N.any():
      i = int(np.argmax(wrong_N))
      raise _FailedError(
        f"{document.place}: token {i + 1} of this document stands for {bytes_N[i]} bytes, the sidecar has "
        f"{sidecar_N[at + i]}; prepare both again"
      )
    at += len(tokens_N)
    digests.update(digest(text.encode()))
  if data.manifest and digests.hexdigest() != data.manifest.validation_sha256:
    raise _FailedError(
      f"{data.path}: the validation documents are not those that the manifest names; prepare them again"
    )
  return f"{at:,} validation tokens decode to text that gives the same tokens and bytes"


def _check_overlap(data: _Folder) -> str:
  """No validation document is in the training shards, by its tokens or by most of its n-grams of words."""
  held_out = {digest(document.tokens_N.tobytes()): document for document in data.documents("val")}
  shared = [
    (document, held_out[key])
    for document in data.documents("train")
    if (key := digest(document.tokens_N.tobytes())) in held_out
  ]
  if shared:
    train, val = shared[0]
    raise _FailedError(
      f"{len(shared)} validation documents are in the training shards, first that of {val.place} at {train.place}; "
      "prepare the folder again"
    )
  none_is = f"none of {len(held_out):,} different validation documents is in the training shards"
  try:
    decode = data.tokenizer.decode
  except _NotApplicableError as reason:
    raise _NotApplicableError(f"{none_is} token by token; text in other tokens is not looked for: {reason}") from None
  n, limit = overlap.N, overlap.LIMIT
  share_D = overlap.shares(*((decode(d.tokens_N) for d in data.documents(split)) for split in ("val", "train")))
  most = np.nanmax(share_D, initial=0)
  if most >= limit:
    place = next(d.place for d, share in zip(data.documents("val"), share_D, strict=True) if share >= limit)
    raise _FailedError(
      f"text of {np.sum(share_D >= limit)} validation documents is in the training shards, {most:.0%} of the {n}-grams "
      f"of one; the first is that of {place}; prepare the folder again"
    )
  short = int(np.isnan(share_D).sum())
  unsearched = f"; {short:,} are too short for that" if short else ""
  return f"{none_is}; of no document's {n}-grams of words more than {most:.0%} are, {limit:.0%} allowed{unsearched}"


def _check_manifest(data: _Folder) -> str:
  manifest = data.manifest
  if manifest is None:
    raise _NotApplicableError(f"no manifest of this program in {data.path}")
  if data.tokenizer.sha256 != manifest.tokenizer_sha256:
    raise _FailedError(f"{data.path / TOKENIZER}: not the tokenizer that the manifest names; prepare the folder again")
  listed = {"train": manifest.train.shards, "val": manifest.val.shards, "val_bytes": manifest.val.sidecar}
  for split, files in listed.items():
    if (names := [path.name for path in data.shards(split)]) != [file.name for file in files]:
      raise _FailedError(
        f"{data.path}: {len(names)} {split} files, the manifest lists {len(files)}; prepare the folder again"
      )
    for file in files:
      if (sha256 := sha256_of(data.path / file.name)) != file.sha256:
        raise _FailedError(
          f"{data.path / file.name}: SHA-256 {sha256[:12]}…, the manifest has {file.sha256[:12]}…; fetch it again"
        )
  for split, contents in (("train", manifest.train), ("val", manifest.val)):
    if (count := sum(1 for _ in data.documents(split))) != contents.documents:
      raise _FailedError(
        f"{data.path}: {count} {split} documents, the manifest has {contents.documents}; prepare the folder again"
      )
  counted = int(_concatenated(data.sidecar()).sum(dtype=np.int64))
  if counted != manifest.val.counted_bytes:
    raise _FailedError(
      f"{data.path}: the sidecar adds up to {counted} bytes, the manifest has {manifest.val.counted_bytes}; "
      "prepare the folder again"
    )
  return f"the hashes of {len(manifest.files())} files and all counts agree with it"


def _concatenated(paths: list[Path]) -> np.ndarray:
  return np.concatenate([read_shard(path) for path in paths])


_CHECKS: dict[str, Callable[[_Folder], str]] = {
  "shards": _check_headers,
  "token range": _check_range,
  "documents": _check_documents,
  "sidecar": _check_sidecar,
  "text": _check_text,
  "overlap": _check_overlap,
  "manifest": _check_manifest,
}
