"""The options and arguments of a command: what they are, reading them, and the page that explains them."""

import argparse
import dataclasses
import difflib
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pgolf_jax.errors import UserError, shown
from pgolf_jax.settings import Settings, load
from pgolf_jax.settings.fields import Entry, every_setting
from pgolf_jax.settings.reference import COMMON, option, value_text

_POSITIONAL, _REPEATED = "positional", "repeated"
T = TypeVar("T")
Positional = Annotated[T, _POSITIONAL]
"""Type of a parameter that is given without a name: Positional[Path]."""
Repeated = Annotated[tuple[T, ...], _REPEATED]
"""Type of an option that may be given several times, one value each time: Repeated[str]."""

HELP, HELP_ALL = ("-h", "--help"), "--help-all"


class Unusable(UserError):
  """Arguments that a command cannot take."""


SETTING = "setting "
"""Before the names of settings among the values that are given."""


@dataclasses.dataclass(frozen=True)
class Parameter:
  """A parameter of a command's function."""

  name: str
  kind: Any  # its type without None
  default: Any  # inspect.Parameter.empty if there is none
  is_positional: bool
  meaning: str
  is_repeated: bool = False

  @property
  def is_required(self) -> bool:
    return self.default is inspect.Parameter.empty and not dataclasses.is_dataclass(self.kind)

  @property
  def label(self) -> str:
    return self.name.upper().replace("_", "-") if self.is_positional else self.flag

  @property
  def flag(self) -> str:
    return "--" + self.name.replace("_", "-")

  @property
  def is_many(self) -> bool:
    return typing.get_origin(self.kind) in (list, tuple)

  @property
  def item(self) -> Any:
    """The type of one word."""
    return typing.get_args(self.kind)[0] if self.is_many else self.kind

  def read(self, word: str) -> Any:
    """Returns the value that a word stands for."""
    if word == argparse.SUPPRESS:  # argparse reads this default of its own
      return None
    if self.item is Path and not word:  # an unset variable of a shell, which would be the current folder
      raise Unusable(f"{self.label} is empty.")
    if typing.get_origin(self.item) is Literal:
      choices = typing.get_args(self.item)
      if word not in choices:
        raise Unusable(f"{self.label} {shown(word)} must be one of {', '.join(choices)}.")
      return word
    try:
      return self.item(word)
    except ValueError:
      wanted = {int: "a whole number", float: "a number"}[self.item]
      raise Unusable(f"{self.label} {shown(word)} must be {wanted}.") from None


def parameters_of(function: Callable) -> list[Parameter]:
  hints, meanings = typing.get_type_hints(function, include_extras=True), split(function.__doc__ or "")[1]
  parameters = []
  for name, parameter in inspect.signature(function).parameters.items():
    kind, marks = hints[name], ()
    if typing.get_origin(kind) is Annotated:
      kind, marks = typing.get_args(kind)[0], kind.__metadata__
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
      kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is Annotated:
      kind = typing.get_args(kind)[0]
    meaning = meanings.get(name, "")
    parameters.append(Parameter(name, kind, parameter.default, _POSITIONAL in marks, meaning, _REPEATED in marks))
  return parameters


def split(docstring: str) -> tuple[str, dict[str, str]]:
  """What a docstring says before its arguments, and what it says of each of them."""
  text, _, arguments = inspect.cleandoc(docstring).partition("\nArgs:\n")
  meanings: dict[str, str] = {}
  for line in inspect.cleandoc(arguments).splitlines():
    if found := re.match(r"(\w+): (.*)", line):
      name = found[1]
      meanings[name] = found[2]
    elif line.strip():
      meanings[name] += " " + line.strip()
  return text.rstrip(), meanings


def _settings_of(parameters: list[Parameter]) -> list[Entry]:
  """The settings that a command takes as options."""
  entries = []
  for parameter in parameters:
    if parameter.kind is Settings:
      entries += every_setting(Settings)
    elif dataclasses.is_dataclass(parameter.kind):
      entries += every_setting(parameter.kind, (parameter.name,))
  return entries


