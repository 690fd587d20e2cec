"""The configs that come with the package, by name; what their first comments say of them; settings made from them."""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from pathlib import Path

from pgolf_jax.errors import UserError
from pgolf_jax.settings import Settings, check
from pgolf_jax.settings.load import changed, from_dict, from_toml

_PACKAGE = Path(__file__).parents[1]
_PLACES = (_PACKAGE / "configs", _PACKAGE.parent / "configs")  # as installed, and in the source tree

_FIELD = re.compile(r"# (Command|Hardware|Time|Score):\s*(.*)")
_MORE = re.compile(r"# {5,}(\S.*)")


def folder() -> Path:
  """Returns the folder of the built-in configs."""
  return next(place for place in _PLACES if (place / "demo.toml").is_file())


def names() -> list[str]:
  """Returns the names of the built-in configs."""
  return sorted(path.stem for path in folder().glob("*.toml"))


def find(config: str | Path) -> Path:
  """Returns the file that a config's name or path stands for; the path is not looked at.

  Raises:
    UserError: a bare name that is neither a built-in config's nor a file's, with the nearest name.
  """
  path, name = Path(config), str(config)
  if path.suffix or len(path.parts) != 1 or path.is_file():
    return path
  if name in names():
    return folder() / f"{name}.toml"
  near = difflib.get_close_matches(name, names(), n=1)
  hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names())}, and a path to a TOML file works too."
  raise UserError(f"There is no built-in config {name}; {hint}")


@dataclasses.dataclass(frozen=True)
class Description:
  """What a config's first comment says of it."""

  name: str
  title: str
  command: str = ""
  hardware: str = ""
  time: str = ""
  score: str = ""


def describe(path: Path) -> Description:
  """Returns the description at the head of a config file: its first line, and what follows each label."""
  title, fields, last = "", {}, None
  for line in path.read_text(encoding="utf-8").splitlines():
    if not line.startswith("#"):
      break
    if match := _FIELD.fullmatch(line):
      last = match[1].lower()
      fields[last] = match[2].strip()
    elif last and (match := _MORE.fullmatch(line)):
      fields[last] += f" {match[1].strip()}"
    elif line.strip("# ") and not title:
      title = line.strip("# ")
    else:
      last = None
  return Description(path.stem, title, **fields)


def settings(config: str | Path | Mapping[str, object] | Settings = "demo", **overrides: object) -> Settings:
  """Returns checked settings: those of a config with others over them. The environment is not read.

  Example: settings("demo", train__iterations=500, seed=42), or settings("demo", **{"train.iterations": 500})

  Args:
    config: name of a built-in config, path of a TOML file, nested dict as such a file has it, or settings.
    **overrides: settings by dotted name, with `__` for the dot where Python needs a name; schedules may be text.

  Raises:
    UserError: an unknown name, a value of the wrong type, or a combination that cannot work.
  """
  if isinstance(config, Settings):
    base = config
  elif isinstance(config, Mapping):
    base = from_dict(config, where="the config")
  else:
    base = from_toml(find(config))
  chosen = changed(base, {name.replace("__", "."): value for name, value in overrides.items()})
  check.check(chosen)
  return chosen
