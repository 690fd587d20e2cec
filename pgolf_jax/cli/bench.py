"""`pgolf bench`: every benchmark of `pgolf_jax.bench`, by its module's name."""

import importlib
import pkgutil

from pgolf_jax import bench

_MODULES = {
  found.name: importlib.import_module(f"pgolf_jax.bench.{found.name}")
  for found in pkgutil.iter_modules(bench.__path__)
  if not found.name.startswith("_")
}
COMMANDS = {name: module.COMMAND for name, module in _MODULES.items()}
