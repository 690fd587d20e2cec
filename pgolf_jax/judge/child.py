"""A submission's evaluator in a process of its own: what it can import, what it gets, and what it is seen to do.

It runs in a fresh folder that holds the counted files and the validation shards, with the standard library and the
packages that the submission declares and no others, without a network where the system allows that, under a clock
outside of it.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pgolf_jax.data.shards import ValidationData, shard_path, write_shard
from pgolf_jax.errors import UserError
from pgolf_jax.judge import tracer
from pgolf_jax.runtime.files import parse_json
from pgolf_jax.runtime.log import progress
from pgolf_jax.submission import bundle

COUNTED = ("artifact.pgolf", "code.tar.xz", "evaluate.py")
"""The files of a submission whose bytes count; the evaluator gets no others."""

_COMPILERS = {"cc", "gcc", "clang", "ptxas", "nvlink", "nvidia-smi", "ldconfig"}
_ACCELERATOR_PARTS = re.compile(r"(jax-cuda|jax-rocm|nvidia-|libtpu)")  # what JAX loads of its own accord
_SYSTEM = ("/usr", "/lib", "/lib64", "/etc", "/proc", "/sys", "/dev", "/bin", "/opt")
_SHARED = ("/dev/shm", "/dev/mqueue")  # memory that outlives a process
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_LONGEST_EVENT, _MOST_EVENTS = 1 << 16, 1 << 20  # characters, events; an evaluation tells of some thousands
_TAIL = 1 << 16  # bytes of what an evaluator prints that are looked at


@dataclasses.dataclass(frozen=True)
class Ran:
  """What came of one run of an evaluator."""

  folder: Path  # with the scores
  seconds: float  # of the whole process, by the clock outside
  fault: str | None  # why it did not end well
  figures: dict | None  # what it printed
  outside: list[str]  # files and programs that it had no business with
  network: list[str]  # connections that it tried
  modules: int  # imported
  packages: list[str]  # of them that are neither of the standard library nor its own


def without_network() -> tuple[list[str], str]:
  """Returns (what stands before a command that is to run without a network, how that is done in words)."""
  alone = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
  for command, how in (
    (alone, "in a network and a process namespace of its own"),
    (alone[:3], "in a network namespace of its own"),
  ):
    with contextlib.suppress(OSError):
      if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
        return command, how
  return [], "refused by a hook inside the process alone; this system gives no namespace"


class Packages:
  """A folder with the packages that a submission may import, and nothing else: those that it declares.

  Args:
    requirements: the submission's requirements.txt.
    folder: made here.

  Raises:
    UserError: it cannot be read, or asks for a package that the evaluator of this program does not need, or that is not
      installed.
  """

  def __init__(self, requirements: Path, folder: Path):
    try:
      lines = requirements.read_text(encoding="utf-8").splitlines() if requirements.is_file() else []
    except (OSError, ValueError) as error:
      raise UserError(f"{requirements} cannot be read ({error}); it is a text of one package a line.") from error
    names = {_canonical(line) for line in lines if line.strip() and not line.startswith("#")}
    allowed = {_canonical(line) for line in bundle.requirements(bundle.needed_modules())}
    if names - allowed:
      raise UserError(f"requirements.txt asks for {min(names - allowed)}, which evaluation has no need of.")
    installed = {_canonical(d.metadata["Name"]): d for d in importlib.metadata.distributions() if d.metadata["Name"]}
    if names - installed.keys():
      raise UserError(f"{min(names - installed.keys())} is not installed here; install the submission's requirements.")
    waiting, self.names = list(names), set()
    if "jax" in names:
      waiting += [name for name in installed if _ACCELERATOR_PARTS.match(name)]
    while waiting:
      name = waiting.pop()
      if name in self.names or name not in installed:
        continue
      self.names.add(name)
      waiting += [_canonical(line) for line in installed[name].requires or () if "extra ==" not in line]
    self.folder, self.sources = folder, {}
    folder.mkdir()
    for name in sorted(self.names):
      for file in installed[name].files or ():
        top = file.parts[0]
        source = Path(installed[name].locate_file(top)).resolve()
        if top != ".." and top != "__pycache__" and not top.endswith(".pth") and top not in self.sources:
          self.sources[top] = source
          (folder / top).symlink_to(source)

  def of_module(self, module: str) -> bool:
    """Whether a module is one of a package here."""
    top = module.split(".")[0]
    return any(name.split(".")[0] == top for name in self.sources)


def _canonical(requirement: str) -> str:
  return re.sub(r"[-_.]+", "-", re.match(r"\s*([\w.-]*)", requirement)[1]).lower()


@dataclasses.dataclass(frozen=True)
class Children:
  """Starts a submission's evaluator, each time in a fresh folder.

  Args:
    submission: its folder.
    work: a folder of the judge.
    packages: that it may import.
    wall_seconds: the longest that a run may take.
    cache: compiled programs to start with.
  """

  submission: Path
  work: Path
  packages: Packages
  wall_seconds: float
  cache: Path | None = None

  def run(self, data: ValidationData, *, sample: np.ndarray | None = None) -> Ran:
    """Scores a stream.

    Args:
      data: the stream.
      sample: targets whose whole distributions are asked for.
    """
    # The same name each time, so that a run cannot be told from a replay, and what compiles is found compiled.
    folder = self.work / "run"
    for name in ("submission", "data", "scores", "tmp", "cache"):
      (folder / name).mkdir(parents=True)
    for name in COUNTED:
      shutil.copyfile(self.submission / name, folder / "submission" / name)
    write_shard(shard_path(folder / "data", "val", 0), data.tokens)
    write_shard(shard_path(folder / "data", "val_bytes", 0), data.token_bytes)
    if self.cache is not None:
      shutil.copytree(self.cache, folder / "cache", dirs_exist_ok=True)
    args = ["--data", folder / "data", "--ttt", "--scores", folder / "scores"]
    if sample is not None:
      np.save(folder / "data" / "sample.npy", sample)
      args += ["--sample", folder / "data" / "sample.npy"]
    with progress("scoring the submission in a process of its own"):
      ran = self._watched(folder, [str(x) for x in (folder / "submission" / "evaluate.py", *args)])
    _remove_special_files(folder)
    finished = self.work / f"ran-{secrets.token_hex(8)}"
    folder.rename(finished)
    return dataclasses.replace(ran, folder=finished)

  def _watched(self, folder: Path, script_and_args: list[str]) -> Ran:
    reader, writer = os.pipe()
    events: list[list] = []
    listener = threading.Thread(target=lambda: events.extend(_events(reader)), daemon=True)
    command = [*_namespace()[0], sys.executable, "-I", "-S", "-B", tracer.__file__, str(self.packages.folder)]
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
      began = time.monotonic()
      process = subprocess.Popen(
        [*command, str(writer), *script_and_args],
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        cwd=folder,
        env=_environment(folder),
        pass_fds=[writer],
        start_new_session=True,
      )
      os.close(writer)
      listener.start()
      is_late = False
      try:
        process.wait(self.wall_seconds)
      except subprocess.TimeoutExpired:
        is_late = True
      finally:
        with contextlib.suppress(ProcessLookupError):
          os.killpg(process.pid, signal.SIGKILL)
        process.wait()
      seconds = time.monotonic() - began
    listener.join(10)
    fault = None
    if is_late:
      fault = f"it was stopped after {seconds:.0f} s"
    elif process.returncode == tracer.CUT_OFF:
      fault = "the trace cut off: another file in the place of its pipe"
    elif process.returncode:
      fault = f"exit status {process.returncode}: {_last_line(folder / 'stderr')}"
    return Ran(folder, seconds, fault, _figures(folder / "stdout"), *self._seen(events, folder))

  def _seen(self, events: Sequence[list], folder: Path) -> tuple[list[str], list[str], int, list[str]]:
    outside, network, modules = [], [], set()
    for event, *values in events:
      if event == "import":
        modules.add(str(values[0]))
      elif event in tracer.REFUSED:
        network.append(event)
      elif event == "open":
        path, mode, flags = values
        writes = bool(flags & _WRITES) if isinstance(flags, int) and flags else bool(set(str(mode)) & set("wax+"))
        # Other paths may count from a folder that is open.
        is_outside = mode == "d" and not Path(path).is_relative_to(folder.resolve())
        if is_outside or not self._may_open(str(path), folder, writes=writes):
          outside.append(f"{'writes' if writes else 'reads'} {path}")
      elif event == "ctypes.dlopen":
        path = os.path.realpath(values[0])
        if values[0] not in ("None", "") and "/" in values[0] and not self._may_open(path, folder, writes=False):
          outside.append(f"loads the library {path}")
      elif not self._may_start(values[0]):
        outside.append(f"starts {values[0]}")
    tops = {module.split(".")[0] for module in modules}
    packages = sorted(top for top in tops if top not in sys.stdlib_module_names and self.packages.of_module(top))
    return list(dict.fromkeys(outside)), network, len(modules), packages

  def _may_start(self, program: str) -> bool:
    is_of_package = any(Path(program).is_relative_to(source) for source in self.packages.sources.values())
    return program in _compilers() or (is_of_package and Path(program).name in _COMPILERS)

  def _may_open(self, path: str, folder: Path, *, writes: bool) -> bool:
    if path == "/dev/null" or Path(path).is_relative_to(folder.resolve()):
      return True
    if any(Path(path).is_relative_to(place) for place in _SHARED):
      return False
    if writes:
      return path.startswith("/dev/")  # an accelerator's
    if any(Path(path).is_relative_to(source) for source in self.packages.sources.values()):
      return True
    python = os.path.realpath(sys.base_prefix)
    places = (*_SYSTEM, f"{python}/lib", f"{python}/include", self.packages.folder.resolve(), Path(tracer.__file__))
    return "site-packages" not in path and any(Path(path).is_relative_to(place) for place in places)


def _remove_special_files(folder: Path) -> None:
  """Leaves files and folders alone: a pipe or a link that an evaluator made would hold up or mislead who reads it."""
  for parent, folders, files in os.walk(folder):
    for path in (Path(parent, name) for name in (*folders, *files)):
      if path.is_symlink() or not (path.is_file() or path.is_dir()):
        path.unlink()


@functools.cache
def _compilers() -> set[str]:
  """Where the compilers of this machine lie."""
  path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/sbin", "/usr/sbin"])
  return {os.path.realpath(place) for name in _COMPILERS if (place := shutil.which(name, path=path))}


@functools.cache
def _namespace() -> tuple[list[str], str]:
  return without_network()


def network_isolation() -> str:
  """How the network is kept off, in words."""
  return _namespace()[1]


def _environment(folder: Path) -> dict[str, str]:
  """What the evaluator sees of the environment: what accelerators need, and folders of its own."""
  taken = {k: v for k, v in os.environ.items() if k in ("PATH", "LD_LIBRARY_PATH", "XLA_FLAGS", "CC")}
  taken |= {k: v for k, v in os.environ.items() if k.startswith(("CUDA", "NVIDIA", "TPU", "JAX_PLATFORMS"))}
  folders = {"HOME": folder / "tmp", "TMPDIR": folder / "tmp", "JAX_COMPILATION_CACHE_DIR": folder / "cache"}
  every = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
  }
  return {**taken, **{k: str(v) for k, v in folders.items()}, **every}


def _events(reader: int) -> Iterator[list]:
  """What comes down the pipe; a line of another form is an event too: the evaluator itself has written there."""
  with os.fdopen(reader, "r", errors="replace") as lines:
    for count, line in enumerate(iter(lambda: lines.readline(_LONGEST_EVENT), "")):
      if count > _MOST_EVENTS:
        continue  # read, so that the process is not held up, and not kept
      try:
        event = json.loads(line)
        is_event = isinstance(event, list) and all(isinstance(x, str | int | None) for x in event)
      except (ValueError, RecursionError):
        is_event = False
      is_event = is_event and len(event) == (4 if event[:1] == ["open"] else 2) and isinstance(event[1], str)
      yield event if is_event and count < _MOST_EVENTS else ["os.exec", "something that writes into the trace"]


def _tail(path: Path) -> list[str]:
  with path.open("rb") as file:
    file.seek(max(path.stat().st_size - _TAIL, 0))
    return file.read(_TAIL).decode(errors="replace").strip().splitlines()


def _last_line(path: Path) -> str:
  lines = _tail(path)
  return lines[-1][:300] if lines else "it said nothing"


def _figures(path: Path) -> dict | None:
  lines = _tail(path)
  try:
    value = parse_json(lines[-1]) if lines else None
  except ValueError:
    return None
  return value if isinstance(value, dict) else None
