"""Weights in files of other programs: PyTorch state dicts, safetensors, bare Orbax checkpoints.

Reading takes any bytes and either returns arrays by name, in the types that they were written in, or raises UserError.
Nothing in a file is ever executed: PyTorch's are read with `weights_only`, and what a file claims is checked before
memory is taken for it. Writing keeps every bit.
"""

import logging
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from safetensors import SafetensorError, safe_open

from pgolf_jax.errors import UserError
from pgolf_jax.model.params import content_hash
from pgolf_jax.runtime.files import parse_json, replacing, write_arrays
from pgolf_jax.settings import Settings
from pgolf_jax.settings.check import MAX_PARAMETERS
from pgolf_jax.settings.load import from_dict

try:
  import torch
except ImportError:  # the extra `torch`
  torch = None

Tensors = dict[str, np.ndarray]

TYPES = {name: np.dtype(getattr(np, name)) for name in ("float16", "float32", "float64")}
TYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
"""The types that weights may have, by name."""

_SETTINGS = "pgolf_jax.settings"
"""Name of the settings, as JSON, in the metadata of safetensors and Orbax."""

_WRAPPERS = ("_orig_mod.", "module.")
"""What torch.compile and DistributedDataParallel put in front of every name."""


class Read(NamedTuple):
  """What a file holds.

  Attributes:
    tensors: arrays by name, as they were written.
    settings: those that lie beside the weights, if any do.
    note: what a person should know of how they were read; empty if nothing.
  """

  tensors: Tensors
  settings: Settings | None = None
  note: str = ""


def read_torch(path: Path, key: str | None = None) -> Read:
  """Returns the state dict of a file that torch.save wrote.

  Args:
    path: the file.
    key: of the entry that is the state dict, where the file holds more than one.

  Raises:
    UserError: PyTorch is missing, or the file holds anything but floating-point tensors by name.
  """
  _require_torch(path)
  state, note = _state_dict(path, _load(path), key)
  for prefix in _WRAPPERS * 2:
    if state and all(name.startswith(prefix) for name in state):
      state = {name.removeprefix(prefix): value for name, value in state.items()}
      note += f"{prefix[:-1]} taken off every name; "
  total = 0
  for name, value in state.items():
    if not isinstance(value, torch.Tensor):
      raise UserError(
        f"{path}: {_short(name)} is a {type(value).__name__}, not a tensor; save model.state_dict() alone."
      )
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
      raise UserError(f"{path}: {_short(name)} is not a plain tensor ({value.layout}, on {value.device}).")
    _check_type(path, name, str(value.dtype).removeprefix("torch."))
    total += value.numel()  # a view of one stored number can claim any shape
    _check_size(path, name, total)
  return Read({name: _array(value) for name, value in state.items()}, None, note.removesuffix("; "))


def write_torch(path: Path, tensors: Tensors) -> None:
  """Writes a state dict that `load_state_dict` reads."""
  _require_torch(path)
  with replacing(path) as partial, partial.open("wb") as file:  # given a path, torch.save would write its name too
    torch.save({name: _tensor(value) for name, value in tensors.items()}, file)


def _require_torch(path: Path) -> None:
  if torch is None:
    raise UserError(
      f"{path} needs PyTorch, which is not installed; pip install 'pgolf_jax[torch]', or use a .safetensors file."
    )


def _load(path: Path) -> object:
  """The object that torch.save was given, with nothing but tensors and plain containers in it."""
  try:
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
      with zipfile.ZipFile(path) as archive:
        _check_archive(path, archive)
    with warnings.catch_warnings(action="ignore"):
      return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
  except UserError:
    raise
  except Exception as error:  # a hostile file makes PyTorch raise any of a dozen types
    if refused := re.search(r"GLOBAL (\S+)", str(error)):
      raise UserError(
        f"{path} holds more than tensors (it names {_short(refused[1])}), and is not read, since that could execute "
        "it; save the state dict alone: torch.save(model.state_dict(), …)."
      ) from None
    reason = re.search(r"Unpickler error:\s*(.+)", str(error))
    why = _short(reason[1]) if reason else _first_line(error)
    raise UserError(f"{path} is not a whole PyTorch state dict ({why}).") from None


