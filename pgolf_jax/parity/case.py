"""A golden case on disk: inputs and outputs of the PyTorch reference, and the settings it ran with.

A case is a folder:

    case.json             kind, settings (environment names, values as strings), and what the kind needs besides
    inputs.safetensors    tensors by name; parameters under `params/`
    expected.safetensors  what the reference made of them
    data/                 shards, for the kinds that read text

The kind `caseops` has `docs.jsonl` and `expected.jsonl` instead.
"""

import dataclasses
import json
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from pgolf_jax.errors import UserError
from pgolf_jax.settings.config import Settings
from pgolf_jax.settings.load import check_env_names, from_env

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
  """One case. Raises UserError, naming the file, where something is missing or unreadable."""

  folder: Path
  about: dict

  @classmethod
  def load(cls, folder: str | Path) -> "Case":
    path = Path(folder) / "case.json"
    try:
      about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
      raise UserError(f"{folder} is not a golden case: it has no case.json.") from None
    except ValueError as e:
      raise UserError(f"{path} is not valid JSON: {e}.") from None
    if "kind" not in about:
      raise UserError(f"{path} names no kind.")
    return cls(Path(folder), about)

  @property
  def kind(self) -> str:
    return self.about["kind"]

  @cached_property
  def settings(self) -> Settings:
    """The case's settings, in its types, on its number of ranks."""
    environ = self.about.get("settings", {})
    check_env_names(environ)
    settings = from_env(environ)
    replace = dataclasses.replace
    dtype = self.about.get("dtype", "float32")
    world = self.about.get("world_size", 1)
    micro_batches = world * self.about.get("grad_accum_steps", settings.train.micro_batches // world)
    return replace(
      settings,
      train=replace(settings.train, compute_dtype=dtype, world_size=world, micro_batches=micro_batches),
      eval=replace(settings.eval, micro_batches=micro_batches),
      quantize=replace(settings.quantize, calibration_micro_batches=micro_batches),
      optimizer=replace(settings.optimizer, muon_dtype=self.about.get("muon_dtype", "float32")),
    )

  @cached_property
  def inputs(self) -> Arrays:
    return read(self.folder / "inputs.safetensors")

  @cached_property
  def expected(self) -> Arrays:
    return read(self.folder / "expected.safetensors")

  @property
  def data(self) -> Path:
    return self.folder / self.about.get("data", "data")

  def params(self, prefix: str = "params/", source: Arrays | None = None) -> Arrays:
    """The parameters under a prefix of the inputs, or of another set of arrays."""
    source = self.inputs if source is None else source
    found = {name.removeprefix(prefix): value for name, value in source.items() if name.startswith(prefix)}
    if not found:
      raise UserError(f"{self.folder}: no tensor is named {prefix}….")
    return found


def read(path: Path) -> Arrays:
  """Tensors of a safetensors file, by name."""
  try:
    return load_file(path)
  except FileNotFoundError:
    raise UserError(f"{path} is missing.") from None
  except SafetensorError as e:
    raise UserError(f"{path} is not a readable safetensors file: {e}.") from None
