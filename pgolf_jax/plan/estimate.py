"""The memory that a program takes, estimated from its trace alone, for hardware that nothing here compiles for.

Every operation of the trace is taken in its order. An array is held from where it is computed to where it is last used;
the most that is held at any time is the program's memory. Casts, sums, products, comparisons and changes of shape are
held nowhere, since compilers fuse them into what uses them: what they are computed from is held longer instead. An
operation that has a trace inside (a loop, a branch, a call) adds the most that is held inside.

A compiler orders and fuses better in some places and holds more in others: `scaled` gives the range in which the cases
of tests/plan/test_estimate.py lie, all that were compiled.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core

_SEEN = {"cuda": (0.68, 1.15), "tpu": (1.6, 2.2)}
"""Platform → the least and the most that its compiler took, over the estimate. TPUs fill up small dimensions."""

# fmt: off
_FUSED = frozenset((
  "abs", "add", "add_any", "and", "broadcast_in_dim", "convert_element_type", "copy", "eq", "expand_dims", "ge",
  "gt", "integer_pow", "iota", "le", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pvary", "reshape",
  "rev", "select_n", "sign", "slice", "square", "squeeze", "stop_gradient", "sub", "transpose",
))
# fmt: on
_LARGER = 4  # a fused operation on arrays more than this many times its result's size is held like any other
_KERNEL = "pallas_call"  # works in the chip's own memory


def memory(traced: jax.stages.Traced) -> dict[str, int]:
  """Returns the bytes of one device that a traced program needs: its arguments, and the most that it holds beside them.

  Results that take the place of arguments are counted once, as temporaries.
  """
  jaxpr = _on_one_device(traced.jaxpr.jaxpr) or traced.jaxpr.jaxpr
  return {"arguments": sum(map(_size, jaxpr.invars)), "temporaries": _most_held(jaxpr)}


def scaled(estimated: int, platform: str) -> tuple[float, float]:
  """Returns the least and the most bytes that a compiler was seen to take where this much was estimated.

  Args:
    platform: JAX's name for it; `gpu` is taken for `cuda`.
  """
  low, high = _SEEN["tpu" if platform == "tpu" else "cuda"]
  return estimated * low, estimated * high


def _on_one_device(jaxpr: Any) -> Any | None:
  """The part of a trace that each device runs, whose shapes are those of its shards; None without shard_map."""
  for equation in jaxpr.eqns:
    for inner in _inner(equation):
      found = inner if equation.primitive.name == "shard_map" else _on_one_device(inner)
      if found is not None:
        return found
  return None


def _inner(equation: Any) -> Iterator[Any]:
  """The traces inside an operation."""
  for value in equation.params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      item = getattr(item, "jaxpr", item)  # of a closed one
      if hasattr(item, "eqns"):
        yield item


def _size(variable: Any) -> int:
  kind = variable.aval
  if not hasattr(kind, "dtype") or jax.dtypes.issubdtype(kind.dtype, jax.dtypes.extended):
    return 0
  return math.prod(kind.shape) * kind.dtype.itemsize


def _most_held(jaxpr: Any) -> int:
  """Returns the most bytes that a trace holds at any time beside its inputs."""
  held_from, fused = _last_uses(jaxpr)
  frees: dict[int, list[Any]] = defaultdict(list)
  held = most = 0
  for place, equation in enumerate(jaxpr.eqns):
    if place not in fused:
      inside = 0
      if equation.primitive.name != _KERNEL:
        inside = max(map(_most_held, _inner(equation)), default=0)
      most = max(most, held + max(inside, sum(map(_size, equation.outvars))))
      for variable in equation.outvars:
        if (last := held_from.get(variable, place)) > place:
          held += _size(variable)
          frees[last].append(variable)
    held -= sum(map(_size, frees.pop(place, ())))
  return most


def _last_uses(jaxpr: Any) -> tuple[dict[Any, int], set[int]]:
  """Returns the place of each variable's last use, and the places of operations whose results are held nowhere."""
  inputs = {*jaxpr.invars, *jaxpr.constvars}
  sources: dict[Any, tuple[Any, ...]] = {}  # result of a fused operation → what it is computed from that is held
  last: dict[Any, int] = {}
  fused = set()
  for place, equation in enumerate(jaxpr.eqns):
    used = {s for v in equation.invars if not isinstance(v, core.Literal) for s in sources.get(v, (v,))}
    last.update(dict.fromkeys(used, place))
    if equation.primitive.name in _FUSED:
      result = equation.outvars[0]
      if sum(_size(s) for s in used - inputs) <= _LARGER * _size(result):
        sources[result] = tuple(used)
        fused.add(place)
  for variable in jaxpr.outvars:
    if not isinstance(variable, core.Literal):
      last.update(dict.fromkeys(sources.get(variable, (variable,)), len(jaxpr.eqns)))
  return last, fused
