"""The program `pgolf`: a few modules of verbs, each imported only when one of its verbs is called.

A module has `COMMANDS`: verb → name → function; the name is "" for a verb that is one command. A function's parameters
are the command's options and its docstring is the command's help. Where options have defaults that come from a file,
the function is wrapped in `settings.arguments.Defaults`.
"""

import difflib
import errno
import importlib
import os
import sys
from collections.abc import Callable

from pgolf_jax import __version__
from pgolf_jax.errors import Stopped, UserError
from pgolf_jax.runtime import signals
from pgolf_jax.settings import reference
from pgolf_jax.settings.arguments import Defaults, Unusable, call

VERBS = {
  "run": "train, score, quantise, score with test-time training, audit: every stage, in one run folder",
  "data": "prepare, download, inspect, verify the text",
  "train": "train a model in a run folder",
  "quantize": "quantise the averaged weights of a run into an artifact",
  "eval": "score a run or a bare artifact, with or without test-time training",
  "audit": "prove or refute the rules on a run",
  "package": "build and check a submission folder",
  "judge": "score a submission folder as an organiser would, and say what is proved",
  "runs": "a table of runs",
  "parity": "run and check golden cases of the PyTorch reference",
  "convert": "weights from and to PyTorch, safetensors and Orbax",
  "bench": "time kernels, steps and stages",
  "plan": "compile the steps for hardware that is not there",
  "generate": "text from an artifact",
  "doctor": "what is here, what is missing, and the command that mends it",
  "configs": "the configs that come with the program, with hardware, time and score",
}
_MODULES = {
  "run": ("run", "train", "plan"),
  "data": ("data",),
  "artifact": ("quantize", "package", "generate"),
  "proof": ("eval", "audit", "judge"),
  "runs": ("runs",),
  "parity": ("parity",),
  "convert": ("convert",),
  "bench": ("bench",),
  "doctor": ("doctor",),
  "configs": ("configs",),
}


def commands(verb: str) -> dict[str, Callable | Defaults]:
  """Returns a verb's commands by name; "" is the name of the only one of a verb that is one command."""
  module = next(module for module, verbs in _MODULES.items() if verb in verbs)
  return importlib.import_module(f"pgolf_jax.cli.{module}").COMMANDS[verb]


def main(argv: list[str] | None = None) -> int:
  """Runs one verb and returns the exit status.

  It is 0 on success, 1 on a failed check or error, 2 on unusable arguments, 128 + a signal's number if one ended it.
  """
  args = list(sys.argv[1:] if argv is None else argv)
  debug = "--debug" in args
  args = [a for a in args if a != "--debug"]
  if not args or args[0] in ("-h", "--help"):
    print(_usage("pgolf VERB …    (pgolf VERB --help tells more; --debug shows tracebacks)", VERBS))
    print("\nExample: pgolf run demo")
    return 0 if args else 2
  if args[0] == "help":
    if args[1:2] == ["settings"]:
      print(reference.page() if "--markdown" in args else reference.table(), end="")
      return 0
    args = [*args[1:], "--help"] if args[1:] else ["--help"]
    return main(args)
  if args[0] == "--version":
    print(f"pgolf_jax {__version__}")
    return 0
  verb, *rest = args
  if verb not in VERBS:
    return _fail(_unknown("verb", verb, VERBS), 2)
  try:
    with signals.ending_signals():
      return _call(verb, commands(verb), rest)
  except UserError as e:
    if debug:
      raise
    return _fail(str(e), 2 if isinstance(e, Unusable) else 1)
  except Stopped as e:
    return _fail(str(e), e.status)
  except KeyboardInterrupt as e:
    return _fail("stopped; the same command continues where it was.", getattr(e, "status", 130))
  except Exception as e:
    if debug:
      raise
    if full := disk_full(e):
      return _fail(full, 1)
    return _fail(f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else e!r} (pgolf --debug … shows where)", 1)


def _call(verb: str, choices: dict, args: list[str]) -> int:
  """Runs one command of a verb with its options read from `args`."""
  name = ""
  if "" not in choices:
    if not args or args[0] in ("-h", "--help"):
      summaries = {name: command.__doc__.strip().splitlines()[0] for name, command in choices.items()}
      print(_usage(f"pgolf {verb} WHAT …    (pgolf {verb} WHAT --help tells more)", summaries))
      return 0 if args else 2
    name, *args = args
    if name not in choices:
      return _fail(_unknown(f"pgolf {verb}", name, choices), 2)
  return call(f"pgolf {verb} {name}".strip(), choices[name], args) or 0


def disk_full(error: BaseException | None) -> str | None:
  """Returns the sentence for an error that comes from a full disk; None for any other."""
  while error is not None:
    number, text = getattr(error, "errno", None), str(error)
    if number in _DISK_FULL or any(os.strerror(number) in text for number in _DISK_FULL):
      place = f" for {error.filename}" if getattr(error, "filename", None) else ""
      return f"no room on the disk{place}; make some, and the same command continues where it was."
    error = error.__cause__ or error.__context__
  return None


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _usage(first: str, names: dict[str, str]) -> str:
  return "\n".join([f"usage: {first}", "", *(f"  {name:<10} {what}" for name, what in names.items())])


def _unknown(what: str, given: str, valid) -> str:
  near = difflib.get_close_matches(given, list(valid), n=1)
  hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(valid)}."
  return f"unknown {what} {given!r}; {hint}"


def _fail(message: str, status: int) -> int:
  print(f"pgolf: {message}", file=sys.stderr)
  return status