def _check_archive(path: Path, archive: zipfile.ZipFile) -> None:
  if any(entry.filename.endswith("/constants.pkl") for entry in archive.infolist()):
    raise UserError(f"{path} is a TorchScript program, not a PyTorch state dict; save model.state_dict().")
  if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
    raise UserError(f"{path} is a compressed archive; torch.save does not write such files.")


def _state_dict(path: Path, loaded: object, key: str | None) -> tuple[dict[str, object], str]:
  """The mapping of names to tensors in what was loaded, and a note if it lay under a key."""
  if not isinstance(loaded, Mapping) or not all(isinstance(name, str) for name in loaded):
    raise UserError(f"{path} holds a {type(loaded).__name__}, not a state dict; save model.state_dict().")
  inner = {name: value for name, value in loaded.items() if _is_state_dict(value)}
  if key is not None:
    if key not in inner:
      there = ", ".join(map(_short, inner)) or "none"
      raise UserError(f"{path} has no state dict under {key}; those there are: {there}.")
    return dict(inner[key]), f"the entry {key!r}; "
  if any(isinstance(value, torch.Tensor) for value in loaded.values()) or not inner:
    return dict(loaded), ""
  if len(inner) > 1:
    raise UserError(f"{path} holds several state dicts ({', '.join(map(_short, inner))}); choose one with --key.")
  [name] = inner
  return dict(inner[name]), f"the entry {name!r}; "


def _is_state_dict(value: object) -> bool:
  return (
    isinstance(value, Mapping)
    and len(value) > 0
    and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items())
  )


def _array(tensor) -> np.ndarray:
  tensor = tensor.detach().resolve_neg().contiguous()
  if tensor.dtype == torch.bfloat16:
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return tensor.numpy()


def _tensor(array: np.ndarray):
  array = np.array(array, order="C")
  if array.dtype == ml_dtypes.bfloat16:
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
  return torch.from_numpy(array)


_SAFETENSORS_TYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def read_safetensors(path: Path) -> Read:
  """Returns the tensors of a safetensors file, and the settings if this program wrote it.

  Raises:
    UserError: the file is damaged, or holds anything but floating-point tensors.
  """
  try:
    with safe_open(path, "np") as file:
      total, names = 0, list(file.keys())
      for name in names:
        about = file.get_slice(name)
        _check_type(path, name, _SAFETENSORS_TYPES.get(about.get_dtype(), about.get_dtype()))
        total += int(np.prod([int(n) for n in about.get_shape()], dtype=object))
        _check_size(path, name, total)
      tensors = {name: file.get_tensor(name) for name in names}
      return Read(tensors, _settings((file.metadata() or {}).get(_SETTINGS), path))
  except FileNotFoundError:
    raise UserError(f"There is no file {path}.") from None
  except (SafetensorError, OSError, ValueError) as error:
    raise UserError(f"{path} is not a readable safetensors file ({_first_line(error)}).") from None


def write_safetensors(path: Path, tensors: Tensors, settings: str | None) -> None:
  """Writes tensors as safetensors, with the settings, as JSON, among the file's metadata."""
  metadata = {"format": "pt"} | ({} if settings is None else {_SETTINGS: settings})
  write_arrays(path, tensors, metadata)


def is_orbax(path: Path) -> bool:
  """Returns whether a folder is one Orbax checkpoint of a tree of arrays."""
  return (path / "_METADATA").is_file()