class _Format(argparse.RawDescriptionHelpFormatter):
  """Fills paragraphs to the width of the terminal; examples stay as they are."""

  def __init__(self, prog: str):
    super().__init__(prog, max_help_position=26)

  def _fill_text(self, text: str, width: int, indent: str) -> str:
    paragraphs = text.split("\n\n")
    return "\n\n".join(p if re.match(r"[^\n]*pgolf ", p) else textwrap.fill(p, width) for p in paragraphs)


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> None:
    found = re.match(r"argument ([^:/]*)\S*: expected .*", message)
    raise Unusable(f"{found[1].rstrip()} needs a value." if found else f"{self.prog}: {message}.")


class Options:
  """The options of a command.

  Args:
    program: as typed.
    parameters: of its function.

  Attributes:
    entries: settings that are options too.
  """

  def __init__(self, program: str, parameters: list[Parameter]):
    self.program, self.entries = program, _settings_of(parameters)
    self.parameters = [p for p in parameters if not dataclasses.is_dataclass(p.kind)]
    self._flags = {p.flag: p for p in self.parameters if not p.is_positional}
    self._flags |= {f"--no-{flag[2:]}": p for flag, p in self._flags.items() if p.kind is bool}
    self._settings = {option(entry): entry for entry in self.entries}
    self._negated = {_negated(name): name for name, entry in self._settings.items() if _is_bool(entry)}

  def normal(self, args: list[str]) -> list[str]:
    """Returns the words with settings' names and truth values in one form.

    Raises:
      Unusable: an option is unknown.
    """
    words, waiting = [], list(args)
    while waiting:
      word = waiting.pop(0)
      if not word.startswith("--") or word == "--":
        words.append(word)
        continue
      name, equals, value = word.partition("=")
      name = name.replace("_", "-")
      if name in self._negated and not equals:
        name, equals, value = self._negated[name], "=", "0"
      elif name in self._settings and not equals:
        is_bool = _is_bool(self._settings[name])
        if waiting and (waiting[0].lower() in _TRUTHS if is_bool else not waiting[0].startswith("--")):
          equals, value = "=", waiting.pop(0)
        elif is_bool:
          equals, value = "=", "1"
        else:
          raise Unusable(f"{name} needs a value: {load.describe(self._settings[name])}.")
      elif name not in self._settings and name not in self._flags and name not in (*HELP, HELP_ALL):
        raise Unusable(f"{self.program} has no option {name[:100]}{self._nearest(name)}")
      elif name in self._flags and not equals and waiting and re.fullmatch(r"-[0-9.].*", waiting[0]):
        equals, value = "=", waiting.pop(0)  # a negative number
      words.append(f"{name}{equals}{value}")
    return words

  def _nearest(self, name: str) -> str:
    known = [*self._flags, *self._settings]
    near = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.7)
    last = [full for full in self._settings if full.rpartition(".")[2] == name[2:]]
    near = (last if len(last) == 1 else []) or near
    more = "pgolf help settings" if self._settings and "." in name else f"{self.program} --help"
    return f"; did you mean {near[0]}?" if near else f"; `{more}` lists those there are."

  def parse(self, words: list[str]) -> dict[str, Any]:
    """Returns the values of parameters by name, and of settings by `SETTING` and name, that are given."""
    given, extra = self._parser(entries=self.entries).parse_known_intermixed_args(words)
    if extra:
      raise Unusable(f"{self.program} takes no {shown(extra[0])}; `{self.program} --help` shows an example.")
    return {name: value for name, value in vars(given).items() if name.startswith(SETTING) or _is_given(value)}

  def _parser(self, entries: list[Entry], values: Mapping[str, object] | None = None, intro: str = "") -> _Parser:
    """The parser of parameters and of these settings; with `values`, as it is printed as help."""
    parser = _Parser(
      prog=self.program,
      add_help=False,
      allow_abbrev=False,
      argument_default=argparse.SUPPRESS,
      formatter_class=_Format,
      description=intro,
    )
    arguments, options = parser.add_argument_group("arguments"), parser.add_argument_group("options")
    for p in self.parameters:
      self._add(arguments if p.is_positional else options, p)
    if values is not None:
      options.add_argument(*HELP, action="help", help="show this page")
      if entries:
        options.add_argument(HELP_ALL, action="help", help="show every setting")
      parser.usage = " ".join([self.program, *(self._usage(p) for p in self.parameters if p.is_required), "[options]"])
    groups: dict[str, Any] = {}
    for entry in entries:
      section = entry.path[0] if values is None or entry.name not in COMMON else "common settings"
      group = groups.setdefault(section, None) or parser.add_argument_group(section)
      groups[section] = group
      about = None
      if values is not None:
        about = "; ".join(filter(None, [entry.env, value_text(values[entry.name])]))
        about = f"{entry.meaning} ({about})".replace("%", "%%")
      group.add_argument(
        option(entry), dest=SETTING + entry.name, metavar=_metavar(entry), help=about,
        type=lambda text, entry=entry: load.parse_text(option(entry), text, entry),
      )  # fmt: skip
    return parser

  def help(self, docstring: str, values: Mapping[str, object], *, everything: bool) -> str:
    """Returns the page that explains the command.

    Args:
      docstring: of its function.
      values: of settings without options, by dotted name.
      everything: whether all settings are shown, or the common ones.
    """
    entries = self.entries
    if not everything and len(entries) > 3 * len(COMMON):
      entries = [entry for name in COMMON for entry in entries if entry.name == name]
    text = self._parser(entries, values, split(docstring)[0]).format_help().rstrip()
    if self.entries:
      text += "\n\nIn brackets: a setting's environment name, and the value that it has without the option."
    if entries is not self.entries:
      text += f"\nAll {len(self.entries)} settings: {self.program} --help-all, or docs/settings.md."
    return text

  def _usage(self, p: Parameter) -> str:
    return p.label if p.is_positional else f"{p.flag} {_word(p)}"

  def _add(self, group, p: Parameter) -> None:
    meaning, default = p.meaning.rstrip(".").replace("%", "%%"), p.default
    has_default = default not in (inspect.Parameter.empty, None, (), "") and default is not False
    if has_default and not p.is_positional:
      if p.kind is bool:
        default = "on"
      elif isinstance(default, tuple):
        default = " ".join(map(str, default))
      meaning += f" (default: {default})"
    if p.is_positional:
      group.add_argument(p.name, metavar=p.label, type=p.read, nargs="*" if p.is_many else "?", help=meaning)
    elif p.kind is bool:
      off = f"--no-{p.flag[2:]}"
      flags = [p.flag] if p.default is False else [p.flag, off]
      group.add_argument(*flags, dest=p.name, action=_Switch, help=meaning)
      if p.default is False:
        group.add_argument(off, dest=p.name, action=_Switch, help=argparse.SUPPRESS)
    else:
      group.add_argument(
        p.flag,
        dest=p.name,
        type=p.read,
        action="append" if p.is_repeated else "store",
        metavar=(_word(p), "…") if p.is_many and not p.is_repeated else _word(p),
        nargs="+" if p.is_many and not p.is_repeated else None,
        help=meaning,
      )


