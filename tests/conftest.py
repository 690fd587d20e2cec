"""Eight virtual CPU devices, a compile cache that lasts, and the folders of golden cases and text."""

import logging
import os
from pathlib import Path

from jaxlib.version import __version_info__ as jaxlib_version

ROOT = Path(__file__).parents[1]

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
if jaxlib_version < (0, 11):
  # Tiny programs compile in a third of the time. jaxlib 0.12 has no such option, and stops where it is given.
  os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# XLA's optimizations cost tiny programs more time than they save, here and in every process that a test starts.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# Annotations of arrays are checked at every call, in all rooms that have them.
ROOMS = ("data", "kernels", "model", "quantize", "scoring", "training")
jaxtyping.install_import_hook([f"pgolf_jax.{room}" for room in ROOMS], "shapes.check_shapes")


def _external(variable: str, default: str, what: str) -> Path:
  """A file or folder that is not part of the repository; the test is skipped, saying so, where it is absent."""
  path = Path(os.environ.get(variable, ROOT / default))
  if not path.exists():
    pytest.skip(f"{what} not found at {path}; set {variable} to where it is")
  return path


@pytest.fixture
def unchecked_shapes():
  """Lets arrays of wrong shapes through to the functions that refuse them."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def golden():
  """golden(kind) → the folder of a large golden case, which the repository does not contain."""
  return lambda kind: _external("PGOLF_GOLDEN", "../shared/golden", "golden cases") / kind


@pytest.fixture(scope="session")
def small_golden():
  """small_golden(kind) → the folder of the small golden case of that kind in tests/golden."""
  return lambda kind: ROOT / "tests" / "golden" / kind


@pytest.fixture(scope="session")
def corpus() -> Path:
  """Folder with web_train.jsonl.zst and fineweb_val.jsonl.zst."""
  return _external("PGOLF_CORPUS", "../shared/data", "web text")


@pytest.fixture(scope="session")
def published_tokenizer() -> Path:
  """The published CaseOps SentencePiece model of 8192 pieces."""
  name = "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
  return _external("PGOLF_TOKENIZER", f"../shared/tokenizers/{name}", "the published tokenizer")


@pytest.fixture
def programs_of_users():
  """Compiles with XLA's optimizations, all but its fusion emitters: for comparisons with the reference."""
  import jax

  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True, scope="module")
def _restore_the_log():
  """A run turns the program's log to its own file and to the terminal of that moment."""
  log = logging.getLogger("pgolf")
  handlers, propagate, level = list(log.handlers), log.propagate, log.level
  yield
  log.handlers, log.propagate = handlers, propagate
  log.setLevel(level)


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
  """Compiled programs of one test file would otherwise stay in memory until the last one is done."""
  yield
  import jax

  from pgolf_jax.training.step import forget_programs

  forget_programs()
  jax.clear_caches()
