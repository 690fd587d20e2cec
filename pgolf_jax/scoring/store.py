"""The folder of an evaluation: saves, each whole or absent, from which a killed evaluation goes on.

identity.json         what is scored with what; another evaluation is refused
progress.json         the newest save: how far the evaluation is, and the files that belong to it with their SHA-256
progress-before.json  the save before, which holds if a file of the newest is damaged
part-….safetensors    scores of the targets that were entered between two saves
state-….safetensors   adapters that the next batch goes on with
weights-….safetensors model weights after a global phase

A file is removed only once no save names it. When all is scored, whole arrays take the place of the parts.
"""

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load, load_file, save

from pgolf_jax.errors import UserError
from pgolf_jax.runtime.files import (
  Damaged,
  file_hash,
  read_json,
  read_sealed,
  remove,
  remove_partials,
  seal,
  write_bytes,
  write_json,
  write_npy,
)
from pgolf_jax.runtime.log import log

_SAVES = ("progress.json", "progress-before.json")
_OURS = re.compile(r"(part|state|weights)-\d+\.safetensors|progress(-before)?\.json|identity\.json|.*\.npy|.*\.jsonl")


class OtherEvaluation(UserError):
  """The folder holds another evaluation."""


class Store:
  """The saves in a folder.

  Args:
    folder: made if it does not exist.
    identity: JSON values; what the saves must belong to.
    writes: whether this process writes; of several processes one does.

  Attributes:
    progress: values of the newest save that is whole; None if there is none.

  Raises:
    OtherEvaluation: the folder holds another evaluation.
  """

  def __init__(self, folder: Path, identity: Mapping, *, writes: bool):
    self._folder, self._writes = folder, writes
    self._identity = json.loads(json.dumps(identity))
    if writes:
      folder.mkdir(parents=True, exist_ok=True)
      remove_partials(folder)
    self._newest: dict = {}
    self._before: dict = {}
    self._weights: dict[str, str] = {}  # that no save names yet
    faults = []
    for name in _SAVES:
      try:
        self._newest = self._read(name)
        break
      except Damaged as fault:
        if (folder / name).exists():
          faults.append(str(fault))
    self.progress: dict | None = self._newest.get("progress")
    self._refuse_others()
    if faults:
      where = "the start" if self.progress is None else f"the save after batch {self.progress['batches']}"
      log.warning("%s The evaluation goes on from %s.", faults[0], where)
    if not writes:
      return
    for path in folder.iterdir():
      if _OURS.fullmatch(path.name) and (self.progress is None or path.is_dir()):  # a folder is in a file's way
        remove(path)
    write_json(folder / "identity.json", self._identity)

  def _read(self, name: str) -> dict:
    """Returns a save whose files are all as they were written."""
    values = read_sealed(self._folder / name)
    for file, sha256 in values["files"].items():
      if file_hash(self._folder / file) != sha256:
        raise Damaged(f"{self._folder / file} is damaged or gone.")
    return values

  def _refuse_others(self) -> None:
    identity = self._newest.get("identity")
    if identity is None:
      with contextlib.suppress(UserError):
        identity = read_json(self._folder / "identity.json")
    if identity is not None and identity != self._identity:
      differs = next(k for k in {**identity, **self._identity} if identity.get(k) != self._identity.get(k))
      raise OtherEvaluation(
        f"{self._folder} holds another evaluation ({differs} differs); give another folder, or delete that one."
      )

  def scores(self) -> list[dict[str, np.ndarray]]:
    """Returns the scores of the newest save: parts, or the whole arrays by themselves."""
    names = self._newest.get("scores", [])
    if any(name.endswith(".npy") for name in names):
      return [{name.removesuffix(".npy"): np.load(self._folder / name) for name in names}]
    return [load_file(self._folder / name) for name in names]

  def state(self) -> dict[str, np.ndarray]:
    """Returns the adapters of the newest save."""
    return load_file(self._folder / self._newest["state"])

  def weights(self, version: int) -> dict[str, np.ndarray]:
    """Returns the model weights after a global phase."""
    return load((self._folder / _weights(version)).read_bytes())

  def save_weights(self, version: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes model weights; the next save names them."""
    if self._writes:
      self._weights[_weights(version)] = self._write(_weights(version), arrays)

  def save(self, progress: dict, scores: Mapping[str, np.ndarray], state: Mapping[str, np.ndarray]) -> None:
    """Makes this what a restart goes on from.

    Args:
      progress: JSON values; `batches` and `phases` are among them.
      scores: entered since the last save.
      state: adapters.
    """
    if not self._writes:
      return
    batches, known = progress["batches"], self._newest.get("files", {})
    names = list(self._newest.get("scores", []))
    files = {name: known[name] for name in names}
    if any(len(values) for values in scores.values()):
      part = f"part-{batches}.safetensors"
      files[part] = self._write(part, scores)
      names.append(part)
    # A save after the same batch has the same adapters, but safetensors orders what it writes by itself: a file that
    # the last save names is left alone.
    name = f"state-{batches}.safetensors"
    files[name] = known[name] if name in known else self._write(name, state)
    if weights := progress["phases"] and _weights(progress["phases"]):
      files[weights] = {**known, **self._weights}[weights]
    self._put({"progress": progress, "scores": names, "state": name, "files": files})

  def finish(self, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the scores of all targets as whole arrays, NAME.npy, in place of their parts."""
    if not self._writes:
      return
    written = {}
    for name, array in arrays.items():
      write_npy(self._folder / f"{name}.npy", array)
      written[f"{name}.npy"] = file_hash(self._folder / f"{name}.npy")
    files = {name: sha256 for name, sha256 in self._newest["files"].items() if name not in self._newest["scores"]}
    self._before = {}
    self._put({**self._newest, "scores": list(written), "files": files | written}, is_last=True)

  def _put(self, values: dict, *, is_last: bool = False) -> None:
    newest, before = (self._folder / name for name in _SAVES)
    values = {**values, "identity": self._identity}
    if self._newest and not is_last:
      write_json(before, seal(self._newest))
      self._before = self._newest
    write_json(newest, seal(values))
    if is_last:
      before.unlink(missing_ok=True)
    self._newest = values
    named = {*self._newest["files"], *self._before.get("files", {})}
    for path in self._folder.glob("*-*.safetensors"):
      if _OURS.fullmatch(path.name) and path.name not in named:
        path.unlink()
    self._weights = {}

  def _write(self, name: str, arrays: Mapping[str, np.ndarray]) -> str:
    """Writes a safetensors file and returns its SHA-256."""
    write_bytes(self._folder / name, save({key: np.array(x, order="C") for key, x in arrays.items()}))
    return file_hash(self._folder / name)


def _weights(version: int) -> str:
  return f"weights-{version}.safetensors"
