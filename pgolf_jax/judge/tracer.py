"""Runs an evaluator and reports what it loads: python -I -S tracer.py PACKAGES PIPE evaluate.py ARGS…

Python calls an audit hook at each import, at each file that is opened, moved or made, and before it starts a program,
loads a library or connects somewhere; a hook cannot be taken out again. Each call is sent down a pipe at once, so that
what has been told cannot be taken back. Connections are refused.

The evaluator runs in the same process. What the hook calls is bound before the evaluator starts, so that functions put
in the place of those of `os` do not reach it, and another file in the place of the pipe ends the process. Whoever
replaces Python's builtins, or reaches into this module through frames or the garbage collector, can still deceive it.
"""

import importlib.util
import os
import posixpath
import resource
import runpy
import stat
import sys
from _json import encode_basestring_ascii
from collections.abc import Callable
from types import MappingProxyType, SimpleNamespace

STARTED = frozenset({"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn"})
REFUSED = frozenset({"socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo"})
OTHERS = frozenset({"import", "ctypes.dlopen", "cpython.PyInterpreterState_New"})  # another interpreter has no hook

_BOTH, _FIRST = (0, 1), (0,)
CHANGED = MappingProxyType(
  {"os.rename": _BOTH, "os.link": _BOTH, "os.symlink": (1,)}
  | dict.fromkeys(("os.mkdir", "os.rmdir", "os.remove", "os.truncate", "os.chmod", "os.chown", "os.utime"), _FIRST)
)
"""Event → which of its arguments are paths that it changes."""

LARGEST_FILE = 4 << 30  # bytes; what an evaluator prints is a file too
CUT_OFF = 71  # exit status where the pipe is another file


def _private(module, **replaced):
  """Returns a copy of a module that has names of its own."""
  spec = importlib.util.find_spec(module.__name__)
  copy = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(copy)
  vars(copy).update(replaced)
  return copy


def watch(pipe: int) -> None:
  """Adds the hook."""
  own = SimpleNamespace(**vars(os))
  real_path = _private(posixpath, os=own, stat=SimpleNamespace(**vars(stat))).realpath
  names, tools = (STARTED, REFUSED, OTHERS, CHANGED), (own, encode_basestring_ascii, real_path, pipe, os.fstat(pipe))
  sys.addaudithook(_hook(names, tools))


def _hook(names: tuple, tools: tuple) -> Callable[[str, tuple], None]:
  def report(event: str, arguments: tuple) -> None:
    started, refused, others, changed = names
    own, quoted, real_path, pipe, opened = tools
    if event == "open":
      if isinstance(arguments[0], int):
        return
      path, mode, flags = real_path(_text(arguments[0])), arguments[1], arguments[2]
      lines = [(event, path, "d" if _is_folder(own, path) else mode, flags)]
    elif event in changed:
      paths = [arguments[at] for at in changed[event] if not isinstance(arguments[at], int)]
      lines = [("open", real_path(_text(path)), "w", 0) for path in paths]
    elif event == "subprocess.Popen":
      lines = [(event, real_path(_program(own, _text(arguments[0]), *arguments[2:4])))]
    elif event in started or event in refused or event in others:
      lines = [(event, _text(arguments[0]) if arguments else event)]
    else:
      return
    if own.fstat(pipe)[1:3] != opened[1:3]:  # inode and device
      own._exit(CUT_OFF)
    for line in lines:
      values = ["null" if x is None else f"{x:d}" if isinstance(x, int) else quoted(f"{x}") for x in line]
      own.write(pipe, f"[{', '.join(values)}]\n".encode())
    if event in refused:
      raise PermissionError(f"the judge allows no network ({event})")

  return report


def _text(value: object) -> str:
  return value.decode(errors="replace") if isinstance(value, bytes) else f"{value}"


def _is_folder(own: SimpleNamespace, path: str) -> bool:
  try:
    return own.stat(path).st_mode & 0o170000 == 0o040000
  except (OSError, ValueError):
    return False


def _program(own: SimpleNamespace, name: str, cwd: object, environ: dict | None) -> str:
  """Returns where the program lies that a name stands for."""
  if "/" in name:
    return f"{_text(cwd)}/{name}" if cwd and name[0] != "/" else name
  folders = (own.environ if environ is None else environ).get("PATH", own.defpath).split(":")
  return next((f"{folder}/{name}" for folder in folders if own.access(f"{folder}/{name}", own.X_OK)), name)


def main(packages: str, pipe: int, script: str, args: list[str]) -> None:
  """Runs the script as a program of its own."""
  resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
  sys.path.append(packages)
  sys.argv = [script, *args]
  watch(pipe)
  runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:])
