"""Someone's PyTorch training script as a module: its settings as it resolved them, its model, what it offers."""

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import io
import os
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pgolf_jax.errors import UserError
from pgolf_jax.model import params as parameters
from pgolf_jax.parity import weights
from pgolf_jax.parity.dump.stand_ins import Places
from pgolf_jax.settings import Settings, schedules
from pgolf_jax.settings.load import FIXED, env_names, flattened, from_env

FORCED = {
  "CASEOPS_ENABLED": "1",
  "FUSED_CE_ENABLED": "0",
  "MAX_WALLCLOCK_SECONDS": "0",
  "NGRAM_HINT_PRECOMPUTE_OUTSIDE": "0",
  "VAL_LOSS_EVERY": "0",
  "WARMUP_STEPS": "0",
}
"""What every dump sets: bytes from a sidecar, plain kernels, schedules by steps, no warm-up."""

_OF_THE_MACHINE = ("DATA_PATH", "TOKENIZER_PATH", "WORLD_SIZE")
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "FORCE_STOP_STEP")
_MODULE = "pgolf_dumped_script"
_HINTS_MODULE = "online_ngram_tilt"


def as_environment(settings: Settings) -> dict[str, str]:
  """Returns settings under their environment names, as text, without unset ones and those of a machine."""
  values = flattened(settings)
  return {
    env: _text(values[name])
    for env, name in env_names().items()
    if env not in _OF_THE_MACHINE and values[name] is not None
  }


def _text(value: object) -> str:
  if isinstance(value, bool):
    return str(int(value))
  return schedules.as_text(value) if isinstance(value, tuple) else str(value)


@contextlib.contextmanager
def environment(wanted: Mapping[str, str]) -> Iterator[None]:
  """Within it, the process's environment has these names too, and none of a launcher's."""
  before = dict(os.environ)
  for name in _RANKS:
    os.environ.pop(name, None)
  os.environ.update(wanted)
  try:
    yield
  finally:
    os.environ.clear()
    os.environ.update(before)


