"""Banks and matrices: the model keeps matrices in stacks, the quantiser and the artifact keep them one by one."""

import re
from collections.abc import Callable, Collection, Mapping

import numpy as np

# The matrices of each bank in the order of its first axis, every layer of the first before any of the second.
BANKS = {
  "qo_bank": ("attn.c_q.weight", "attn.proj.weight"),
  "kv_bank": ("attn.c_k.weight", "attn.c_v.weight"),
  "mlp_up_bank": ("mlp.fc.weight",),
  "mlp_down_bank": ("mlp.proj.weight",),
}
_SUFFIXES = {suffix for suffixes in BANKS.values() for suffix in suffixes}
_IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def unbank(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns flat parameters with every bank taken apart into `blocks.{i}.…` matrices, the rest unchanged.

  The banks' matrices come first, layer by layer, then the other parameters as given. The order decides ties in the
  choice of AWQ groups and LQER matrices: the earlier one wins.
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
  """Returns the parameters that `unbank` took apart, holding only one matrix beside the banks at a time.

  Args:
    names: of all matrices and parameters.
    value: returns the matrix of a name; called once for each.

  Raises:
    KeyError: a bank lacks a matrix.
    ValueError: a bank's matrices differ in shape.
  """
  layers = 1 + max((int(match[1]) for name in names if (match := _IN_BLOCK.fullmatch(name))), default=-1)
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
  return params | {name: value(name) for name in names if not _in_a_bank(name)}


def kind(name: str) -> str:
  """Returns the name without its layer: matrices of one kind share statistics and, in the artifact, a stream."""
  match = _IN_BLOCK.fullmatch(name)
  return match[2] if match else name


def _in_a_bank(name: str) -> bool:
  return kind(name) != name and kind(name) in _SUFFIXES
