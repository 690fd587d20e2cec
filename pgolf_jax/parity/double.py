"""Our own programs in float64: what a program would give without rounding, from the program itself.

The model, the kernels and the optimizer ask for float32 by name in many places. A second, wider form of them would be a
second model. Instead the program that runs in float32 is traced as it is, and its operations are carried out one by one
with float64 in place of every float32. What is left is the rounding of constants in the program to float32.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

KINDS = ("forward", "optimizer")
"""Kinds of golden cases whose whole computation is a program, without a loop on the host."""


def has_double(kind: str) -> bool:
  """Whether a kind of case can be computed in float64 on the device at hand; TPUs only imitate it, slowly."""
  return kind in KINDS and jax.default_backend() != "tpu"


def in_double(function: Callable, *arguments) -> Any:
  """Returns function(*arguments), traced as for float32 and computed with float64 in its place; NumPy arrays.

  Args:
    arguments: trees of arrays; their float32 is widened.
  """
  program, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
  inputs = zip(jax.tree.leaves(arguments), program.jaxpr.invars, strict=True)
  leaves = [_widened(np.asarray(leaf, var.aval.dtype)) for leaf, var in inputs]  # NumPy's integers have 64 bits
  with jax.enable_x64(True):
    out = jax.jit(lambda *values: _evaluate(program.jaxpr, program.consts, values))(*leaves)
    out = [np.asarray(value) for value in out]
  return jax.tree.unflatten(jax.tree.structure(shape), out)


def _is_single(dtype) -> bool:
  return dtype is not None and np.dtype(dtype) == np.float32


def _widened(value):
  return value.astype(np.float64) if _is_single(getattr(value, "dtype", None)) else value


def _evaluate(jaxpr: core.Jaxpr, consts: Sequence, values: Sequence) -> list:
  """Carries out the operations of a program, in float64."""
  known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*map(_widened, consts), *values], strict=True))

  def read(var):
    if isinstance(var, core.Literal):  # a bare number would be 64 bits wide, integers too
      return np.asarray(var.val, np.float64 if _is_single(var.aval.dtype) else var.aval.dtype)
    return known[var]

  for equation in jaxpr.eqns:
    out = _operation(equation, [read(var) for var in equation.invars])
    known.update(zip(equation.outvars, out, strict=True))
  return [read(var) for var in jaxpr.outvars]


def _operation(equation: core.JaxprEqn, values: list) -> list:
  params, name = equation.params, equation.primitive.name
  if name in _CONTROL:
    return _CONTROL[name](params, values)
  inner = params.get("call_jaxpr", params.get("jaxpr"))
  if inner is not None:  # a function that was called: jit, custom derivatives, checkpointing
    return _call(inner, values)
  if name == "reduce_precision" and (params["exponent_bits"], params["mantissa_bits"]) == (8, 23):
    return values
  out = equation.primitive.bind(*values, **{key: _wide_param(value) for key, value in params.items()})
  return out if equation.primitive.multiple_results else [out]


def _wide_param(value):
  """A parameter of an operation, such as the type of its result, with float64 in place of float32."""
  return np.dtype(np.float64) if isinstance(value, np.dtype | type) and _is_type_single(value) else value


def _is_type_single(value) -> bool:
  return value in (np.float32, jnp.float32) or (isinstance(value, np.dtype) and value == np.dtype(np.float32))


def _call(inner, values) -> list:
  if isinstance(inner, core.ClosedJaxpr):
    return _evaluate(inner.jaxpr, inner.consts, values)
  return _evaluate(inner, (), values)


def _scan(params, values) -> list:
  if "ft_in" in params:  # the trees of constants, carry and inputs, in place of their sizes, since JAX 0.12
    consts, carry = (len(tree) for tree in params["ft_in"].unpack()[:2])
  else:
    consts, carry = params["num_consts"], params["num_carry"]

  def step(state, x):
    out = _call(params["jaxpr"], [*values[:consts], *state, *x])
    return tuple(out[:carry]), tuple(out[carry:])

  state, xs = tuple(values[consts : consts + carry]), tuple(values[consts + carry :])
  state, ys = jax.lax.scan(step, state, xs, length=params["length"], reverse=params["reverse"])
  return [*state, *ys]


def _while(params, values) -> list:
  of_test, of_body = params["cond_nconsts"], params["body_nconsts"]
  test, body, state = values[:of_test], values[of_test : of_test + of_body], values[of_test + of_body :]
  return list(
    jax.lax.while_loop(
      lambda state: _call(params["cond_jaxpr"], [*test, *state])[0],
      lambda state: tuple(_call(params["body_jaxpr"], [*body, *state])),
      tuple(state),
    )
  )


def _cond(params, values) -> list:
  branches = [lambda *operands, branch=branch: tuple(_call(branch, operands)) for branch in params["branches"]]
  return list(jax.lax.switch(values[0], branches, *values[1:]))


def _scatter_add(params, values) -> list:
  """Its parameters hold the addition as a program of float32."""
  kept = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
  return [jax.lax.scatter_add(*values, **{key: params[key] for key in kept})]


_CONTROL = {"scan": _scan, "while": _while, "cond": _cond, "scatter-add": _scatter_add}
"""Operations that hold programs which are carried out in float64 too."""
