"""The journal of a preparation under way: what is finished, and where in the text to go on."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgolf_jax.data.documents import Position
from pgolf_jax.data.manifest import TOKENIZER, Split, write_json
from pgolf_jax.errors import UserError

JOURNAL = "journal.json"


@dataclasses.dataclass(frozen=True)
class SplitState:
  """How far a split is.

  Attributes:
    done: its finished shards, and the totals of the documents before `start`.
    start: the batch in which the next shard begins.
    skip: tokens of that batch that are in finished shards already.
    finished: whether nothing is left to do; `done` then has the totals of all documents.
  """

  done: Split = dataclasses.field(default_factory=Split)
  start: Position = dataclasses.field(default_factory=Position)
  skip: int = 0
  finished: bool = False

  @classmethod
  def from_json(cls, fields: dict[str, Any]) -> "SplitState":
    return cls(Split.from_json(fields["done"]), Position(**fields["start"]), fields["skip"], fields["finished"])


class Journal:
  """What is known about a preparation under way; `save` puts it on disk, atomically."""

  def __init__(self, folder: Path, settings: Mapping[str, Any], modified: int):
    self._path = Path(folder) / JOURNAL
    self._settings, self._modified = settings, modified
    self.tokenizer_text_bytes: int | None = None
    self.splits = {"val": SplitState(), "train": SplitState()}

  @classmethod
  def open(cls, folder: Path, settings: Mapping[str, Any], modified: int) -> "Journal":
    """The journal in `folder`, or a new one if there is none.

    Args:
      folder: the data folder.
      settings: what decides the files.
      modified: when the input was last changed.

    Raises:
      UserError: the folder holds another preparation, or shards that no journal or manifest accounts for.
    """
    journal = cls(folder, settings, modified)
    if not journal._path.exists():
      strangers = [
        path.name for path in (*Path(folder).glob("fineweb_*.bin"), Path(folder) / TOKENIZER) if path.exists()
      ]
      if strangers:
        raise UserError(
          f"{folder}: already holds {strangers[0]}, not from here; choose another folder or delete this one"
        )
      journal.save()
      return journal
    try:
      fields = json.loads(journal._path.read_text())
      there = fields["settings"], fields["modified"]
      journal.tokenizer_text_bytes = fields["tokenizer_text_bytes"]
      journal.splits = {name: SplitState.from_json(state) for name, state in fields["splits"].items()}
    except (ValueError, TypeError, KeyError) as error:
      raise UserError(f"{journal._path}: damaged ({error}); delete {folder} and prepare it again") from error
    if there != (settings, modified):
      raise UserError(
        f"{folder}: holds an unfinished preparation of other text or settings; choose another folder or delete this one"
      )
    return journal

  def save(self) -> None:
    write_json(
      self._path,
      {
        "settings": self._settings,
        "modified": self._modified,
        "tokenizer_text_bytes": self.tokenizer_text_bytes,
        "splits": {name: dataclasses.asdict(state) for name, state in self.splits.items()},
      },
    )
