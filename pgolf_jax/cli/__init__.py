"""The program `pgolf`: one module a verb, imported only when its verb is called.

A verb's module has `COMMANDS`: name → function, or "" → function for a verb that is one command. A function's
parameters are the command's options and its docstring is the command's help. Where options have defaults that come
from a file, the function is wrapped in `settings.arguments.Defaults`.
"""

import difflib
import importlib
import sys

import tyro

from pgolf_jax.errors import UserError
from pgolf_jax.settings.arguments import Defaults, schedules

VERBS = {
  "run": "train, score, quantise, score with test-time training, audit: every stage, in one run folder",
  "data": "prepare, download, inspect, verify the text",
  "train": "train a model in a run folder",
  "quantize": "quantise the averaged weights of a run into an artifact",
  "eval": "score a run or a bare artifact, with or without test-time training",
  "audit": "prove or refute the rules on a run",
  "package": "build and check a submission folder",
  "parity": "run and check golden cases of the PyTorch reference",
  "bench": "time kernels, steps and stages",
  "plan": "compile the steps for hardware that is not there",
  "generate": "text from an artifact",
}


def main(argv: list[str] | None = None) -> int:
  """Runs one verb. Exit status 0 on success, 1 on a failed check or error, 2 on unusable arguments, 130 on Ctrl-C."""
  args = list(sys.argv[1:] if argv is None else argv)
  debug = "--debug" in args
  args = [a for a in args if a != "--debug"]
  if not args or args[0] in ("-h", "--help"):
    print(_usage("pgolf VERB …    (pgolf VERB --help tells more; --debug shows tracebacks)", VERBS))
    print("\nExample: pgolf run configs/demo.toml")
    return 0 if args else 2
  verb, *rest = args
  if verb not in VERBS:
    return _fail(_unknown("verb", verb, VERBS), 2)
  try:
    return _call(verb, importlib.import_module(f"pgolf_jax.cli.{verb}").COMMANDS, rest)
  except UserError as e:
    if debug:
      raise
    return _fail(str(e), 1)
  except KeyboardInterrupt:
    return _fail("stopped; the same command continues where it was.", 130)
  except Exception as e:
    if debug:
      raise
    return _fail(f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else e!r} (pgolf --debug … shows where)", 1)


def _call(verb: str, commands: dict, args: list[str]) -> int:
  """Runs one command of a verb with its options read from `args`."""
  name = ""
  if "" not in commands:
    if not args or args[0] in ("-h", "--help"):
      summaries = {name: command.__doc__.strip().splitlines()[0] for name, command in commands.items()}
      print(_usage(f"pgolf {verb} WHAT …    (pgolf {verb} WHAT --help tells more)", summaries))
      return 0 if args else 2
    name, *args = args
    if name not in commands:
      return _fail(_unknown(f"pgolf {verb}", name, commands), 2)
  command, program = commands[name], f"pgolf {verb} {name}".strip()
  function = command.bound(program, args) if isinstance(command, Defaults) else command
  return tyro.cli(function, args=args, prog=program, registry=schedules) or 0


def _usage(first: str, names: dict[str, str]) -> str:
  return "\n".join([f"usage: {first}", "", *(f"  {name:<10} {what}" for name, what in names.items())])


def _unknown(what: str, given: str, valid) -> str:
  near = difflib.get_close_matches(given, list(valid), n=1)
  hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(valid)}."
  return f"unknown {what} {given!r}; {hint}"


def _fail(message: str, status: int) -> int:
  print(f"pgolf: {message}", file=sys.stderr)
  return status
