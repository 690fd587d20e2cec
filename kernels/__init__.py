"""Accelerated operations: a folder each, with a reference, an api, and one file per backend.

Every backend of an operation is a function of the operation's name and signature. `Operation` checks the arguments
and takes the first backend that is possible for them on the hardware at hand; `prefer` changes the order. The n-gram
counts, in C, stand apart: they run on the host.
"""

__all__ = ["Choice", "Operation", "prefer"]


def __getattr__(name: str):
  if name not in __all__:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  from pgolf_jax.kernels import operation  # the import of JAX takes half a second, and the n-gram counts need none

  return getattr(operation, name)
