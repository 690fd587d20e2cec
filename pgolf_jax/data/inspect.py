"""What is in a data folder."""

import dataclasses
from pathlib import Path

import numpy as np

from pgolf_jax.data import caseops
from pgolf_jax.data.manifest import TOKENIZER, Manifest
from pgolf_jax.data.shards import SPLITS, iter_documents, list_shards, read_count, read_shard
from pgolf_jax.data.tokenizer import Tokenizer
from pgolf_jax.errors import UserError


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
  """What a folder holds; None for what it has not."""

  splits: list[SplitContents]
  sidecar_bytes: int | None  # sum of the sidecar
  tokenizer: Tokenizer | None
  manifest: Manifest | None
  opening: str | None  # first characters of the first validation document


def inspect(folder: Path) -> Contents:
  """Reads all that is in `folder`.

  Raises:
    UserError: there are no shards in it, or a file is damaged.
  """
  folder = Path(folder)
  present = [split for split in SPLITS if folder.is_dir() and any(folder.glob(f"fineweb_{split}_[0-9]*.bin"))]
  if not present:
    raise UserError(f"{folder}: no shards in it; `pgolf data prepare` or `pgolf data download` makes them")
  splits = [_split(folder, split) for split in present if split != "val_bytes"]
  sidecar = None
  if "val_bytes" in present:
    sidecar = sum(int(read_shard(path).sum(dtype=np.int64)) for path in list_shards(folder, "val_bytes"))
  path = folder / TOKENIZER
  tokenizer = Tokenizer.load(path) if path.exists() else None
  manifest = Manifest.read(folder)
  opening = _opening(folder, tokenizer) if tokenizer and "val" in present else None
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


def _opening(folder: Path, tokenizer: Tokenizer, characters: int = 200) -> str | None:
  first = next(iter_documents(list_shards(folder, "val")), None)
  if first is None:
    return None
  coded = tokenizer.decode(first.tokens_N[1:characters])
  text = caseops.decode(coded, strict=False) if tokenizer.has_caseops else coded
  return text[:characters]
