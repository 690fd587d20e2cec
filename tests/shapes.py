"""The runtime checker of annotations: shapes and types of arrays, where an annotation states them.

Other annotations tell readers what to pass (a protocol, a mapping); they are not checked. A parameter that is to be a
JAX array may be a NumPy array, as everywhere in JAX.
"""

import inspect
from types import UnionType
from typing import Any, Union, get_args, get_origin

import jax
import numpy as np
from beartype import beartype
from jaxtyping import AbstractArray


def check_shapes(function):
  """Returns the function with the arguments and results checked whose annotations contain a jaxtyping type."""
  hints = {name: hint for name, hint in function.__annotations__.items() if _states_a_shape(hint)}
  if not hints:
    return function
  hints = {name: hint if name == "return" else _or_numpy(hint) for name, hint in hints.items()}
  function.__annotations__ = {**dict.fromkeys(function.__annotations__, Any), **hints}
  return beartype(function)


def _is_array(hint) -> bool:
  return inspect.isclass(hint) and issubclass(hint, AbstractArray)


def _states_a_shape(hint) -> bool:
  return _is_array(hint) or any(map(_states_a_shape, get_args(hint)))


def _or_numpy(hint):
  if _is_array(hint):
    return Union[hint, hint.dtype[np.ndarray, hint.dim_str]] if hint.array_type is jax.Array else hint  # noqa: UP007
  if isinstance(hint, UnionType) or get_origin(hint) is Union:
    return Union[tuple(map(_or_numpy, get_args(hint)))]  # noqa: UP007
  return hint
