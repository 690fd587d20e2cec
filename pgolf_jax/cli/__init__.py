"""The program `pgolf`: one module a verb, imported only when its verb is called."""

import importlib
import sys

VERBS = {
  "run": "train → score → quantise → artifact → TTT → audit → report, in one run folder",
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


def _usage() -> str:
  lines = [f"  {verb:<10} {what}" for verb, what in VERBS.items()]
  return "\n".join(
    [
      "usage: pgolf VERB …    (pgolf VERB --help tells more; --debug shows tracebacks)",
      "",
      *lines,
      "",
      "Example: pgolf run configs/demo.toml",
    ]
  )


def main(argv: list[str] | None = None) -> int:
  """Runs one verb. Exit status 0 on success, 1 on a failed check or error, 2 on unusable arguments, 130 on Ctrl-C."""
  args = list(sys.argv[1:] if argv is None else argv)
  debug = "--debug" in args
  args = [a for a in args if a != "--debug"]
  if not args or args[0] in ("-h", "--help"):
    print(_usage())
    return 0 if args else 2
  verb, *rest = args
  if verb not in VERBS:
    return _fail(_nearest("verb", verb, VERBS), 2)
  from pgolf_jax.errors import UserError

  try:
    module = importlib.import_module(f"pgolf_jax.cli.{verb}")
    if hasattr(module, "main"):
      return module.main(rest) or 0
    return _call(module, verb, rest)
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


def _call(module, verb: str, args: list[str]) -> int:
  import tyro

  if not hasattr(module, "COMMANDS"):
    return tyro.cli(module.COMMAND, args=args, prog=f"pgolf {verb}") or 0
  commands = module.COMMANDS
  if not args or args[0] in ("-h", "--help"):
    about = {name: getattr(f, "DESCRIPTION", None) or f.__doc__ or "" for name, f in commands.items()}
    lines = [f"  {name:<10} {text.strip().splitlines()[0]}" for name, text in about.items()]
    print("\n".join([f"usage: pgolf {verb} WHAT …    (pgolf {verb} WHAT --help tells more)", "", *lines]))
    return 0 if args else 2
  if args[0] not in commands:
    return _fail(_nearest(f"pgolf {verb}", args[0], commands), 2)
  command = commands[args[0]]
  if hasattr(command, "main"):
    return command.main(args[1:]) or 0
  return tyro.cli(command, args=args[1:], prog=f"pgolf {verb} {args[0]}") or 0


def _nearest(what: str, given: str, valid) -> str:
  import difflib

  near = difflib.get_close_matches(given, list(valid), n=1)
  hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(valid)}."
  return f"unknown {what} {given!r}; {hint}"


def _fail(message: str, status: int) -> int:
  print(f"pgolf: {message}", file=sys.stderr)
  return status
