"""What a run was made with: versions of the packages that decide its numbers, and the commit of the source."""

import functools
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import pgolf_jax

PACKAGES = ("pgolf_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def installed(package: str) -> str | None:
  """Returns the version of an installed package; None for one that is not."""
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return None


@functools.cache
def versions() -> dict[str, str]:
  """Returns package → version, Python's last; a package that is not installed has none."""
  # pgolf_jax itself has none where it is run from its source tree.
  known = {name: version for name in PACKAGES if (version := installed(name)) is not None}
  return known | {"python": platform.python_version()}


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
