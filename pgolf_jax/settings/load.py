"""Reading settings: from a TOML file, then from environment variables, each over the one before; and writing them.

In files and environments schedules are text, of which loading makes tuples; `schedules.py` says how they are written.
"""

import contextlib
import dataclasses
import difflib
import functools
import math
import numbers
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from pgolf_jax.errors import UserError, shown
from pgolf_jax.settings import Settings, schedules
from pgolf_jax.settings.fields import Entry, every_setting

Changes = dict[tuple[str, ...], object]
"""Path of a setting, such as ("ttt", "lora", "rank") → its new value."""


def load(path: str | Path, environ: Mapping[str, str] | None = None) -> Settings:
  """Returns the config file's settings with the environment's over them."""
  return from_env(os.environ if environ is None else environ, base=from_toml(path))


def from_toml(path: str | Path) -> Settings:
  """Returns the config file's settings over the defaults. Raises UserError naming the file and the setting."""
  path = Path(path)
  try:
    table = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors of Windows begin with a mark
  except FileNotFoundError:
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
    hint = f"; did you mean {path.parent / near[0]}?" if near else "."
    raise UserError(f"There is no config file {path}{hint}") from None
  except IsADirectoryError:
    raise UserError(f"{path} is a folder, but a config is a TOML file.") from None
  except OSError as e:
    raise UserError(f"{path} cannot be read ({e.strerror}).") from None
  except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
    raise UserError(f"{path} is not valid TOML: {e}.") from None
  except (ValueError, RecursionError):
    raise UserError(f"{path}, {_extreme_line(path.read_text(encoding='utf-8'))}; no setting is like that.") from None
  return from_dict(table, where=str(path))


_LONG_NUMBER = re.compile(r"[0-9A-Fa-f_]{640,}")  # of more digits than Python converts, whatever it is set to


def _extreme_line(text: str) -> str:
  """The line of a TOML text that Python's parser gives up on: a very long number, else the deepest brackets."""
  lines = text.splitlines()
  for number, line in enumerate(lines, 1):
    if _LONG_NUMBER.search(line):
      return f"line {number}: a number of hundreds of digits"
  deepest = max(range(len(lines)), key=lambda i: lines[i].count("[") + lines[i].count("{"))
  return f"line {deepest + 1}: arrays or tables nested too deeply"


def from_env(environ: Mapping[str, str], base: Settings | None = None) -> Settings:
  """Returns `base`, or the defaults, with every known name in `environ` applied.

  Names that no setting has are ignored, since an environment holds many; `check_env_names` refuses them where a mapping
  is meant to hold settings only. Raises UserError on a value of the wrong type or one that is not supported.
  """
  changes: Changes = {}
  for entry in every_setting(Settings):
    if entry.env and entry.env in environ:
      changes[entry.path] = parse_text(entry.env, environ[entry.env], entry)
  refuse_unsupported(environ)
  return _replaced(base if base is not None else Settings(), changes)


def from_dict(table: Mapping[str, object], where: str = "config") -> Settings:
  """Returns the settings of nested plain values, the inverse of `to_dict`.

  Raises:
    UserError: an unknown name, or a value of the wrong type; the message gives the nearest valid name.
  """
  changes: Changes = {}
  _collect(Settings, table, where, (), changes)
  return _replaced(Settings(), changes)


def to_dict(settings: Settings) -> dict[str, object]:
  """Returns nested plain values; schedules are text, and unset optional settings are left out, as TOML has no null."""

  def plain(section) -> dict[str, object]:
    values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    return {
      name: plain(value) if dataclasses.is_dataclass(value) else as_written(value)
      for name, value in values.items()
      if value is not None
    }

  return plain(settings)


def changed(settings: Settings, changes: Mapping[str, object]) -> Settings:
  """Returns the settings with other values, by dotted name, such as {"ttt.lora.rank": 40}; schedules may be text.

  Raises:
    UserError: an unknown name, or a value of the wrong type.
  """
  entries = {entry.name: entry for entry in every_setting(Settings)}
  by_path: Changes = {}
  for name, value in changes.items():
    if name not in entries:
      raise UserError(f"Unknown setting {name}{_nearest(name, list(entries))}")
    by_path[entries[name].path] = _checked(name, value, entries[name])
  return _replaced(settings, by_path)


def flattened(settings: Settings) -> dict[str, object]:
  """Returns every setting by its dotted name, such as "ttt.lora.rank", in the order of the dataclasses."""
  values: dict[str, object] = {}
  for entry in every_setting(Settings):
    values[entry.name] = functools.reduce(getattr, entry.path, settings)
  return values


def written(settings: Settings) -> dict[str, object]:
  """Returns dotted name → value as files have it; an optional setting that is unset is left out."""
  return {name: as_written(value) for name, value in flattened(settings).items() if value is not None}


