"""Memory of a process that computes on a CPU: how the C library gives it, how much the process holds. And its cores.

XLA asks for the temporaries of a program, hundreds of megabytes, anew at every call. By default glibc takes them from
the kernel and gives them back each time, and the kernel clears them in pages of 4 KiB: a sixth of a training step.
"""

import os
import resource
import sys
from collections.abc import Callable, MutableMapping
from pathlib import Path

TUNABLES = {
  "glibc.malloc.hugetlb": 1,  # pages of 2 MiB, where the kernel has them
  "glibc.malloc.mmap_threshold": 8 << 30,  # no mapping of its own for an array up to this size
  "glibc.malloc.trim_threshold": 8 << 30,  # nothing given back below this size
}
"""glibc's names and values; see its manual, Memory Allocation Tunables."""


def use_huge_pages(
  environ: MutableMapping[str, str] = os.environ,
  start_again: Callable = os.execve,
  *,
  kernel: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled"),
  driver: Path = Path("/dev/nvidiactl"),
) -> None:
  """Starts this process again with `TUNABLES`, which glibc reads only once, when a process begins.

  It does nothing where they are set already or would not help: without glibc or huge pages, and beside a GPU.
  """
  given = environ.get("GLIBC_TUNABLES", "")
  if "glibc.malloc." in given or driver.exists() or not _is_glibc():
    return
  if not kernel.exists() or "[never]" in kernel.read_text():
    return
  ours = ":".join(f"{name}={value}" for name, value in TUNABLES.items())
  environ["GLIBC_TUNABLES"] = f"{given}:{ours}" if given else ours
  start_again(sys.executable, sys.orig_argv, dict(environ))


def process_bytes(field: str) -> int:
  """Returns a line of this process's status on Linux, in bytes: VmRSS, what it holds, or VmHWM, the most it held.

  Raises:
    OSError: the system does not say.
  """
  for line in Path("/proc/self/status").read_text().splitlines():
    if line.startswith(f"{field}:"):
      return int(line.split()[1]) * 1024
  raise OSError(f"/proc/self/status has no {field}")


def peak_bytes() -> int:
  """Returns the most bytes that this process held so far."""
  try:
    return process_bytes("VmHWM")  # getrusage would count the process that started this one, where that was larger
  except OSError:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cores() -> int:
  """Returns how many cores this process may use; where the system does not say, as on macOS, how many there are."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_glibc() -> bool:
  try:
    return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
  except (AttributeError, ValueError):  # Windows has no confstr, and other C libraries do not know the name
    return False
