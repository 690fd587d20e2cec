"""The dispatch of all operations: which backend computes a call, and why."""

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import jax

from pgolf_jax.kernels import hardware

BACKENDS = ("mosaic_gpu", "mosaic_tpu", "xla", "reference")
"""Every backend that an operation may have, in the order in which operations try them."""

_preferred = jax.make_user_context(default_value=())
"""Backends to try first. A context of JAX's is part of the key under which it keeps traced functions."""


class Choice(NamedTuple):
  """The backend that computes a call, and the reason why it does."""

  name: str
  reason: str


@contextlib.contextmanager
def prefer(*backends: str) -> Iterator[None]:
  """Makes operations that are traced inside try these backends before all others, in this order.

  A backend that is not possible for a call is passed over as always; an `implementation` argument is obeyed as
  always. A jitted function that was traced outside is traced again inside. The context holds for the current
  thread, and the innermost one counts.

  Example: `with kernels.prefer("xla"): loss = jax.jit(f)(x)` compares kernels with plain XLA.

  Raises:
    ValueError: a name is not that of a backend.
  """
  for name in backends:
    if name not in BACKENDS:
      raise ValueError(f"{name!r} is not a backend; choose from {', '.join(BACKENDS)}")
  with _preferred(backends):
    yield


@dataclasses.dataclass(frozen=True)
class Operation:
  """An accelerated operation: what it accepts, and what can compute it.

  The module `pgolf_jax.kernels.NAME.BACKEND` of each backend holds a function NAME with the operation's signature,
  and, unless the backend can compute everything that `check` accepts, a function `obstacle` with the same signature
  that returns why it cannot, or None. A module is imported when its backend is first considered on hardware that it
  can run on: Pallas is slow to import where it is not used.

  Attributes:
    name: of the operation's folder, and of the function in each backend's module.
    check: a function with the operation's signature that raises ValueError for arguments that do not fit together.
    backends: names out of `BACKENDS`, in the order in which they are tried.
  """

  name: str
  check: Callable[..., None]
  backends: tuple[str, ...] = BACKENDS

  def choose(self, *arguments, implementation: str | None = None, **options) -> Choice:
    """Returns the backend that computes such a call in the current trace, and why.

    Args:
      arguments, options: those of the operation, or `jax.ShapeDtypeStruct`s in place of its arrays.
      implementation: a backend to insist on, or None to take the first that is possible.

    Raises:
      ValueError: the arguments do not fit together, the backend is unknown, or it is insisted on and not possible.
    """
    self.check(*arguments, **options)
    if implementation is not None:
      if implementation not in self.backends:
        raise ValueError(f"{self.name} has no {implementation=}; it has {', '.join(self.backends)}")
      if obstacle := self.obstacle(implementation, *arguments, **options):
        raise ValueError(f"{self.name}: {implementation=} is not possible: {obstacle}")
      return Choice(implementation, "asked for")
    preferred = tuple(name for name in _preferred.value if name in self.backends)
    passed_over = []
    for name in dict.fromkeys(preferred + self.backends):
      obstacle = self.obstacle(name, *arguments, **options)
      if obstacle is None:
        first = "preferred" if name in preferred else "the first choice"
        return Choice(name, "; ".join(passed_over) or first)
      passed_over.append(f"{name} not possible: {obstacle}")
    raise ValueError(f"{self.name}: no implementation is possible: {'; '.join(passed_over)}")

  def obstacle(self, backend: str, *arguments, **options) -> str | None:
    """Returns why a backend cannot compute a call that `check` accepts in the current trace, or None if it can."""
    obstacle = _hardware_obstacle(backend)
    if obstacle is None and hasattr(module := self._module(backend), "obstacle"):
      obstacle = module.obstacle(*arguments, **options)
    return obstacle

  def __call__(self, *arguments, implementation: str | None = None, **options):
    """Computes the operation with the backend that `choose` returns for these arguments."""
    name, _ = self.choose(*arguments, implementation=implementation, **options)
    return getattr(self._module(name), self.name)(*arguments, **options)

  def _module(self, backend: str) -> ModuleType:
    return importlib.import_module(f"pgolf_jax.kernels.{self.name}.{backend}")


def _hardware_obstacle(backend: str) -> str | None:
  here = hardware.target()
  if backend == "mosaic_gpu" and not here.is_hopper:
    return f"it needs a Hopper GPU, not {here.kind} ({here.platform})"
  if backend == "mosaic_tpu" and here.platform != "tpu":
    return f"it needs a TPU, not {here.kind} ({here.platform})"
  return None