@dataclasses.dataclass
class Script:
  """An imported script.

  Attributes:
    path: its file.
    module: what its names are bound in.
    hyperparameters: an instance of its `Hyperparameters`.
    places: the stand-ins it runs with.
    printed: what it printed.
  """

  path: Path
  module: types.ModuleType
  hyperparameters: Any
  places: Places
  printed: io.StringIO

  @classmethod
  def load(cls, path: Path, places: Places) -> "Script":
    """Imports a script, with its folder on the path and stand-ins for Triton and FlashAttention.

    Raises:
      UserError: it is not there, cannot be imported, or has no `GPT` or `Hyperparameters`.
    """
    if not path.is_file():
      raise UserError(f"There is no script {path}.")
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None:
      raise UserError(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module
    sys.path.insert(0, str(path.resolve().parent))
    printed = io.StringIO()
    with places.hidden_packages(), contextlib.redirect_stdout(printed):
      try:
        spec.loader.exec_module(module)
      except (Exception, SystemExit) as e:
        raise UserError(f"{path} cannot be imported: {type(e).__name__}: {e}.") from e
    for name in ("GPT", "Hyperparameters"):
      if not hasattr(module, name):
        raise UserError(f"{path} has no {name}; a script to dump from has a model GPT and settings Hyperparameters.")
    places.enter(module)
    return cls(path, module, module.Hyperparameters(), places, printed)

  @property
  def sha256(self) -> str:
    return hashlib.sha256(self.path.read_bytes()).hexdigest()

  @property
  def hints_module(self) -> types.ModuleType | None:
    """Where `build_hints_for_targets` is: the script, or the module of hints beside it."""
    if hasattr(self.module, "build_hints_for_targets"):
      return self.module
    if not (self.path.resolve().parent / f"{_HINTS_MODULE}.py").exists():
      return None
    with self.places.hidden_packages():
      return importlib.import_module(_HINTS_MODULE)

  def offers(self, name: str) -> bool:
    """Whether the script has a function or class; `GPT.forward_logits` names a method."""
    if name == "build_hints_for_targets":
      return self.hints_module is not None and hasattr(self.hints_module, name)
    owner: Any = self.module
    for part in name.split("."):
      owner = getattr(owner, part, None)
    return owner is not None

  def make_model(self, seed: int, checkpoint: Path | None, noise: float) -> torch.nn.Module:
    """The model in float32: initial weights, then a checkpoint's, then noise on all of them.

    Args:
      noise: standard deviation of what is added: of a matrix over the root of its width, else relative to a value.
    """
    torch.manual_seed(seed)
    model = self.module.GPT(self.hyperparameters).float().to(self.places.device)
    self.places.without_fused_mlp(model)
    if checkpoint is not None:
      load_checkpoint(model, checkpoint)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
      for value in model.parameters() if noise else ():
        scale = value.shape[-1] ** -0.5 if value.ndim > 1 else torch.where(value == 0, 1.0, value.abs())
        value += noise * scale * torch.randn(value.shape, generator=generator).to(value.device)
    return model

  def resolved(self, model: torch.nn.Module) -> tuple[dict[str, str], list[str]]:
    """Every setting as the script resolved it, under its environment name; and those that it says nothing of.

    Raises:
      UserError: one that this package does not support, with the reason.
    """
    ours, values, silent = as_environment(Settings()), {}, []
    special = self._not_in_hyperparameters(model)
    for name in [*env_names(), *FIXED]:
      if name in _OF_THE_MACHINE:
        continue
      value = special.get(name, getattr(self.hyperparameters, name.lower(), None))
      if value is not None:
        values[name] = _text(value)
      elif name in ours:
        values[name] = os.environ.get(name, ours[name])
        silent.append(name)
    from_env(values)
    return values, silent

  def _not_in_hyperparameters(self, model: torch.nn.Module) -> dict[str, object]:
    found: dict[str, object] = {"ASYM_LOGIT_RESCALE": hasattr(model, "softcap_pos"), "FORCE_STOP_STEP": 0}
    adapters = getattr(self.module, "BatchedLinearLoRA", None)
    for name, attribute in (("TTT_LORA_ALPHA", "_ALPHA"), ("TTT_WARM_START_A", "_WARM_START_A")):
      if hasattr(adapters, attribute):
        found[name] = getattr(adapters, attribute)
    slope = _measured_slope(model)
    if slope is not None:
      found["LEAKY_RELU_SQ_SLOPE"] = slope
    return found


def _measured_slope(model: torch.nn.Module) -> float | None:
  """The slope below zero of the MLP's activation, for a script may write another in its code than in its settings."""
  try:
    mlp = model.blocks[0].mlp
    one = torch.ones(1, 1, device=next(model.parameters()).device)
    with torch.no_grad():
      return round(float(mlp(-one[None], one, one)) ** 0.5, 6)
  except Exception:  # another kind of MLP: what the settings say counts
    return None


def load_checkpoint(model: torch.nn.Module, path: Path) -> None:
  """Loads a state dict into a model, in float32; one without the softcaps of evaluation leaves them as they are.

  Raises:
    UserError: the file is unreadable, holds no state dict, or one of another model.
  """
  read = weights.read_safetensors if path.suffix == ".safetensors" else weights.read_torch
  state = dict(read(path).tensors)
  own = model.state_dict()
  for name in parameters.SOFTCAPS:
    if name in own and name not in state:
      state[name] = own[name].cpu().numpy()
  if missing := sorted(own.keys() - state.keys()):
    raise UserError(f"{path} has no {missing[0]}, which the script's model has ({len(missing)} such in all).")
  if unknown := sorted(state.keys() - own.keys()):
    raise UserError(f"{path} has {unknown[0]}, which the script's model has not ({len(unknown)} such in all).")
  for name, value in own.items():
    if tuple(state[name].shape) != tuple(value.shape):
      raise UserError(
        f"{path}: {name} has the shape {tuple(state[name].shape)}, but the script's settings give "
        f"{tuple(value.shape)}; give the sizes that it was trained with, as in --set MODEL_DIM=512."
      )
  model.load_state_dict({name: torch.tensor(value.astype(np.float32)) for name, value in state.items()})


def as_arrays(tensors: Mapping[str, torch.Tensor], prefix: str = "") -> dict[str, np.ndarray]:
  """Tensors as NumPy arrays that nothing changes later; floating-point ones in float32."""
  return {
    prefix + name: (value.detach().float() if value.is_floating_point() else value.detach()).cpu().numpy().copy()
    for name, value in tensors.items()
  }