def read_orbax(path: Path) -> Read:
  """Returns the arrays of an Orbax checkpoint; of nested trees the names are joined by dots.

  Raises:
    UserError: it is damaged, or holds anything but floating-point arrays.
  """
  silence_orbax()
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      metadata = checkpointer.metadata(path.absolute())
      tree = getattr(metadata.item_metadata, "tree", metadata.item_metadata)
      total = 0
      for name, about in _named(tree):
        _check_type(path, name, str(np.dtype(about.dtype)))
        total += int(np.prod([int(n) for n in about.shape], dtype=object))
        _check_size(path, name, total)
      as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
      restored = checkpointer.restore(path.absolute(), args=ocp.args.PyTreeRestore(restore_args=as_arrays))
      about = metadata.custom_metadata or {}
  except UserError:
    raise
  except Exception as error:  # what a damaged file makes Orbax raise is any of a dozen types
    if array := re.search(r'"([^"/]{1,80})/\.zarray"', str(error)):
      raise UserError(f"{path} is damaged: {_short(array[1])} cannot be read.") from None
    raise UserError(f"{path} is not a readable Orbax checkpoint of weights ({_first_line(error)}).") from None
  tensors = {name: np.asarray(value) for name, value in _named(restored)}
  if about.get("weights", content_hash(tensors)) != content_hash(tensors):
    raise UserError(f"{path} is damaged: the weights are not those that were written.")
  return Read(tensors, _settings(about.get(_SETTINGS), path))


def write_orbax(path: Path, tensors: Tensors, settings: str | None) -> None:
  """Writes one Orbax checkpoint: a flat dictionary of arrays, with the settings and a hash beside it.

  Raises:
    UserError: an array is empty, which Orbax cannot store.
  """
  if empty := [name for name, value in tensors.items() if value.size == 0]:
    raise UserError(f"{empty[0]} is empty, which Orbax cannot store; choose a .safetensors file.")
  about = {"weights": content_hash(tensors)} | ({} if settings is None else {_SETTINGS: settings})
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path.absolute(), {k: np.array(v) for k, v in tensors.items()}, custom_metadata=about)


def silence_orbax() -> None:
  """Keeps off the terminal what Orbax says of a damaged checkpoint beside the error that it raises.

  It warns, and threads that were still reading then report to an event loop that is closed, once an array.
  """
  logging.getLogger("absl").setLevel(logging.ERROR)
  if sys.unraisablehook is not _unraisable:
    _hooks.append(sys.unraisablehook)
    sys.unraisablehook = _unraisable


_hooks: list[Callable] = []


def _unraisable(fault) -> None:
  if not (isinstance(fault.exc_value, RuntimeError) and "Event loop is closed" in str(fault.exc_value)):
    _hooks[-1](fault)


def _named(tree) -> list[tuple[str, object]]:
  """(name, leaf) of every leaf of a nested tree, keys joined by dots."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [(".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path), leaf) for path, leaf in leaves]


def _settings(text: str | None, path: Path) -> Settings | None:
  """Settings out of a file's metadata."""
  if text is None:
    return None
  try:
    value = parse_json(text)
  except ValueError as error:
    raise UserError(f"{path}: the settings among its metadata are damaged ({_first_line(error)}).") from None
  if not isinstance(value, dict):
    raise UserError(f"{path}: the settings among its metadata are not a JSON object.")
  return from_dict(value, where=f"{path}, settings")


def _check_type(path: Path, name: str, type_name: str) -> None:
  if type_name not in TYPES:
    raise UserError(f"{path}: {_short(name)} is {_short(type_name)}; weights are {', '.join(TYPES)}.")


def _check_size(path: Path, name: str, total: int) -> None:
  if total > MAX_PARAMETERS:
    raise UserError(f"{path}: with {_short(name)} there are {total:,} values; at most {MAX_PARAMETERS:,} are possible.")


def _short(text: object) -> str:
  """The beginning of a name out of a file, on one line."""
  text = str(text)
  return (text if len(text) <= 80 else f"{text[:80]}…") if text.isprintable() else repr(text[:80])


def _first_line(error: BaseException) -> str:
  text = (str(error) or type(error).__name__).splitlines()[0]
  return text[:200].rstrip(".")
