"""The runtime checker of annotations: shapes and types of arrays, where an annotation states them.

Other annotations tell readers what to pass (a protocol, a mapping); they are not checked.
"""

import inspect
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def check_shapes(function):
  """Returns the function with the arguments and results checked whose annotations contain a jaxtyping type."""
  annotations = {name: hint for name, hint in function.__annotations__.items() if _states_a_shape(hint)}
  if not annotations:
    return function
  function.__annotations__ = {**dict.fromkeys(function.__annotations__, Any), **annotations}
  return beartype(function)


def _states_a_shape(hint) -> bool:
  return (inspect.isclass(hint) and issubclass(hint, AbstractArray)) or any(map(_states_a_shape, get_args(hint)))
