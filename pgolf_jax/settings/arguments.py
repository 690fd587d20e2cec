"""Settings on a command line: CONFIG first, then any setting, over the environment, over the file."""

import dataclasses
import difflib
import os
import typing
from pathlib import Path
from typing import Annotated

import tyro

from pgolf_jax.errors import UserError
from pgolf_jax.settings.config import Settings
from pgolf_jax.settings.load import STAGE_KINDS, env_names, from_env, load, parse_stages, stages_as_text

_registry = tyro.constructors.ConstructorRegistry()


@_registry.primitive_rule
def _schedule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
  """Reads a schedule from the one word that files and environments write it as, such as 1024@0.1,3072@1."""
  if typing.get_origin(info.type) is not tuple or typing.get_args(info.type)[0] not in STAGE_KINDS:
    return None
  kind = typing.get_args(info.type)[0]
  return tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar=STAGE_KINDS[kind],
    instance_from_str=lambda words: parse_stages("The schedule", words[0], kind),
    is_instance=lambda value: isinstance(value, tuple),
    str_from_instance=lambda value: [stages_as_text(value)],
  )


@dataclasses.dataclass(frozen=True)
class ConfigArgs:
  """What every verb that takes a CONFIG understands."""

  config: tyro.conf.Positional[Path]
  """TOML file of settings."""
  out: Path | None = None
  """Run folder; runs/NAME-OF-CONFIG if not given."""
  settings: Annotated[Settings, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Settings)


def parse(verb: str, description: str, args: list[str]) -> tuple[Settings, Path]:
  """(settings, run folder) of a command line.

  Raises:
    UserError: no or a wrong config, an unknown or impossible setting.
  """
  found = parse_as(ConfigArgs, verb, description, args)
  return found.settings, found.out or Path("runs") / found.config.stem


def parse_as(kind, verb: str, description: str, args: list[str], *, needs_config: bool = True):
  """An instance of `kind`, a dataclass with the fields `config` and `settings`; errors as `parse`.

  Args:
    needs_config: whether it is an error to give no config; if not, the settings are the defaults and the environment's.
  """
  if not args or args[0].startswith("-"):
    if needs_config and not {"-h", "--help"} & set(args):
      raise UserError(f"pgolf {verb} needs a config first, as in: pgolf {verb} configs/demo.toml")
    check_environment(os.environ)
    default = from_env(os.environ)
    config = Path("CONFIG") if needs_config else None
  else:
    config = Path(args[0])
    check_environment(os.environ)
    default = load(config)
  defaults = kind(config=config, settings=default)
  return tyro.cli(kind, default=defaults, args=args, prog=f"pgolf {verb}", description=description, registry=_registry)


def check_environment(environ) -> None:
  """Raises UserError if an environment variable looks like a misspelt setting, for it would be ignored silently."""
  known = env_names()
  for name in environ:
    if name not in known and len(name) >= 8:
      near = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
      if near and name.split("_")[0] == near[0].split("_")[0]:
        raise UserError(f"The environment sets {name}, which is no setting; did you mean {near[0]}?")