def differences(settings: Settings, others: Settings) -> dict[str, tuple[object, object]]:
  """Returns dotted name → both values, as files have them, of every setting in which the two differ."""
  theirs = flattened(others)
  return {
    name: (as_written(value), as_written(theirs[name]))
    for name, value in flattened(settings).items()
    if value != theirs[name]
  }


def departures(settings: Settings) -> list[str]:
  """Returns the settings that differ from the record's, each as "name=value (record's value)"; data and seed aside."""
  return [
    f"{name}={shown(value)} ({shown(record)})"
    for name, (value, record) in differences(settings, Settings()).items()
    if name != "seed" and not name.startswith("data.")
  ]


def env_names() -> dict[str, str]:
  """Returns environment name → dotted setting name, for every setting that has one."""
  return {entry.env: entry.name for entry in every_setting(Settings) if entry.env}


def check_env_names(names: Iterable[str]) -> None:
  """Raises UserError if a name is no setting's environment name, with the nearest one that is."""
  known = [*env_names(), *FIXED]
  for name in names:
    if name not in known:
      raise UserError(f"Unknown setting {name}{_nearest(name, known)}")


def as_written(value: object) -> object:
  """Returns a value as files have it: a schedule as text, others as they are."""
  return schedules.as_text(value) if isinstance(value, tuple) else value


def _collect(section: type, table: Mapping[str, object], where: str, path: tuple[str, ...], changes: Changes) -> None:
  """Enters the checked values of a section's table in `changes`."""
  entries = list(every_setting(section, path))
  here = {entry.path[-1]: entry for entry in entries if len(entry.path) == len(path) + 1}
  here |= {entry.flat: entry for entry in entries if entry.flat and len(path) == 1 and entry.flat not in here}
  hints = typing.get_type_hints(section)
  for key, value in table.items():
    name = ".".join((*path, key))
    if key in here:
      if (place := here[key].path) in changes:
        raise UserError(f"{where}: {name} is {'.'.join(place)}, which is set already; give it once.")
      changes[place] = _checked(f"{where}: {name}", value, here[key])
    elif key not in hints:
      what = "setting" if path else "section or setting"
      below = {entry.path[-1]: entry.name for entry in entries}
      raise UserError(f"{where}: unknown {what} {name[:100]}{_nearest(key, {name: name for name in hints} | below)}")
    elif not isinstance(value, Mapping):
      raise UserError(f"{where}: {name} is a section, so it needs [{name}] and names under it.")
    else:
      _collect(hints[key], value, where, (*path, key), changes)


def _replaced(section, changes: Changes):
  """A section with the values at `changes`' paths in place of its own."""
  here = {path[0]: value for path, value in changes.items() if len(path) == 1}
  for name in {path[0] for path in changes if len(path) > 1}:
    below = {path[1:]: value for path, value in changes.items() if len(path) > 1 and path[0] == name}
    here[name] = _replaced(getattr(section, name), below)
  return dataclasses.replace(section, **here)


def _nearest(name: str, valid: Iterable[str] | Mapping[str, str]) -> str:
  """The end of an error's sentence: the valid name that is most like the given one, or what it stands for."""
  near = difflib.get_close_matches(name[:100], list(valid), n=1, cutoff=0.5)
  if near and isinstance(valid, Mapping):
    near = [valid[near[0]]]
  return f"; did you mean {near[0]}?" if near else "; `pgolf help settings` and docs/settings.md list those there are."


_BOOLS = {"1": True, "0": False, "true": True, "false": False}


def parse_text(name: str, text: str, entry: Entry) -> object:
  """Returns the value that a word stands for in an environment or on a command line.

  Args:
    name: what the error calls the setting.

  Raises:
    UserError: the word is no value of the setting.
  """
  text, kind = text.strip(), _not_none(entry.kind)
  if kind is not entry.kind and text == "":
    return None
  if kind is bool:
    if text.lower() not in _BOOLS:
      raise UserError(f"{name}={shown(text)} must be 1 (true) or 0 (false).")
    return _BOOLS[text.lower()]
  if typing.get_origin(kind) is Literal:
    text = text.lower()
  if kind not in (int, float):
    return _checked(name, text, entry)
  try:
    value = int(text) if kind is int and text.lstrip("+-").isdigit() else kind(text)
  except ValueError:
    raise UserError(f"{name}={shown(text)} must be {describe(entry)}.") from None
  return _checked(name, value, entry)


def describe(entry: Entry) -> str:
  """Returns what a setting can be, such as "a whole number from 1 to 64"."""
  kind = _not_none(entry.kind)
  if typing.get_origin(kind) is Literal:
    return f"one of {', '.join(choice or 'empty' for choice in typing.get_args(kind))}"
  if typing.get_origin(kind) is tuple:
    return f"a schedule, {schedules.pattern(typing.get_args(kind)[0])}"
  words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
  return f"{words}, {entry.within}" if entry.within else words


def _not_none(kind):
  """The type of an optional setting when it is set; other types as they are."""
  if isinstance(kind, types.UnionType):
    return next(k for k in typing.get_args(kind) if k is not type(None))
  return kind


