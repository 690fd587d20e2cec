"""Values of settings as they are written in environments and config files: parsed, checked, refused with a reason."""

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Literal

from pgolf_jax.errors import UserError

# Names of the reference that this system knows but has no setting for: the only values it accepts, and why.
# `None` accepts any value: the name is inert where the rest of the recipe is as here.
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


def nearest(name: str, valid: Iterable[str]) -> str:
  """The end of an error's sentence: the valid name that is most like the given one."""
  near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
  return f"; did you mean {near[0]}?" if near else "; see README.md for the settings there are."


def _same_value(text: str, allowed: tuple[str, ...]) -> bool:
  def canonical(s: str):
    try:
      return float(s)
    except ValueError:
      return s.strip().lower()

  return canonical(text) in [canonical(a) for a in allowed]


def parse_env(name: str, text: str, kind) -> object:
  """An environment variable's text as a value of the type `kind`; raises UserError naming the variable."""
  text = text.strip()
  if isinstance(kind, types.UnionType):
    if text == "":
      return None
    kind = next(k for k in typing.get_args(kind) if k is not type(None))
  if typing.get_origin(kind) is Literal:
    return checked(name, text.lower(), kind)
  try:
    if kind is bool:
      return {"1": True, "0": False, "true": True, "false": False}[text.lower()]
    if kind is int and text.lstrip("+-").isdigit():
      return int(text)
    return kind(text)
  except (ValueError, KeyError):
    wanted = "0 or 1" if kind is bool else {int: "a whole number", float: "a number"}[kind]
    raise UserError(f"{name}={text!r} is not {wanted}.") from None


def checked(where: str, value: object, kind) -> object:
  """The value, as a float where one is due; raises UserError if it is not of the type `kind`."""
  if isinstance(kind, types.UnionType):
    kind = next(k for k in typing.get_args(kind) if k is not type(None))
  if typing.get_origin(kind) is Literal:
    choices = typing.get_args(kind)
    if value not in choices:
      near = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1)
      hint = f"; did you mean {near[0]!r}?" if near else "."
      raise UserError(f"{where} must be one of {', '.join(map(repr, choices))}, not {value!r}{hint}")
    return value
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    raise UserError(f"{where} must be {names[kind]}, not {value!r}.")
  return value
