"""What an evaluation has scored so far, on disk, so that a killed one goes on from its last finished batch.

identity.json       what is scored with what; another evaluation is refused
nll.npy             nats of every target, tilted; NaN before it is scored
model_nll.npy       the same before the tilt
times.npy           how often each target was scored
trace.jsonl         see trace.py
progress.json       batches finished, clocks, versions
state-….safetensors adapters that the next batch goes on with
weights-….safetensors  model weights after the last global phase
documents.jsonl     one line a document, when all are scored
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from pgolf_jax.errors import UserError
from pgolf_jax.model.adapters import Adapter, Adapters
from pgolf_jax.runtime.files import write_arrays, write_json, write_json_lines


class Store:
  """Scores in memory, or in a folder if one is given.

  Args:
    identity: JSON values that decide the result; a folder made with others is refused.
    writes: whether this process writes; of several processes one does.

  Raises:
    UserError: the folder holds another evaluation.
  """

  def __init__(self, folder: Path | None, targets: int, identity: dict, *, writes: bool = True):
    self.folder = folder
    self._writes = writes and folder is not None
    self.progress: dict | None = None
    if folder is not None:
      folder.mkdir(parents=True, exist_ok=True)
      self._check(identity)
      if (folder / "progress.json").exists():
        self.progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    self.nll_N = self._array("nll.npy", targets, np.float32, np.nan)
    self.model_nll_N = self._array("model_nll.npy", targets, np.float32, np.nan)
    self.times_N = self._array("times.npy", targets, np.uint8, 0)

  def _check(self, identity: dict) -> None:
    path = self.folder / "identity.json"
    if path.exists():
      found = json.loads(path.read_text(encoding="utf-8"))
      if found != identity:
        differs = next(k for k in {*found, *identity} if found.get(k) != identity.get(k))
        raise UserError(
          f"{self.folder} holds another evaluation ({differs} differs); give another folder, or delete that one."
        )
    elif self._writes:
      write_json(path, identity)

  def _array(self, name: str, size: int, dtype, fill) -> np.ndarray:
    if self.progress is not None:
      path = self.folder / name
      return np.lib.format.open_memmap(path, mode="r+") if self._writes else np.load(path)
    if not self._writes:
      return np.full(size, fill, dtype)
    array = np.lib.format.open_memmap(self.folder / name, mode="w+", dtype=dtype, shape=(size,))
    array[:] = fill
    return array

  def forget(self, targets: slice) -> None:
    """Unscores targets that a killed evaluation had scored after its last save."""
    self.nll_N[targets] = self.model_nll_N[targets] = np.nan
    self.times_N[targets] = 0

  def save(self, progress: dict, arrays: dict[str, np.ndarray]) -> None:
    """Makes everything scored so far, and the state after it, what a restart goes on from."""
    if not self._writes:
      return
    for array in (self.nll_N, self.model_nll_N, self.times_N):
      array.flush()
    name = f"state-{progress['batches']}.safetensors"
    write_arrays(self.folder / name, arrays)
    before = self.progress
    write_json(self.folder / "progress.json", {**progress, "state": name})
    if before is not None and before["state"] != name:
      (self.folder / before["state"]).unlink(missing_ok=True)
    self.progress = {**progress, "state": name}

  def arrays(self) -> dict[str, np.ndarray]:
    """The arrays of the last save."""
    return load_file(self.folder / self.progress["state"])

  def save_weights(self, version: int, params: dict[str, np.ndarray]) -> None:
    if self._writes:
      write_arrays(self.folder / f"weights-{version}.safetensors", params)
      (self.folder / f"weights-{version - 2}.safetensors").unlink(missing_ok=True)

  def weights(self, version: int) -> dict[str, np.ndarray]:
    return load_file(self.folder / f"weights-{version}.safetensors")

  def write_lines(self, name: str, lines: list[dict]) -> None:
    """A file of one JSON object a line."""
    if self._writes:
      write_json_lines(self.folder / name, lines)


def flatten(prefix: str, adapters: Adapters) -> dict[str, np.ndarray]:
  """Adapters under flat names."""
  return {
    f"{prefix}.{kind}.{letter}": np.asarray(x)
    for kind, pair in adapters.items()
    for letter, x in zip("AB", pair, strict=True)
  }


def unflatten(prefix: str, arrays: dict[str, np.ndarray]) -> Adapters | None:
  """Inverse of `flatten`; None where there are none."""
  kinds = {name.split(".")[1] for name in arrays if name.startswith(f"{prefix}.")}
  return {kind: Adapter(*(arrays[f"{prefix}.{kind}.{letter}"] for letter in "AB")) for kind in kinds} or None
