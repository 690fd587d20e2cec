"""A command line out of a function: parameters are options, the docstring is the help, settings go over a file's.

Options and arguments may come in any order.
"""

import contextlib
import dataclasses
import difflib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pgolf_jax.errors import UserError
from pgolf_jax.settings import Settings, builtin, check, load
from pgolf_jax.settings.options import (
  HELP,
  HELP_ALL,
  SETTING,
  Options,
  Parameter,
  Positional,
  Repeated,
  Unusable,
  parameters_of,
)

__all__ = [
  "Defaults",
  "Overrides",
  "Positional",
  "Repeated",
  "Unusable",
  "call",
  "check_environment",
  "settings_of",
  "with_config",
]

Overrides = Settings
"""Type of a parameter that takes every setting as an option: --train.iterations 500."""


class Defaults:
  """A command some of whose options have defaults that a file gives: the one that its first argument names.

  Args:
    function: the command.
    read: path → option's name → its default; called with None where no path is given.
    example: a path as it may be given, for the message where it is missing.
    optional: whether the path may be left out.
  """

  def __init__(self, function: Callable, read: Callable[[Any], dict], *, example: str, optional: bool = False):
    self.function, self.read, self.example, self.optional = function, read, example, optional
    self.__doc__ = function.__doc__


def with_config(function: Callable, *, optional: bool = False) -> Defaults:
  """Returns a command with a parameter `settings: Overrides`, whose defaults are those of its CONFIG."""

  def read(path: Path | None) -> dict[str, Settings]:
    return {"settings": settings_of(path)}

  return Defaults(function, read, example="configs/demo.toml", optional=optional)


def settings_of(path: Path | None) -> Settings:
  """Returns the config file's settings, or the record's without one, with the environment's over them.

  Raises:
    UserError: there is no such file, or the environment has a name that looks like a misspelt setting.
  """
  check_environment(os.environ)
  return load.from_env(os.environ) if path is None else load.load(builtin.find(path))


def check_environment(environ: Mapping[str, str]) -> None:
  """Raises UserError if an environment variable looks like a misspelt setting, for it would be ignored silently."""
  known = load.env_names()
  for name in environ:
    if name not in known and len(name) >= 8:
      near = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
      if near and name.split("_")[0] == near[0].split("_")[0]:
        raise UserError(f"The environment sets {name}, which is no setting; did you mean {near[0]}?")


def call(program: str, command: Callable | Defaults, args: list[str]) -> Any:
  """Calls a command with what `args` say, or prints its help; returns what it returns.

  Args:
    program: as typed, such as "pgolf run".

  Raises:
    Unusable: an argument is missing, unknown or no value of its option.
    UserError: a setting or its file is not as it must be.
  """
  has_defaults = isinstance(command, Defaults)
  function = command.function if has_defaults else command
  parameters = parameters_of(function)
  options = Options(program, parameters)
  words = options.normal(args)
  if {*HELP, HELP_ALL} & set(words):
    values = load.flattened(Settings())
    if has_defaults:
      given: dict[str, Any] = {}
      with contextlib.suppress(UserError):  # help is for those too whose other words are not right yet
        given = options.parse([word for word in words if word not in (*HELP, HELP_ALL)])
      for name, part in command.read(_path(parameters, given)).items():
        values = load.flattened(_whole(part, name))
    print(options.help(function.__doc__ or "", values, everything=HELP_ALL in words))
    return 0
  given = options.parse(words)
  missing = [p for p in parameters if p.is_required and p.name not in given]
  if missing and missing[0].is_positional and has_defaults:
    raise Unusable(f"{program} needs {missing[0].label}, as in: {program} {command.example}")
  if missing:
    lacking = "; ".join(f"{p.label}, {p.meaning.rstrip('.')}" for p in missing)
    raise Unusable(f"{program} needs {lacking}. `{program} --help` shows an example.")
  values = {p.name: given[p.name] for p in parameters if p.name in given}
  if has_defaults:
    values |= _with_settings(command.read(_path(parameters, given)), given)
  return function(**values)


def _path(parameters: list[Parameter], given: Mapping[str, Any]) -> Any:
  """The file that gives defaults."""
  return given.get(next(p.name for p in parameters if p.is_positional))


def _with_settings(defaults: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
  """Parameter → its section or all settings, with the given options over the defaults."""
  changes = {name.removeprefix(SETTING): value for name, value in given.items() if name.startswith(SETTING)}
  made = {name: load.changed(_whole(part, name), changes) for name, part in defaults.items()}
  for name, part in defaults.items():
    if isinstance(part, Settings):
      check.check(made[name])  # before JAX is loaded, which takes seconds
  return {name: whole if isinstance(defaults[name], Settings) else getattr(whole, name) for name, whole in made.items()}


def _whole(part: Any, name: str) -> Settings:
  """A section as settings that hold it."""
  return part if isinstance(part, Settings) else dataclasses.replace(Settings(), **{name: part})
