"""Where an artifact comes from: the versions that made it, its tokenizer and its data, as its header says."""

import dataclasses
import re

from pgolf_jax.errors import ArtifactError

_HASH = re.compile(r"[0-9a-f]{64}|")
_MOST_PIECES = 1 << 16
_LONGEST = 200  # characters


@dataclasses.dataclass(frozen=True)
class Origin:
  """What made an artifact. What is not known, as of artifacts of format version 1, is empty or 0; hashes are SHA-256.

  Attributes:
    pgolf_jax, jax: versions.
    pieces: of the tokenizer.
    tokenizer: hash of the tokenizer's model.
    data: which text, in words.
    manifest: hash of the data folder's manifest.
    validation: hash of the tokens of its validation split.
  """

  pgolf_jax: str = ""
  jax: str = ""
  pieces: int = 0
  tokenizer: str = ""
  data: str = ""
  manifest: str = ""
  validation: str = ""

  def to_json(self) -> dict:
    """Returns what is known, by name."""
    return {name: value for name, value in dataclasses.asdict(self).items() if value}

  @classmethod
  def from_json(cls, fields: object) -> "Origin":
    """Inverse of `to_json`.

    Raises:
      ArtifactError: the fields are not such as `to_json` returns.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(fields, dict) or not fields.keys() <= known:
      raise ArtifactError("What the artifact says of its origin has unknown parts: it is damaged.")
    for name, value in fields.items():
      if name == "pieces":
        is_right = type(value) is int and 0 < value <= _MOST_PIECES
      elif name in ("tokenizer", "manifest", "validation"):
        is_right = isinstance(value, str) and bool(_HASH.fullmatch(value))
      else:
        is_right = isinstance(value, str) and len(value) <= _LONGEST and value.isprintable()
      if not is_right:
        raise ArtifactError(f"What the artifact says of its origin has an impossible {name}: it is damaged.")
    return cls(**fields)


UNKNOWN = Origin()
"""Of an artifact that says nothing of it."""
