"""Records in a data folder: the manifest of what it holds, and the journal of a preparation that is not finished."""

import dataclasses
import hashlib
import json
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any

from pgolf_jax.data.caseops import Markers
from pgolf_jax.data.corpus import Position
from pgolf_jax.errors import UserError
from pgolf_jax.runtime.files import read_json, replacing
from pgolf_jax.settings import Settings

MANIFEST = "manifest.json"
JOURNAL = "journal.json"
TOKENIZER = "tokenizer.model"
FORMAT = "pgolf-data-1"
# Where CaseOps puts its markers → what the manifest calls that; the second name is the published one.
TRANSFORMS: dict[Markers, str] = {
  "none": "identity",
  "published": "lossless_caps_caseops_v1",
  "before-space": "lossless_caps_caseops_before_space_v1",
}


_FILE_NAME = re.compile(r"fineweb_(train|val|val_bytes)_[0-9]+\.bin")


def _made(kind: type, fields: object) -> Any:
  """Returns a dataclass of these fields; raises ValueError or TypeError if a value is not of the field's type."""
  if not isinstance(fields, dict):
    raise ValueError(f"{fields!r} where an object is needed")
  for name, wanted in typing.get_type_hints(kind).items():
    if name not in fields:
      continue
    value = fields[name]
    plain = wanted if isinstance(wanted, UnionType) else typing.get_origin(wanted) or wanted
    is_right = isinstance(value, plain)
    if not is_right or (isinstance(value, bool) and wanted is not bool) or (isinstance(value, int) and value < 0):
      raise ValueError(f"{name} is {value!r}")
  return kind(**fields)


@dataclasses.dataclass(frozen=True)
class File:
  """One file of the folder."""

  name: str
  tokens: int
  sha256: str


