"""Standard output and error on every kind of terminal, file and pipe."""

import codecs
import os
import sys
import unicodedata

_PLAIN = {
  "…": "...", "→": "->", "←": "<-", "–": "-", "—": "-", "×": "x", "·": "*", "√": "sqrt", "≤": "<=", "≥": ">=",
  "≠": "!=", "±": "+-", "μ": "mu", "β": "beta", "σ": "sigma", "Δ": "delta", "‘": "'", "’": "'",
  "“": '"', "”": '"', "„": '"',
  "─": "-", "│": "|", "━": "-", "═": "=", "╸": "-", "╺": "-", "✓": "ok", "✗": "x", "•": "*",
}  # fmt: skip
_CLOSED = 141  # as if SIGPIPE had ended the program


def prepare() -> None:
  """Lets characters that a stream's encoding lacks be written as others, and streams that are closed take anything."""
  codecs.register_error("pgolf", _substitute)
  for name in ("stdout", "stderr"):
    stream = getattr(sys, name)
    if stream is None:
      setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    elif hasattr(stream, "reconfigure") and not (stream.encoding or "").lower().startswith("utf"):
      stream.reconfigure(errors="pgolf")


def _substitute(error: UnicodeError) -> tuple[str, int]:
  """The nearest characters of ASCII; a question mark where there are none."""
  if not isinstance(error, UnicodeEncodeError):
    raise error
  text = ""
  for character in error.object[error.start : error.end]:
    near = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    text += _PLAIN.get(character) or near or "?"
  return text, error.end


def close() -> int:
  """Writes nothing more to standard output, whose reader has gone; returns the exit status."""
  with open(os.devnull, "w") as nowhere:
    os.dup2(nowhere.fileno(), sys.stdout.fileno())
  return _CLOSED
