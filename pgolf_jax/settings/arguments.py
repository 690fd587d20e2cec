"""Settings on a command line: CONFIG first, then any setting, over the environment, over the file."""

import difflib
import functools
import os
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import tyro

from pgolf_jax.errors import UserError
from pgolf_jax.settings import Settings, builtin
from pgolf_jax.settings.load import STAGE_KINDS, env_names, from_env, load, parse_stages, stages_as_text

Overrides = Annotated[Settings, tyro.conf.arg(name="")]
"""Type of a parameter that takes every setting as an option: --train.iterations 500."""

schedules = tyro.constructors.ConstructorRegistry()
"""Reads the settings that are schedules."""


@schedules.primitive_rule
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


class Defaults:
  """A command some of whose options have defaults that a file gives: the one named by its first argument.

  Args:
    function: the command.
    read: path → option's name → its default; called with None where no path is given.
    example: a path as it may be given, for the message where it is missing.
    optional: whether the path may be left out.
  """

  def __init__(self, function: Callable, read: Callable[[Path | None], dict], *, example: str, optional: bool = False):
    self.function, self._read, self._example, self._optional = function, read, example, optional
    self.__doc__ = function.__doc__

  def bound(self, program: str, args: list[str]) -> Callable:
    """Returns the function with its defaults.

    Args:
      program: as typed, such as "pgolf run".
      args: the command's arguments.

    Raises:
      UserError: the path is missing, or the file cannot be read.
    """
    path = Path(args[0]) if args and not args[0].startswith("-") else None
    if path is None and not self._optional and not {"-h", "--help"} & set(args):
      raise UserError(f"{program} needs a path first, as in: {program} {self._example}")
    return functools.partial(self.function, **self._read(path))


def with_config(function: Callable, *, optional: bool = False) -> Defaults:
  """Returns a command with a parameter `settings: Overrides`, whose defaults are those of the CONFIG given first."""

  def read(path: Path | None) -> dict[str, Settings]:
    return {"settings": settings_of(path)}

  return Defaults(function, read, example="configs/demo.toml", optional=optional)


def settings_of(path: Path | None) -> Settings:
  """Returns the config file's settings, or the record's without one, with the environment's over them.

  Raises:
    UserError: there is no such file, or the environment has a name that looks like a misspelt setting.
  """
  _check_environment(os.environ)
  return from_env(os.environ) if path is None else load(builtin.find(path))


def _check_environment(environ: Mapping[str, str]) -> None:
  """Raises UserError if an environment variable looks like a misspelt setting, for it would be ignored silently."""
  known = env_names()
  for name in environ:
    if name not in known and len(name) >= 8:
      near = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
      if near and name.split("_")[0] == near[0].split("_")[0]:
        raise UserError(f"The environment sets {name}, which is no setting; did you mean {near[0]}?")
