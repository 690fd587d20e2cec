"""The one folder outside run folders that is written to: compiled programs, and the default data once prepared."""

import os
from pathlib import Path


def root() -> Path:
  """`$PGOLF_CACHE`, or pgolf_jax in the user's cache folder."""
  if named := os.environ.get("PGOLF_CACHE"):
    return Path(named)
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pgolf_jax"


def use_compile_cache() -> None:
  """Keeps every compiled program in `root()/compile`, unless JAX has been given a cache folder already."""
  import jax

  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(root() / "compile"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
