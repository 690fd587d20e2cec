"""The program `pgolf`: a few modules of verbs, each imported only when one of its verbs is called.

A module has `COMMANDS`: verb → name → function; the name is "" for a verb that is one command. A function's parameters
are the command's options and its docstring is the command's help. Where options have defaults that come from a file,
the function is wrapped in `settings.arguments.Defaults`.
"""

import contextlib
import difflib
import importlib
import os
import sys
from collections.abc import Callable

from pgolf_jax import __version__
from pgolf_jax.errors import Stopped, UserError, of_the_system, shown
from pgolf_jax.runtime import log, memory, signals, streams
from pgolf_jax.settings import reference
from pgolf_jax.settings.arguments import Defaults, Unusable, call
from pgolf_jax.tables import Table

VERBS = {
  "run": "train, score, quantise, score with test-time training, audit: every stage, in one run folder",
  "data": "prepare, download, inspect, verify the text",
  "train": "train a model in a run folder",
  "quantize": "quantise the averaged weights of a run into an artifact",
  "eval": "score a run or a bare artifact, with or without test-time training",
  "audit": "prove or refute the rules on a run",
  "report": "a page with figures of one run, or of several side by side",
  "package": "build and check a submission folder",
  "judge": "score a submission folder as an organiser would, and say what is proved",
  "runs": "a table of runs",
  "parity": "golden cases of the PyTorch reference, and two runs side by side",
  "convert": "weights from and to PyTorch, safetensors and Orbax",
  "bench": "time kernels, steps and stages; what quantising costs",
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
  "parity": ("parity", "convert"),
  "report": ("report",),
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

  It is 0 on success, 1 on a failed check or error, 2 on words that are no command, 128 + a signal's number if one
  ended it.
  """
  if argv is None and sys.argv[1:2] and sys.argv[1] in _COMPUTING:
    memory.use_huge_pages()
  streams.prepare()
  args = list(sys.argv[1:] if argv is None else argv)
  debug = "--debug" in args
  try:
    status = _run([word for word in args if word != "--debug"])
    sys.stdout.flush()
    return status
  except BrokenPipeError as e:
    if e.filename is not None:
      return _fail(str(of_the_system(e) or e), 1)
    return streams.close()  # the reader of a pipe has seen enough
  except UserError as e:
    if debug:
      raise
    return _fail(str(e), 2 if isinstance(e, Unusable) else 1)
  except Stopped as e:
    return _fail(str(e), e.status)
  except KeyboardInterrupt as e:
    goes_on = _AFTER_A_STOP.get(args[0], "nothing is kept, so that the same command begins anew")
    return _fail(f"stopped; {goes_on}.", getattr(e, "status", 130))
  except Exception as e:
    if debug:
      raise
    if known := of_the_system(e):
      return _fail(known, 1)
    text = (str(e).strip() or type(e).__name__).splitlines()[0]
    return _fail(f"unexpected fault: {text} (the same command with --debug shows where; please report it)", 1)
  finally:
    log.started()


_COMPUTING = ("run", "train", "quantize", "eval", "audit", "judge", "parity", "bench", "generate")
"""Verbs that run the model."""
_AFTER_A_STOP = {
  "run": "the same command continues after what was saved last",
  "train": "the same command continues after what was saved last",
  "data": "the same command continues where it was",
}


def _run(args: list[str]) -> int:
  if not args or args[0] in ("-h", "--help"):
    print(_usage("pgolf VERB …    (pgolf VERB --help tells more; --debug shows tracebacks)", VERBS))
    print("\nExample: pgolf run demo")
    return 0 if args else 2
  if args[0] == "--version":
    print(f"pgolf_jax {__version__}")
    return 0
  if args[:2] == ["help", "settings"]:
    print(reference.page() if "--markdown" in args else reference.table(), end="")
    return 0
  if args[0] == "help":
    return _run([*args[1:], "--help"])
  verb, *rest = args
  if verb not in VERBS:
    raise Unusable(f"there is no verb {shown(verb)}; {_choose(verb, VERBS)}")
  _refuse_switches(verb)
  with signals.ending_signals(), log.to_stderr():
    log.starting()
    return _call(verb, commands(verb), rest)


_SWITCHES = {"QUANTIZE_ONLY": "quantize", "PREQUANT_ONLY": "train", "TTT_EVAL_ONLY": "eval"}
"""Variables by which the PyTorch script leaves stages out → the verb that does what is left."""


def _refuse_switches(verb: str) -> None:
  """Raises UserError if the environment asks for some stages alone, and the verb would do others."""
  for name, instead in _SWITCHES.items():
    if os.environ.get(name, "").strip() not in ("", "0") and verb != instead:
      subject = "CONFIG" if instead == "train" else "RUN"
      raise UserError(
        f"{name}={shown(os.environ[name])} asks for one stage alone, which is `pgolf {instead} {subject}` here; "
        f"run that, or unset {name}."
      )


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
      raise Unusable(f"pgolf {verb} has no {shown(name)}; {_choose(name, choices)}")
  return call(f"pgolf {verb} {name}".strip(), choices[name], args) or 0


def _usage(first: str, names: dict[str, str]) -> str:
  return f"usage: {first}\n\n{Table(('', ''), ((f'  {name}', what) for name, what in names.items()))}"


def _choose(given: str, valid) -> str:
  near = difflib.get_close_matches(given, list(valid), n=1)
  return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(valid)}."


def _fail(message: str, status: int) -> int:
  log.started()
  message = message if message.endswith((".", "?", "!", ")")) else f"{message}."
  with contextlib.suppress(OSError):
    print(f"pgolf: {message}", file=sys.stderr)
  return status