class _Switch(argparse.Action):
  """--name is true, --no-name false."""

  def __init__(self, option_strings, dest, default=None, help=None):
    super().__init__(option_strings, dest, nargs=0, default=default, help=help)

  def __call__(self, parser, namespace, values, option_string=None):
    setattr(namespace, self.dest, not option_string.startswith("--no-"))


def _is_given(value: Any) -> bool:
  """Whether a value comes from a word."""
  return value is not None and value not in ([], argparse.SUPPRESS)


_TRUTHS = ("0", "1", "true", "false")


def _is_bool(entry: Entry) -> bool:
  return entry.kind is bool or bool in typing.get_args(entry.kind)


def _negated(name: str) -> str:
  """--ttt.enabled → --ttt.no-enabled."""
  section, dot, last = name[2:].rpartition(".")
  return f"--{section}{dot}no-{last}"


def _word(p: Parameter) -> str:
  """How help writes an option's value."""
  if typing.get_origin(p.item) is Literal:
    return "|".join(typing.get_args(p.item))
  return {int: "N", float: "X", Path: "PATH"}.get(p.item, "TEXT")


def _metavar(entry: Entry) -> str:
  described = load.describe(entry)
  if described.startswith("one of "):
    return described.removeprefix("one of ").replace(", ", "|").replace("empty|", "")
  if described.startswith("a schedule"):
    return described.partition(", ")[2]
  return "N" if "whole" in described else "X" if "number" in described else "0|1" if "true" in described else "TEXT"
