"""Between banks and matrices: the model keeps stacks, the quantiser and the artifact keep single matrices.

Shape letters: L layers, B rows of a stack, M outputs, N inputs.
"""

import re
from collections.abc import Callable, Collection, Mapping

import numpy as np

# Each bank's matrices in the order of its first axis: the first L rows are the first name's, and so on.
BANKS = {
  "qo_bank": ("attn.c_q.weight", "attn.proj.weight"),
  "kv_bank": ("attn.c_k.weight", "attn.c_v.weight"),
  "mlp_up_bank": ("mlp.fc.weight",),
  "mlp_down_bank": ("mlp.proj.weight",),
}
_BANK_OF = {suffix: (bank, half) for bank, suffixes in BANKS.items() for half, suffix in enumerate(suffixes)}
_IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def num_layers(names) -> int:
  """The number of layers that `blocks.{i}.…` names run over: one more than the largest i; 0 without any."""
  found = [int(match[1]) for name in names if (match := _IN_BLOCK.fullmatch(name))]
  return 1 + max(found, default=-1)


def unbank(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Flat parameters with every bank taken apart into `blocks.{i}.…` matrices; the rest under its own name.

  Order: the banks' matrices layer by layer, then the other parameters as given; ties in the choice of AWQ groups
  and LQER matrices fall to the earlier one.
  """
  matrices = {}
  for bank, suffixes in BANKS.items():
    if bank not in params:
      continue
    layers = len(params[bank]) // len(suffixes)
    for i in range(layers):
      for half, suffix in enumerate(suffixes):
        matrices[f"blocks.{i}.{suffix}"] = params[bank][half * layers + i]
  return matrices | {name: value for name, value in params.items() if name not in BANKS}


def rebank(names: Collection[str], value: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
  """The inverse of `unbank`, with one matrix at a time beside the banks.

  Args:
    names: of all matrices and parameters.
    value: gives the matrix of a name; called once for each.

  Raises:
    KeyError: a bank's matrices are not all there.
    ValueError: they are of different shapes.
  """
  layers = num_layers(names)
  params = {}
  for bank, suffixes in BANKS.items():
    parts = [f"blocks.{i}.{suffix}" for suffix in suffixes for i in range(layers)]
    if not any(name in names for name in parts):
      continue
    if missing := [name for name in parts if name not in names]:
      raise KeyError(missing[0])
    for i, name in enumerate(parts):
      matrix = value(name)
      if i == 0:
        params[bank] = np.empty((len(parts), *matrix.shape), matrix.dtype)
      if matrix.shape != params[bank].shape[1:]:
        raise ValueError(f"{name} is {matrix.shape}, {parts[0]} {params[bank].shape[1:]}")
      params[bank][i] = matrix
      del matrix  # before the next one is made
  return params | {name: value(name) for name in names if bank_of(name) is None}


def bank_of(name: str) -> str | None:
  """The bank that holds the matrix, or None for a parameter that stands alone."""
  match = _IN_BLOCK.fullmatch(name)
  return _BANK_OF[match[2]][0] if match and match[2] in _BANK_OF else None


def kind(name: str) -> str:
  """The name without its layer: the matrices of one kind share statistics and, in the artifact, a stream."""
  match = _IN_BLOCK.fullmatch(name)
  return match[2] if match else name
