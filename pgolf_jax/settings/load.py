"""Reading settings: from a TOML file, then from environment variables, each over the one before; and writing them.

In files and environments the schedules are text: `1024@0.1,3072@1` (length@progress), `0.5@0.9` (factor@progress),
`256:16,2000:32` (document length:chunk size), `1,5,20` (numbers). Loading makes tuples of them.
"""

import dataclasses
import difflib
import math
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from pgolf_jax.errors import UserError
from pgolf_jax.settings import ChunkStep, LengthStage, ScaleStage, Settings

Changes = dict[tuple[str, ...], object]
"""Path of a setting, such as ("ttt", "lora", "rank") → its new value."""


def load(path: str | Path, environ: Mapping[str, str] | None = None) -> Settings:
  """Returns the config file's settings with the environment's over them."""
  return from_env(os.environ if environ is None else environ, base=from_toml(path))


def from_toml(path: str | Path) -> Settings:
  """Returns the config file's settings over the defaults. Raises UserError naming the file and the setting."""
  path = Path(path)
  try:
    table = tomllib.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
    hint = f"; did you mean {path.parent / near[0]}?" if near else "."
    raise UserError(f"There is no config file {path}{hint}") from None
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
  for path, field, kind in _fields(Settings):
    name = field.metadata.get("env")
    if name and name in environ:
      changes[path] = _parse_env(name, environ[name], kind)
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
      name: plain(value) if dataclasses.is_dataclass(value) else _as_text(value) if isinstance(value, tuple) else value
      for name, value in values.items()
      if value is not None
    }

  return plain(settings)


def changed(settings: Settings, changes: Mapping[str, object]) -> Settings:
  """Returns the settings with other values, by dotted name, such as {"ttt.lora.rank": 40}; schedules may be text.

  Raises:
    UserError: an unknown name, or a value of the wrong type.
  """
  kinds = {".".join(path): (path, kind) for path, _, kind in _fields(Settings)}
  by_path: Changes = {}
  for name, value in changes.items():
    if name not in kinds:
      raise UserError(f"Unknown setting {name}{_nearest(name, kinds)}")
    path, kind = kinds[name]
    by_path[path] = value if isinstance(value, tuple) or value is None else _checked(name, value, kind)
  return _replaced(settings, by_path)


def flattened(settings: Settings) -> dict[str, object]:
  """Returns every setting by its dotted name, such as "ttt.lora.rank", in the order of the dataclasses."""
  values: dict[str, object] = {}
  for path, _, _ in _fields(Settings):
    value: object = settings
    for name in path:
      value = getattr(value, name)
    values[".".join(path)] = value
  return values


def differences(settings: Settings, others: Settings) -> dict[str, tuple[object, object]]:
  """Returns dotted name → both values, as files have them, of every setting in which the two differ."""
  theirs = flattened(others)
  return {
    name: (_as_text(value), _as_text(theirs[name]))
    for name, value in flattened(settings).items()
    if value != theirs[name]
  }


def departures(settings: Settings) -> list[str]:
  """Returns the settings that differ from the record's, each as "name=value (record's value)"; data and seed aside."""
  return [
    f"{name}={value} ({record})"
    for name, (value, record) in differences(settings, Settings()).items()
    if name != "seed" and not name.startswith("data.")
  ]


def env_names() -> dict[str, str]:
  """Returns environment name → dotted setting name, for every setting that has one."""
  return {field.metadata["env"]: ".".join(path) for path, field, _ in _fields(Settings) if "env" in field.metadata}


def check_env_names(names: Iterable[str]) -> None:
  """Raises UserError if a name is no setting's environment name, with the nearest one that is."""
  known = [*env_names(), *FIXED]
  for name in names:
    if name not in known:
      raise UserError(f"Unknown setting {name}{_nearest(name, known)}")


def parse_stages(name: str, text: str, kind: type) -> tuple:
  """Returns the tuple that a schedule's text stands for, sorted; empty for empty text.

  Args:
    name: of the setting, for errors.
    kind: the type of the tuple's items: LengthStage, ScaleStage, ChunkStep or int.

  Raises:
    UserError: an item that does not read as it should, or a number out of range.
  """
  items = [item.strip() for item in text.split(",") if item.strip()]
  return tuple(sorted((_STAGES[kind](name, item) for item in items), key=_position))


def _position(stage) -> float:
  """What the items of a schedule are sorted by: progress, or the length of documents."""
  return stage.until if isinstance(stage, LengthStage) else stage.at if isinstance(stage, ScaleStage) else stage


def _length_stage(name: str, item: str) -> LengthStage:
  stage = LengthStage(*_at_progress(name, item, int))
  if stage.seq_len <= 0 or not 0 < stage.until <= 1:
    raise UserError(f"{name} has the stage {item}; lengths must be positive and progress must lie in (0, 1].")
  return stage


def _scale_stage(name: str, item: str) -> ScaleStage:
  return ScaleStage(*_at_progress(name, item, float))


def _at_progress(name: str, item: str, kind: type) -> tuple:
  try:
    value, progress = item.split("@", 1)
    return _checked(name, kind(value), kind), _checked(name, float(progress), float)
  except ValueError:
    raise UserError(f"{name} has the stage {item!r}; each must read value@progress, as in 1024@0.35.") from None