def _checked(where: str, value: object, entry: Entry) -> object:
  """The value in the form that its setting has in memory; raises UserError if it is no value of the setting."""
  kind = _not_none(entry.kind)
  if value is None and kind is not entry.kind:
    return None
  if typing.get_origin(kind) is Literal:
    choices = typing.get_args(kind)
    if not isinstance(value, str) or value not in choices:
      near = difflib.get_close_matches(str(value)[:100], choices, n=1)
      raise UserError(
        f"{where}={shown(value)} must be {describe(entry)}{f'; did you mean {near[0]}?' if near else '.'}"
      )
    return value
  if typing.get_origin(kind) is tuple:
    item = typing.get_args(kind)[0]
    if isinstance(value, tuple) and all(type(stage) is item for stage in value):
      value = schedules.as_text(value)
    if not isinstance(value, str):
      raise UserError(f"{where}={shown(value)} must be {describe(entry)}.")
    return schedules.parse(where, value, item, entry.within)
  if kind is str and isinstance(value, Path):
    value = str(value)
  if kind is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
    value = int(value)  # of NumPy's
  if kind is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
    with contextlib.suppress(OverflowError):
      value = float(value)
  if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
    raise UserError(f"{where}={shown(value)} must be {describe(entry)}{', not text' * isinstance(value, str)}.")
  if kind is float and not math.isfinite(value):
    raise UserError(f"{where} must be finite, not {value}.")
  if entry.within and not entry.within.holds(value):
    raise UserError(f"{where}={shown(value)} must be {entry.within}.")
  return value


# Name → the values accepted, and why no others are. `None` accepts any: the name has no effect in this recipe.
FIXED: dict[str, tuple[tuple[str, ...] | None, str]] = {
  "WITHIN_BOOST": (
    ("0",),
    "the within-word channel decides from the target token whether to hint, which breaks causality",
  ),
  "WORD_BOOST": (
    ("0",),
    "the word-start channel decides from the target token whether to hint, which breaks causality",
  ),
  "AGREE_ADD_BOOST": (("0",), "it belongs to the target-gated channels, which break causality"),
  "WITHIN_TAU": (None, "inert while WITHIN_BOOST is 0"),
  "WORD_TAU": (None, "inert while WORD_BOOST is 0"),
  "WORD_ORDER": (None, "inert while WORD_BOOST is 0"),
  "WORD_NORMALIZE": (None, "inert while WORD_BOOST is 0"),
  "NGRAM_HINT_PRECOMPUTE_OUTSIDE": (("0",), "hints are built inside the evaluation clock"),
  "ROPE_YARN": (("0",), "rotary frequencies are never rescaled"),
  "ROPE_TRAIN_SEQ_LEN": (None, "inert while ROPE_YARN is 0"),
  "TIE_EMBEDDINGS": (("1",), "the output head is the embedding"),
  "EMBED_LR": (None, "inert while TIE_EMBEDDINGS is 1"),
  "ATTN_OUT_GATE_ENABLED": (("0",), "this gate of older stacks is not part of the recipe"),
  "GATED_ATTN_ENABLED": (("0",), "this gate of older stacks is not part of the recipe"),
  "SKYLIGHT_UW_FLOOR": (("0",), "update floors are not part of the recipe"),
  "SKYLIGHT_NORM_EMA": (("0",), "row-variance averaging is not part of the recipe"),
  "EVAL_INCLUDE_TAIL": (("1",), "every target is scored, the last partial span too"),
  "EVAL_STRIDE": (None, "inert: spans do not overlap"),
  "FUSED_CE_ENABLED": (None, "inert: the fused and the plain loss are the same function"),
  "COMPILE_SHAPE_WARMUP": (None, "inert: every shape is compiled before the clock starts"),
  "COMPILE_SHAPE_WARMUP_ITERS": (None, "inert: every shape is compiled before the clock starts"),
  "COMPILE_SHAPE_WARMUP_LOOP_MODES": (None, "inert: every shape is compiled before the clock starts"),
  "MIDRUN_CAP_LOG_UPDATES": (None, "inert: every step's learning rate is in metrics.jsonl"),
  "COMPRESSOR": (("pergroup", "brotli", "lzma"), "the artifact's codec is quantize.codec, zstd or entropy"),
}


def refuse_unsupported(environ: Mapping[str, str]) -> None:
  """Raises UserError, with the reason, if a name of FIXED has a value that is not supported."""
  for name, (allowed, reason) in FIXED.items():
    if name in environ and allowed is not None and not _same_value(environ[name], allowed):
      raise UserError(f"{name}={environ[name]} is not supported: {reason}; set it to {allowed[0]} or unset it.")


def _same_value(text: str, allowed: tuple[str, ...]) -> bool:
  def canonical(s: str):
    try:
      return float(s)
    except ValueError:
      return s.strip().lower()

  return canonical(text) in [canonical(a) for a in allowed]
