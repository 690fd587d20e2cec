"""The published C of the n-gram hints, compiled from a file that the user names."""

import ctypes
import math
import subprocess
from pathlib import Path

import numpy as np

from pgolf_jax.errors import UserError

LOAD = 0.55
"""Share of the context table that the targets may fill; the table's size is the power of two from there up."""


def compile_source(source: Path, folder: Path) -> ctypes.CDLL:
  """Compiles the file into `folder`, with the flags of the published script. Raises UserError if that fails."""
  library = folder / "published_ngram.so"
  command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", "-o", str(library), str(source)]
  try:
    subprocess.run(command, check=True, capture_output=True, text=True)
  except (OSError, subprocess.CalledProcessError) as e:
    detail = (getattr(e, "stderr", "") or str(e)).strip().splitlines()[0]
    raise UserError(f"{source} did not compile ({detail}); give the published online_ngram_state.c.") from None
  loaded = ctypes.CDLL(str(library))
  if not hasattr(loaded, "online_ngram_state_process_chunk"):
    raise UserError(f"{source} has no online_ngram_state_process_chunk; give the published online_ngram_state.c.")
  return loaded


def hints(library: ctypes.CDLL, targets_N: np.ndarray, order: int, threshold: float) -> tuple[np.ndarray, np.ndarray]:
  """Returns (hint_N, gate_N) as the published script makes them: from the token channel, seeded by the first target.

  Its other two channels run too, on tables that stay empty, as in the script when their boosts are 0.
  """
  pointer, count = ctypes.c_void_p, len(targets_N)
  library.online_ngram_state_create.restype = pointer
  library.online_ngram_state_create.argtypes = [ctypes.c_int] * 3
  library.online_ngram_state_destroy.argtypes = [pointer]
  library.online_ngram_state_seed_prefix_token.argtypes = [pointer, ctypes.c_uint16]
  library.online_ngram_state_process_chunk.argtypes = [pointer, pointer, ctypes.c_int64] + [pointer] * 7

  def bits(entries: int, load: float) -> int:
    return min(max(math.ceil(math.log2(max(int(entries / load), 1))), 12), 28)

  targets_N = np.ascontiguousarray(targets_N, np.uint16)
  state = library.online_ngram_state_create(order - 1, bits(count, LOAD), bits(max(count // 2, 1), 0.60))
  if not state:
    raise MemoryError("the published tables do not fit")
  try:
    library.online_ngram_state_seed_prefix_token(state, int(targets_N[0]))
    every = np.ones(2**16, np.uint8)
    hint, share = np.zeros(count, np.uint16), np.zeros(count, np.float32)
    unused = np.zeros(count, np.uint16), np.zeros(count, np.float32), np.zeros(count, np.uint8)
    arrays = (every, every, hint, share, *unused)
    status = library.online_ngram_state_process_chunk(
      state, targets_N.ctypes.data, count, *(array.ctypes.data for array in arrays)
    )
    if status:
      raise RuntimeError(f"the published pass failed with status {status}")
  finally:
    library.online_ngram_state_destroy(state)
  gate = share >= np.float32(threshold)
  return np.where(gate, hint, 0).astype(np.int32), gate
