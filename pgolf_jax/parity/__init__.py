"""A golden case: what the PyTorch reference was given, the settings that it ran with, and what it computed.

A case is a folder:

    case.json             kind, settings (environment names, values as strings), and what the kind needs besides
    inputs.safetensors    tensors by name; parameters under `params/`
    expected.safetensors  the reference's outputs by name
    data/                 shards, for the kinds that read text

The kind `caseops` has `docs.jsonl` and `expected.jsonl` instead.

A `forward` case may hold activations, of any of the forward passes and as many as its maker had hooks for: under
`loop0/activations/` and `loop1/activations/`, each [T, …], named as `model.Context.tap` names them. They are compared
in forward order, so that a mistake shows where it was made.

`floor` in case.json, tensor → number, is the reference's own perturbation floor: how far each of its outputs moved, in
the measure of the tensor's tolerance (check.py), when it ran again with every input of `perturbed(inputs)`. A case may
leave it out; then ours is measured.
"""

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from pgolf_jax.errors import UserError
from pgolf_jax.runtime.files import read_json, read_json_lines, write_arrays, write_json_lines
from pgolf_jax.settings import Settings
from pgolf_jax.settings.load import check_env_names, from_env

Arrays = dict[str, np.ndarray]
Outputs = Arrays | list[dict]
"""Tensors by name; for the kind `caseops` one dictionary per document."""


class Types(NamedTuple):
  """Floating-point types, by name."""

  compute: str  # of the model and of test-time training
  muon: str  # of the orthogonalisation


@dataclasses.dataclass(frozen=True)
class Case:
  """One golden case. Reading it raises UserError, which names the file that is missing or unreadable.

  Args:
    folder: where it is.
    about: the contents of case.json.
    dtype: type to compute in, in place of the one that the reference computed in.
    perturbation: every parameter, gradient and moment is multiplied by 1 ± this, with random signs; the parameters of
      an `optimizer` case are not, since its steps are measured from them.
    tokenizer: SentencePiece model of a `caseops` case, where it is not beside the case.
  """

  folder: Path
  about: dict
  dtype: str | None = None
  perturbation: float = 0.0
  tokenizer: Path | None = None

  @classmethod
  def load(cls, folder: str | Path, **changes) -> "Case":
    """Reads case.json; `changes` are fields of the case."""
    path = Path(folder) / "case.json"
    if not path.exists():
      raise UserError(f"{folder} is not a golden case: it has no case.json.")
    about = read_json(path)
    if not isinstance(about.get("kind"), str):
      raise UserError(f"{path} does not name the kind of the case.")
    environ = about.get("settings", {})
    if not isinstance(environ, dict) or not all(isinstance(value, str) for value in environ.values()):
      raise UserError(f"{path} has settings that are not environment names with strings.")
    return cls(Path(folder), about, **changes)

  @property
  def kind(self) -> str:
    return self.about["kind"]

  @property
  def types(self) -> Types:
    """The types to compute in; quantising is always in float32, and hints are integers."""
    if self.dtype and self.kind in ("forward", "optimizer", "train", "e2e", "ttt"):
      return Types(self.dtype, self.dtype)
    return self.reference_types

  @property
  def reference_types(self) -> Types:
    """The types that the reference computed in."""
    return Types(self.about.get("dtype", "float32"), self.about.get("muon_dtype", "float32"))

  @cached_property
  def settings(self) -> Settings:
    """Settings for the case's number of ranks, computing in its types; programs for float64 are traced in float32."""
    compute, muon = (name.replace("float64", "float32") for name in self.types)
    environ = self.about.get("settings", {})
    check_env_names(environ)
    settings = from_env(environ)
    world = self.about.get("world_size", 1)
    micro_batches = world * self.about.get("grad_accum_steps", settings.train.micro_batches // world)
    return dataclasses.replace(
      settings,
      train=dataclasses.replace(settings.train, compute_dtype=compute, world_size=world, micro_batches=micro_batches),
      eval=dataclasses.replace(settings.eval, micro_batches=micro_batches),
      quantize=dataclasses.replace(settings.quantize, calibration_micro_batches=micro_batches),
      optimizer=dataclasses.replace(settings.optimizer, muon_dtype=muon),
    )

  @cached_property
  def inputs(self) -> Arrays:
    return self._perturb(_read_arrays(self.folder / "inputs.safetensors"))

  @property
  def floor(self) -> dict[str, float]:
    """The reference's own perturbation floor by tensor; empty where the case does not hold it."""
    return self.about.get("floor", {})

  @cached_property
  def expected(self) -> Outputs:
    """What the reference computed."""
    if self.kind == "caseops":
      return read_json_lines(self.folder / "expected.jsonl")
    return _read_arrays(self.folder / "expected.safetensors")

  @property
  def data(self) -> Path:
    """Folder of shards."""
    return self.folder / self.about.get("data", "data")

  def under(self, prefix: str) -> Arrays:
    """Inputs whose names begin with `prefix`, by the rest of their names."""
    return _under(prefix, self.inputs, self.folder)

  def expected_under(self, prefix: str) -> Arrays:
    """Outputs of the reference that a later part of the same case starts from, as `under`."""
    return _under(prefix, self._perturb(self.expected), self.folder)

  def read_outputs(self, path: Path) -> Outputs:
    """Outputs that `write_outputs` wrote."""
    return read_json_lines(path) if self.kind == "caseops" else _read_arrays(path)

  def _perturb(self, arrays: Arrays) -> Arrays:
    if not self.perturbation:
      return arrays
    fixed = ("params/",) if self.kind == "optimizer" else ()
    return perturbed(arrays, self.perturbation, fixed=fixed)


def perturbed(arrays: Arrays, amount: float, *, fixed: tuple[str, ...] = ()) -> Arrays:
  """Returns floating-point arrays times 1 ± amount, with random signs that are the same every time.

  Args:
    arrays: in the order of a file.
    fixed: beginnings of the names of arrays that stay as they are.
  """
  rng = np.random.default_rng(0)

  def moved(name: str, value: np.ndarray) -> np.ndarray:
    if not np.issubdtype(value.dtype, np.floating) or name.startswith(fixed):
      return value
    return (value * (1 + amount * rng.choice([-1.0, 1.0], value.shape))).astype(value.dtype)

  return {name: moved(name, value) for name, value in arrays.items()}


def find_cases(folder: Path) -> list[Path]:
  """Folders of golden cases directly inside a folder, by name."""
  cases = sorted(path.parent for path in folder.glob("*/case.json"))
  if not cases:
    raise UserError(f"{folder} contains no golden cases: no folder in it has a case.json.")
  return cases


def shipped_cases() -> Path:
  """The folder of the small cases that come with the package; in a checkout, its tests/golden."""
  installed = Path(__file__).parent / "golden"
  return installed if installed.is_dir() else Path(__file__).parents[2] / "tests" / "golden"


def write_outputs(path: Path, outputs: Outputs) -> None:
  """Writes tensors as safetensors, documents as JSON lines."""
  if isinstance(outputs, dict):
    write_arrays(path, outputs)
  else:
    write_json_lines(path, outputs)


def _under(prefix: str, arrays: Arrays, folder: Path) -> Arrays:
  selected = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
  if not selected:
    raise UserError(f"{folder} has no tensor whose name begins with {prefix}.")
  return selected


def _read_arrays(path: Path) -> Arrays:
  try:
    return load_file(path)
  except FileNotFoundError:
    raise UserError(f"{path} is missing.") from None
  except SafetensorError as e:
    raise UserError(f"{path} is not a readable safetensors file: {e}.") from None