@dataclasses.dataclass(frozen=True)
class Split:
  """Training or validation: counts of its documents, and the files with their tokens."""

  documents: int = 0
  text_bytes: int = 0  # of UTF-8
  counted_bytes: int = 0  # sum of the sidecar; less than text_bytes by what a normalising tokenizer loses
  duplicates: int = 0  # training documents left out because they are held out for validation
  shards: tuple[File, ...] = ()
  sidecar: tuple[File, ...] = ()

  @property
  def tokens(self) -> int:
    """Tokens of all shards."""
    return sum(file.tokens for file in self.shards)

  @classmethod
  def from_json(cls, fields: dict[str, Any]) -> "Split":
    """Makes a split from what `json` reads of it. Raises ValueError, TypeError or KeyError if it is none."""
    files = {name: tuple(_made(File, file) for file in fields[name]) for name in ("shards", "sidecar")}
    names = [file.name for group in files.values() for file in group]
    if not all(_FILE_NAME.fullmatch(name) for name in names):
      raise ValueError("a file name that is not a shard's")
    return _made(cls, {**fields, **files})


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a data folder holds, and how it was made."""

  text_transform: str
  tokenizer_sha256: str
  tokenizer_kind: str
  vocab_size: int
  tokenizer_text_bytes: int | None  # of the text that the tokenizer was trained on; None if it was given
  validation: str  # which documents, in words
  validation_sha256: str  # of the digests of the validation documents, in order
  train: Split
  val: Split
  settings: dict[str, Any]  # what decided the files; the same settings give the same folder

  def write(self, folder: Path) -> None:
    """Writes the manifest of `folder`."""
    _write_json(Path(folder) / MANIFEST, {"format": FORMAT, **dataclasses.asdict(self)})

  @classmethod
  def read(cls, folder: Path) -> "Manifest | None":
    """Returns the manifest of `folder`; None if it has none, or one that another program wrote.

    Raises:
      UserError: the manifest is damaged.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
      return None
    fields = read_json(path)
    if fields.pop("format", None) != FORMAT:
      return None
    try:
      for name in ("train", "val"):
        fields[name] = Split.from_json(fields[name])
      return _made(cls, fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      raise UserError(f"{path}: damaged ({error}); prepare the folder again") from error

  @property
  def markers(self) -> Markers:
    """Where CaseOps put its markers."""
    return next((markers for markers, name in TRANSFORMS.items() if name == self.text_transform), "none")

  def files(self) -> list[File]:
    """Returns all files that the manifest lists."""
    return [*self.train.shards, *self.val.shards, *self.val.sidecar]


@dataclasses.dataclass(frozen=True)
class SplitProgress:
  """How much of a split is written.

  Attributes:
    done: its finished shards, and the counts of the documents before `start`.
    start: the batch in which the next shard begins.
    skip: tokens of that batch that are in finished shards already.
    finished: whether all is written; `done` then has the counts of all documents.
  """

  done: Split = dataclasses.field(default_factory=Split)
  start: Position = dataclasses.field(default_factory=Position)
  skip: int = 0
  finished: bool = False

  @classmethod
  def from_json(cls, fields: dict[str, Any]) -> "SplitProgress":
    """Makes a progress from what `json` reads of it; raises as `Split.from_json`."""
    parts = {"done": Split.from_json(fields["done"]), "start": _made(Position, fields["start"])}
    return _made(cls, {**fields, **parts})


class Journal:
  """The state of a preparation, from which it continues after a kill.

  Args:
    folder: the data folder.
    settings: what decides the files.
    modified: when the corpora were last changed, in nanoseconds.
  """

  def __init__(self, folder: Path, settings: Mapping[str, Any], modified: int):
    self._path = Path(folder) / JOURNAL
    self._settings, self._modified = settings, modified
    self.tokenizer_text_bytes: int | None = None
    self.splits = {"val": SplitProgress(), "train": SplitProgress()}

  @classmethod
  def open(cls, folder: Path, settings: Mapping[str, Any], modified: int) -> "Journal":
    """Returns the journal of `folder`, a new one if there is none.

    Raises:
      UserError: the folder holds another preparation, or shards that neither journal nor manifest accounts for.
    """
    journal = cls(folder, settings, modified)
    if not journal._path.exists():
      strangers = [path for path in (*Path(folder).glob("fineweb_*.bin"), Path(folder) / TOKENIZER) if path.exists()]
      if strangers:
        raise UserError(
          f"{folder}: already holds {strangers[0].name}, which this preparation did not make; "
          "choose another folder or delete this one"
        )
      journal.save()
      return journal
    fields = read_json(journal._path)
    try:
      recorded = fields["settings"], fields["modified"]
      journal.tokenizer_text_bytes = fields["tokenizer_text_bytes"]
      journal.splits = {name: SplitProgress.from_json(fields["splits"][name]) for name in journal.splits}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      raise UserError(f"{journal._path}: damaged ({error}); delete {folder} and prepare it again") from error
    if recorded != (settings, modified):
      if any(Path(folder).glob("fineweb_*.bin")):
        raise UserError(
          f"{folder}: holds an unfinished preparation of other text or settings; choose another folder or delete it"
        )
      journal.discard()
      return cls.open(folder, settings, modified)
    return journal

  def discard(self) -> None:
    """Removes what a preparation left that has not come to its first shard: there is nothing to go on from."""
    if not any(self._path.parent.glob("fineweb_*.bin")):
      self._path.with_name(TOKENIZER).unlink(missing_ok=True)
      self._path.unlink(missing_ok=True)

  def save(self) -> None:
    """Writes the journal into the folder."""
    _write_json(
      self._path,
      {
        "settings": self._settings,
        "modified": self._modified,
        "tokenizer_text_bytes": self.tokenizer_text_bytes,
        "splits": {name: dataclasses.asdict(progress) for name, progress in self.splits.items()},
      },
    )

  def delete(self) -> None:
    """Removes the journal of a finished preparation."""
    self._path.unlink()


def tokenizer_file(settings: Settings, folder: Path) -> Path:
  """Returns the path of a run's tokenizer, whether it is there or not."""
  return Path(settings.data.tokenizer or folder / TOKENIZER)


def sha256_of(path: Path) -> str:
  """Returns the SHA-256 of a file, in hexadecimal."""
  with Path(path).open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: object) -> None:
  with replacing(path, is_durable=True) as partial:
    partial.write_text(json.dumps(value, indent=1) + "\n")
