"""Between banks and matrices: the model keeps stacks, the quantiser and the artifact keep single matrices.

Shape letters: L layers, B rows of a stack, M outputs, N inputs.
"""

import re
from collections.abc import Mapping

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


def rebank(matrices: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The inverse of `unbank`. Raises KeyError for a bank of which only a part is there."""
  layers = num_layers(matrices)
  params = {}
  for bank, suffixes in BANKS.items():
    names = [f"blocks.{i}.{suffix}" for suffix in suffixes for i in range(layers)]
    if any(name in matrices for name in names):
      params[bank] = np.stack([np.asarray(matrices[name]) for name in names])
  return params | {name: value for name, value in matrices.items() if bank_of(name) is None}


def bank_of(name: str) -> str | None:
  """The bank that holds the matrix, or None for a parameter that stands alone."""
  match = _IN_BLOCK.fullmatch(name)
  return _BANK_OF[match[2]][0] if match and match[2] in _BANK_OF else None


def kind(name: str) -> str:
  """The name without its layer: the matrices of one kind share statistics and, in the artifact, a stream."""
  match = _IN_BLOCK.fullmatch(name)
  return match[2] if match else name