def _chunk_step(name: str, item: str) -> ChunkStep:
  try:
    step = ChunkStep(*(int(number) for number in item.replace("=", ":").split(":")))
  except (ValueError, TypeError):
    step = ChunkStep(0, 0)
  if step.longest <= 0 or step.size <= 0:
    raise UserError(f"{name} has {item!r}; each must read length:size, as in 256:16, both positive.")
  return step


_DIGITS = re.compile(r"[0-9]{1,18}")


def _number(name: str, item: str) -> int:
  if not _DIGITS.fullmatch(item):
    raise UserError(f"{name} has {item!r}; each must be a whole number, as in 1,5,20.")
  return int(item)


_STAGES = {LengthStage: _length_stage, ScaleStage: _scale_stage, ChunkStep: _chunk_step, int: _number}
STAGE_KINDS = {
  LengthStage: "LENGTH@PROGRESS,…",
  ScaleStage: "FACTOR@PROGRESS,…",
  ChunkStep: "LENGTH:SIZE,…",
  int: "N,…",
}
"""Type of a schedule's items → how the schedule is written."""


def stages_as_text(stages: tuple) -> str:
  """Returns a schedule as the text that `parse_stages` reads."""
  joint = {LengthStage: "@", ScaleStage: "@", ChunkStep: ":"}

  def text(stage) -> str:
    if not isinstance(stage, tuple):
      return str(stage)
    return joint[type(stage)].join(f"{number:g}" if isinstance(number, float) else str(number) for number in stage)

  return ",".join(map(text, stages))


def _as_text(value: object) -> object:
  """A schedule as text; other values as they are."""
  return stages_as_text(value) if isinstance(value, tuple) else value


def _fields(section: type, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dataclasses.Field, object]]:
  """(path, field, type) of every setting in a section and the sections in it."""
  hints = typing.get_type_hints(section)
  for field in dataclasses.fields(section):
    kind = hints[field.name]
    if dataclasses.is_dataclass(kind):
      yield from _fields(kind, (*path, field.name))
    else:
      yield (*path, field.name), field, kind


def _collect(section: type, table: Mapping[str, object], where: str, path: tuple[str, ...], changes: Changes) -> None:
  """Enters the checked values of a section's table in `changes`."""
  hints = typing.get_type_hints(section)
  flat = {
    field.metadata["flat"]: (inner, kind)
    for inner, field, kind in _fields(section, path)
    if "flat" in field.metadata and len(path) == 1
  }
  for key, value in table.items():
    name = ".".join((*path, key))
    if key in flat:
      inner, kind = flat[key]
      changes[inner] = _checked(f"{where}: {name}", value, kind)
    elif key not in hints:
      what = "section or setting" if not path else "setting"
      raise UserError(f"{where}: unknown {what} {name if path else repr(key)}{_nearest(key, hints)}")
    elif not dataclasses.is_dataclass(hints[key]):
      changes[*path, key] = _checked(f"{where}: {name}", value, hints[key])
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


def _nearest(name: str, valid: Iterable[str]) -> str:
  """The end of an error's sentence: the valid name that is most like the given one."""
  near = difflib.get_close_matches(name[:100], list(valid), n=1, cutoff=0.5)
  return f"; did you mean {near[0]}?" if near else "; see README.md for the settings there are."


def _parse_env(name: str, text: str, kind) -> object:
  """An environment variable's text as a value of the type `kind`; raises UserError naming the variable."""
  text = text.strip()
  if isinstance(kind, types.UnionType):
    if text == "":
      return None
    kind = next(k for k in typing.get_args(kind) if k is not type(None))
  if typing.get_origin(kind) is tuple:
    return parse_stages(name, text, typing.get_args(kind)[0])
  if typing.get_origin(kind) is Literal:
    return _checked(name, text.lower(), kind)
  try:
    if kind is bool:
      return {"1": True, "0": False, "true": True, "false": False}[text.lower()]
    if kind is int and text.lstrip("+-").isdigit():
      return int(text)
    return _checked(name, kind(text), kind)
  except (ValueError, KeyError):
    wanted = "0 or 1" if kind is bool else {int: "a whole number", float: "a number"}[kind]
    raise UserError(f"{name}={_shown(text)} is not {wanted}.") from None


def _checked(where: str, value: object, kind) -> object:
  """The value in the form that its setting has in memory; raises UserError if it is not of the type `kind`."""
  if isinstance(kind, types.UnionType):
    kind = next(k for k in typing.get_args(kind) if k is not type(None))
  if typing.get_origin(kind) is Literal:
    choices = typing.get_args(kind)
    if not isinstance(value, str) or value not in choices:
      near = difflib.get_close_matches(str(value)[:100], [str(c) for c in choices], n=1)
      hint = f"; did you mean {near[0]!r}?" if near else "."
      raise UserError(f"{where} must be one of {', '.join(map(repr, choices))}, not {_shown(value)}{hint}")
    return value
  if typing.get_origin(kind) is tuple:
    return parse_stages(where, _checked(where, value, str), typing.get_args(kind)[0])
  if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000:
    return float(value)
  if kind is float and isinstance(value, float) and not math.isfinite(value):
    raise UserError(f"{where} must be finite, not {value}.")
  if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    raise UserError(f"{where} must be {names[kind]}, not {_shown(value)}.")
  return value


def _shown(value: object) -> str:
  """The beginning of what a value looks like, for messages."""
  try:
    text = repr(value)
  except (ValueError, RecursionError):  # a whole number of thousands of digits, or something very deep
    return "a value too long to show"
  return text if len(text) <= 100 else f"{text[:100]}…"


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
