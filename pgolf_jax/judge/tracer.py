"""Runs an evaluator and reports what it loads: python -I -S tracer.py PACKAGES PIPE evaluate.py ARGS…

Python calls an audit hook at each import, at each file that is opened, and before it starts a program, loads a library
or connects somewhere; a hook cannot be taken out again. Each call is sent down a pipe at once, so that what has been
told cannot be taken back. Connections are refused.
"""

import json
import os
import resource
import runpy
import sys

REPORTED = {"open", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "ctypes.dlopen"}
REFUSED = {"socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo"}

LARGEST_FILE = 4 << 30  # bytes; what an evaluator prints is a file too


def main(packages: str, pipe: int, script: str, args: list[str]) -> None:
  """Runs the script as a program of its own."""
  inside = False

  def report(event: str, arguments: tuple) -> None:
    nonlocal inside
    if inside or event not in REPORTED | REFUSED | {"import"}:
      return
    inside = True
    try:
      if event == "import":
        values = [arguments[0]]
      elif event == "open" and isinstance(arguments[0], int):
        return
      elif event == "open":
        values = [os.path.realpath(os.fsdecode(arguments[0])), arguments[1], arguments[2]]
      else:
        values = [os.fsdecode(x) if isinstance(x, bytes) else str(x) for x in arguments[:1]]
      os.write(pipe, (json.dumps([event, *values]) + "\n").encode(errors="replace"))
    finally:
      inside = False
    if event in REFUSED:
      raise PermissionError(f"the judge allows no network ({event})")

  resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
  sys.path.append(packages)
  sys.argv = [script, *args]
  sys.addaudithook(report)
  runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:])
