"""Parameter golf in JAX: train, quantise and score a language model that fits in 16,000,000 bytes.

  import pgolf_jax

  model = pgolf_jax.load("runs/demo")
  print(model.score("My fellow citizens, we meet again.").bpb)

Importing it imports nothing else; each name below is imported when it is first used. `__init__.pyi` has their types.
"""

import importlib

__version__ = "0.1.0"

__all__ = [
  "ArtifactError",
  "DocumentScore",
  "Model",
  "Score",
  "Settings",
  "UserError",
  "__version__",
  "evaluate",
  "load",
  "prepare",
  "settings",
  "train",
]

_ELSEWHERE = {"ArtifactError": "errors", "UserError": "errors", "Settings": "settings"}
"""Names that are not in `api`."""


def __getattr__(name: str):
  if name == "settings":  # the module, which can be called
    return importlib.import_module("pgolf_jax.settings")
  if name not in __all__:
    raise AttributeError(f"module 'pgolf_jax' has no attribute {name!r}")
  return getattr(importlib.import_module(f"pgolf_jax.{_ELSEWHERE.get(name, 'api')}"), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
