"""NVIDIA cards as their driver lists them, and compilers of NVIDIA that are known to make wrong programs."""

import dataclasses
import shutil
import subprocess
from pathlib import Path

from packaging.version import Version


@dataclasses.dataclass(frozen=True)
class Card:
  """An NVIDIA GPU as its driver reports it."""

  name: str
  driver: str
  memory: int  # bytes
  capability: float


_DRIVER = Path("/dev/nvidiactl")
_QUERY = ("--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader,nounits")
_SECONDS_OF_A_QUERY = 15


def nvidia_cards() -> list[Card] | str | None:
  """Returns the cards that nvidia-smi lists, what went wrong, or None where there is no NVIDIA driver."""
  program = shutil.which("nvidia-smi")
  if program is None:
    return f"{_DRIVER} is there, but nvidia-smi is not" if _DRIVER.exists() else None
  try:
    done = subprocess.run([program, *_QUERY], capture_output=True, text=True, timeout=_SECONDS_OF_A_QUERY)
  except subprocess.TimeoutExpired:
    return f"nvidia-smi gave no answer in {_SECONDS_OF_A_QUERY} s"
  except OSError as error:
    return f"nvidia-smi cannot be run ({error.strerror})"
  if done.returncode != 0:
    return f"nvidia-smi failed: {last_line(done.stdout + done.stderr)}"
  rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.count(",") == 3]
  try:
    return [Card(name, driver, int(mib) << 20, float(capability)) for name, driver, mib, capability in rows]
  except ValueError:
    return f"nvidia-smi gave an answer that cannot be read: {last_line(done.stdout)}"


def miscompiles(ptxas: str, *, hopper: bool) -> str:
  """Returns what a version of ptxas is known to compile wrongly; nothing for a sound one.

  Args:
    ptxas: version of the package nvidia-cuda-nvcc: 12.8.61 is CUDA 12.8.0, 12.9.41 is 12.9.0, 12.9.86 is 12.9.1.
    hopper: whether a card has compute capability 9 or newer.
  """
  release = Version(ptxas).release
  if (12, 8) <= release < (12, 9, 86):
    return f"ptxas {ptxas} is that of CUDA 12.8.0 to 12.9.0, which compile causal masks wrongly"
  if hopper and (12, 0) <= release < (12, 6, 85):
    return f"ptxas {ptxas} is older than CUDA 12.6.3 and compiles gathers wrongly on Hopper (jax-ml/jax#25091)"
  return ""


def last_line(text: str) -> str:
  """Returns the last line of a program's output that says something."""
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  return lines[-1][:300] if lines else ""
