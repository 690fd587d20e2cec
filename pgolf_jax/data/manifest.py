"""The manifest: what a data folder holds, how it was made, and the hash of every file."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pgolf_jax.errors import UserError

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
FORMAT = "pgolf-data-1"
# The published name of CaseOps, and that of text left as it is.
TRANSFORMS = {True: "lossless_caps_caseops_v1", False: "identity"}


@dataclasses.dataclass(frozen=True)
class File:
  """One file of the folder."""

  name: str
  tokens: int
  sha256: str


@dataclasses.dataclass(frozen=True)
class Split:
  """Training or validation: its documents and where their tokens are."""

  documents: int = 0
  text_bytes: int = 0  # of UTF-8
  counted_bytes: int = 0  # sum of the sidecar; less than text_bytes by what a normalising tokenizer loses
  duplicates: int = 0  # training documents left out because they are held out for validation
  shards: tuple[File, ...] = ()
  sidecar: tuple[File, ...] = ()

  @property
  def tokens(self) -> int:
    return sum(file.tokens for file in self.shards)

  @classmethod
  def from_json(cls, fields: dict[str, Any]) -> "Split":
    files = {name: tuple(File(**file) for file in fields[name]) for name in ("shards", "sidecar")}
    return cls(**{**fields, **files})


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a data folder holds."""

  text_transform: str
  tokenizer_sha256: str
  tokenizer_kind: str
  vocab_size: int
  tokenizer_text_bytes: int | None  # of text that the tokenizer was trained on here; None if it was given
  validation: str  # which documents, in words
  validation_sha256: str  # of the digests of the validation documents, in order
  train: Split
  val: Split
  settings: dict[str, Any]  # what the folder was prepared from and how; the same settings give the same folder

  def write(self, folder: Path) -> None:
    write_json(Path(folder) / MANIFEST, {"format": FORMAT, **dataclasses.asdict(self)})

  @classmethod
  def read(cls, folder: Path) -> "Manifest | None":
    """The manifest of `folder`; None if it has none, or one that another program wrote.

    Raises:
      UserError: it is damaged.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
      return None
    try:
      fields = json.loads(path.read_text())
      if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
        return None
      for name in ("train", "val"):
        fields[name] = Split.from_json(fields[name])
      return cls(**fields)
    except (ValueError, TypeError, KeyError) as error:
      raise UserError(f"{path}: damaged ({error}); prepare the folder again") from error

  @property
  def is_caseops(self) -> bool:
    return self.text_transform == TRANSFORMS[True]

  def files(self) -> list[File]:
    return [*self.train.shards, *self.val.shards, *self.val.sidecar]


def write_json(path: Path, value: Any) -> None:
  """Writes `value` so that the file is, at any moment, either the old or the new one."""
  partial = path.with_name(f"{path.name}.partial")
  with partial.open("w") as file:
    json.dump(value, file, indent=1)
    file.write("\n")
    file.flush()
    os.fsync(file.fileno())
  partial.replace(path)


def sha256_of(path: Path) -> str:
  """SHA-256 of a file, in hexadecimal."""
  with Path(path).open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
