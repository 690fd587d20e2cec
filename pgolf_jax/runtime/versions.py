"""What a run was made with: versions of the packages that decide its numbers, and the commit of the source."""

import functools
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import pgolf_jax

PACKAGES = ("pgolf_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@functools.cache
def versions() -> dict[str, str]:
  """Returns package → version, Python's last; a package that is not installed has none."""
  found = {}
  for name in PACKAGES:
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:  # such as pgolf_jax itself, run from its source tree
      continue
  return found | {"python": platform.python_version()}


@functools.cache
def commit() -> str:
  """Returns the commit of the checkout that this package is run from, "…, changed since" if so; "" for none."""
  package = Path(pgolf_jax.__file__).parent

  def git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()

  try:
    if Path(git("rev-parse", "--show-toplevel")) != package.parent.resolve():
      return ""  # installed into somebody else's checkout
    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD") + (", changed since" if changed else "")
  except (OSError, subprocess.SubprocessError):
    return ""
