"""CaseOps: a reversible rewriting of ASCII capitals, so that a vocabulary need not hold every word twice.

Four private-use characters mark the case of a run of ASCII letters, which is then written in lower case:
`The` → TITLE `the`, `NASA` → ALLCAPS `nasa`, `iPhone` → `i` CAPNEXT `phone`. A marker that stands in the text itself
is escaped by ESC in front of it; everything else, letters outside ASCII included, is unchanged.

As published, ` The` is space, TITLE, `the`, so that the word's piece with a space in front, which is the commoner one,
is of no use to it. With markers before spaces the space that stands in front of a TITLE or ALLCAPS goes behind it:
TITLE, ` the`. A CAPNEXT never stands behind a space.
"""

import re
from typing import Literal

import numpy as np
from jaxtyping import Int

from pgolf_jax.errors import UserError

TITLE, ALLCAPS, CAPNEXT, ESC = MARKERS = ("\ue001", "\ue002", "\ue003", "\ue004")
NAMES = dict(zip(MARKERS, ("TITLE", "ALLCAPS", "CAPNEXT", "ESC"), strict=True))

Markers = Literal["none", "published", "before-space"]
"""Where the marker of a capitalised word goes: nowhere, the text being left as it is; behind the space in front of the
word, as in the published data; or before that space."""
IN_WORDS: dict[Markers, str] = {
  "none": "as it is",
  "published": "rewritten by CaseOps",
  "before-space": "rewritten by CaseOps with markers before spaces",
}

_MARKER = re.compile(f"[{TITLE}-{ESC}]")
_CAPITAL = re.compile("[A-Z]")
# From the first capital of a run that began in lower case to the run's end. The capital stands before the
# look-behind so that the search skips to capitals at the speed of a character set.
_AFTER_LOWER = re.compile("[A-Z](?<=[a-z][A-Z])[A-Za-z]*")
_FROM_CAPITAL = re.compile("([A-Z][A-Za-z]*)")
_ESCAPED = re.compile(f"{ESC}(?s:.)")


def _marked(title: str, allcaps: str) -> re.Pattern[str]:
  """Returns what matches everything that has a marker, given what a run starts with up to its first letter."""
  return re.compile(
    f"(?P<literal>{ESC}(?s:.))"
    f"|(?P<title>{title}[A-Za-z])"
    f"|(?P<allcaps>{allcaps}[A-Za-z](?:{CAPNEXT}?[A-Za-z])*)"
    f"|(?P<capnext>{CAPNEXT}[A-Za-z])"
    f"|(?P<misplaced>[{TITLE}-{ESC}])"
  )


_MARKED = {
  "published": _marked(*(f"(?<![A-Za-z]){marker}" for marker in (TITLE, ALLCAPS))),
  "before-space": _marked(*(f"(?:{marker} |(?<![A-Za-z ]){marker})" for marker in (TITLE, ALLCAPS))),
}


def encode(text: str, markers: Markers = "published") -> str:
  """Returns `text` rewritten; `decode` inverts this for every text."""
  if markers == "none":
    return text
  if _MARKER.search(text):
    text = _MARKER.sub(rf"{ESC}\g<0>", text)
  text = _AFTER_LOWER.sub(lambda run: _mark_each_capital(run[0]), text)
  # Every remaining capital starts a run, so that equal runs have equal rewritings.
  parts = _FROM_CAPITAL.split(text)
  parts[1::2] = map(_RUNS.__getitem__, parts[1::2])
  coded = "".join(parts)
  if markers == "before-space":
    # What stands behind a space is no literal marker, which has an ESC in front of it.
    coded = coded.replace(f" {TITLE}", f"{TITLE} ").replace(f" {ALLCAPS}", f"{ALLCAPS} ")
  return coded


def decode(coded: str, markers: Markers = "published", *, strict: bool = True) -> str:
  """Returns the text of which `coded` is the rewriting.

  Args:
    coded: rewritten text.
    markers: where `encode` put them.
    strict: refuses a marker where `encode` cannot have put one. Otherwise such a marker is left out, as is useful for
      text sampled from a model.

  Raises:
    UserError: `strict` is set, and a TITLE or ALLCAPS stands inside a run of ASCII letters, twice in a row, before
      anything but an ASCII letter, or behind a space that belongs behind it; a CAPNEXT twice in a row or before
      anything but an ASCII letter; or an ESC at the end.
  """
  if markers == "none":
    return coded

  def restore(match: re.Match) -> str:
    if match.lastgroup == "literal":
      return match[0][1]
    if match.lastgroup == "misplaced":
      if strict:
        raise UserError(_explain(coded, match.start()))
      return ""
    return _MARKER.sub("", match[0]).upper()

  return _MARKED[markers].sub(restore, coded)


def original_bytes(coded: str) -> Int[np.ndarray, "chars"]:
  """Returns the UTF-8 bytes of the original text that each character of `coded` stands for.

  A marker stands for 0 bytes, an escaped marker for 3 (its ESC for 0), any other character for its own UTF-8.
  """
  bytes_C = utf8_bytes(coded)
  points_C = np.frombuffer(coded.encode("utf-32-le"), "<u4")
  bytes_C[(points_C >= ord(TITLE)) & (points_C <= ord(ESC))] = 0
  if ESC in coded:
    escaped = [match.start() + 1 for match in _ESCAPED.finditer(coded)]
    bytes_C[escaped] = utf8_bytes("".join(coded[i] for i in escaped))
  return bytes_C


def utf8_bytes(text: str) -> Int[np.ndarray, "chars"]:
  """Returns the length of the UTF-8 encoding of each character of `text`."""
  points_C = np.frombuffer(text.encode("utf-32-le"), "<u4")
  return 1 + (points_C >= 0x80).astype(np.int64) + (points_C >= 0x800) + (points_C >= 0x10000)


def _mark_each_capital(run: str) -> str:
  return _CAPITAL.sub(lambda capital: CAPNEXT + capital[0].lower(), run)


class _RunCache(dict):
  """Rewritings of runs that start with a capital; emptied when full, so that memory is bounded."""

  LIMIT = 1 << 16

  def __missing__(self, run: str) -> str:
    rest = run[1:]
    if not rest or rest.islower():
      coded = TITLE + run.lower()
    elif rest.isupper():
      coded = ALLCAPS + run.lower()
    else:
      coded = TITLE + run[0].lower() + _mark_each_capital(rest)
    if len(self) >= self.LIMIT:
      self.clear()
    self[run] = coded
    return coded


_RUNS = _RunCache()


def _explain(coded: str, at: int) -> str:
  marker, following = coded[at], coded[at + 1 : at + 2]
  name = NAMES[marker]
  if not following:
    fault = "at the end of the text"
  elif following == marker:
    fault = "twice in a row"
  elif not re.match("[A-Za-z]", following):
    fault = "before something that is not an ASCII letter"
  elif coded[at - 1 : at] == " ":
    fault = "behind a space, not before it"
  else:
    fault = "inside a run of letters"
  return f"not CaseOps text: {name} at character {at} stands {fault}; check what produced this text"
