"""What the program tells a person: errors that they can put right, and the outcomes of checks."""

import dataclasses
import errno
import os
import signal
from collections.abc import Mapping, Sequence

from pgolf_jax.tables import Table


class UserError(Exception):
  """Something the user can put right. The message is one sentence: what was wrong, and what to do."""


class ArtifactError(UserError):
  """An artifact that cannot be read or made; the message says what is wrong with it."""


class Stopped(Exception):
  """A run that a signal ended after its work was saved.

  Args:
    signum: the signal's number.
    where: what was saved, such as "step 120"; the same command continues after it.
  """

  def __init__(self, signum: int, where: str):
    super().__init__(f"stopped by {signal.Signals(signum).name} after {where}; the same command continues there.")
    self.status = 128 + signum


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OF_THE_SYSTEM = {
  errno.EACCES: "may not be read or written; choose another place, or change its permissions",
  errno.EPERM: "may not be changed; choose another place, or change its permissions",
  errno.EROFS: "lies on a disk that cannot be written; choose another place",
  errno.ENOENT: "does not exist, or the folder that it belongs in does not",
  errno.ENOTDIR: "leads through a file where a folder is needed; move that file, or choose another place",
  errno.EEXIST: "is a file where a folder is needed; move that file, or choose another place",
  errno.EISDIR: "is a folder where a file is needed; name a file, or move the folder",
  errno.ENAMETOOLONG: "is too long a name",
  errno.ENOTEMPTY: "is a folder that is not empty; move what is in it, or choose another place",
  errno.EIO: "cannot be read or written: the disk reports a fault",
  errno.EMFILE: "cannot be opened: this process has too many files open (ulimit -n)",
}


def no_device() -> str:
  """Returns the sentence for a device that JAX cannot find."""
  wanted = os.environ.get("JAX_PLATFORMS", "")
  asked = f"JAX_PLATFORMS={wanted} asks for a device that is not here" if wanted else "JAX finds no device"
  return (
    f"{asked}; unset JAX_PLATFORMS to take what there is, or install what the device needs "
    "(pip install 'pgolf_jax[cuda13]' or 'pgolf_jax[tpu]'); `pgolf doctor` says what is missing."
  )


def of_the_system(error: BaseException | None) -> str | None:
  """Returns the sentence for an error of the operating system or of the device; None for any other error.

  Libraries pass such errors on as others, so that causes and texts are looked at too.
  """
  while error is not None:
    number, text = getattr(error, "errno", None), str(error)
    place = getattr(error, "filename", None)
    if number in _DISK_FULL or any(os.strerror(number) in text for number in _DISK_FULL):
      where = f" for {os.fsdecode(place)}" if isinstance(place, str | bytes | os.PathLike) else ""
      return f"no room on the disk{where}; make some, and the same command continues where it was."
    if isinstance(error, OSError) and number in _OF_THE_SYSTEM and isinstance(place, str | bytes | os.PathLike):
      return f"{os.fsdecode(place)} {_OF_THE_SYSTEM[number]}."
    if isinstance(error, MemoryError) or "Out of memory" in text or text.startswith("RESOURCE_EXHAUSTED"):
      return (
        "not enough memory; let train.micro_batches be larger or ttt.batch_size smaller, or take a smaller model "
        "(`pgolf plan CONFIG` says what a config needs)."
      )
    if "nable to initialize backend" in text or "nknown backend" in text:
      return no_device()
    error = error.__cause__ or error.__context__
  return None


@dataclasses.dataclass(frozen=True)
class Check:
  """The outcome of one check."""

  name: str
  passed: bool | None  # None: neither proved nor refuted
  finding: str  # the evidence, or why nothing is proved and what would prove it


def checks_table(checks: Sequence[Check]) -> Table:
  """Returns one row per check: whether it holds, and the evidence."""
  words = {True: "holds", False: "BROKEN", None: "unproved"}
  return Table(("", "", ""), ((words[check.passed], check.name, check.finding) for check in checks))


def checks_summary(checks: Sequence[Check]) -> str:
  """Returns one line: how many checks hold, which are broken, and how many are not proved."""
  broken = [check.name for check in checks if check.passed is False]
  unproved = sum(check.passed is None for check in checks)
  parts = [f"{len(checks) - len(broken) - unproved} of {len(checks)} checks hold"]
  if broken:
    parts.append(f"broken: {', '.join(broken)}")
  if unproved:
    parts.append(f"{unproved} not proved")
  return "; ".join(parts)


def shown(value: object) -> str:
  """Returns what a value looks like in a message: its beginning, on one line, without Python's quotes."""
  if isinstance(value, bool):
    return str(value).lower()
  if value is None:
    return "nothing"
  if isinstance(value, Mapping | list | tuple | set):
    return "a table" if isinstance(value, Mapping) else "a list"
  try:
    text = str(value)
  except ValueError:  # a whole number of thousands of digits
    return "a number too long to show"
  text = "".join(c if c.isprintable() else " " for c in text[:101])
  if isinstance(value, str) and (not text.strip() or " " in text):
    return f'"{text[:100]}…"' if len(text) > 100 else f'"{text}"'
  return text if len(text) <= 100 else f"{text[:100]}…"
