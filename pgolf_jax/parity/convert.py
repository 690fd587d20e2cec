"""Weights from one form into another: PyTorch state dict, safetensors, Orbax checkpoint, run folder, artifact.

Names are the recipe's; a state dict whose matrices stand by layer (`blocks.3.attn.c_q.weight`) is read too. Files keep
every bit. A run folder holds float32: what is coarser is widened exactly, and comes out again as it went in.
"""

import collections
import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from pgolf_jax.errors import UserError
from pgolf_jax.model import params as parameters
from pgolf_jax.model.params import SOFTCAPS
from pgolf_jax.parity import weights
from pgolf_jax.parity.weights import TYPES, Read, Tensors
from pgolf_jax.quantize import artifact
from pgolf_jax.quantize.artifact.tensors import BANKS, unbank
from pgolf_jax.quantize.make import portable
from pgolf_jax.run_folder import CONVERTED, RunFolder, made_from
from pgolf_jax.runtime.distributed import data_mesh
from pgolf_jax.runtime.files import file_hash, read_json, remove, write_json
from pgolf_jax.settings import ModelConfig, Settings, check
from pgolf_jax.settings.load import to_dict
from pgolf_jax.training.checkpoint import Checkpoints
from pgolf_jax.training.step import TrainStep

Form = Literal["pt", "safetensors", "orbax", "run", "artifact"]
NAMES = {
  "pt": "PyTorch state dict",
  "safetensors": "safetensors",
  "orbax": "Orbax checkpoint",
  "run": "run folder",
  "artifact": "artifact",
}
_SUFFIXES = {".pt": "pt", ".pth": "pt", ".bin": "pt", ".safetensors": "safetensors", ".orbax": "orbax", "": "run"}

_MOST_LAYERS = 1000


@dataclasses.dataclass(frozen=True)
class Choices:
  """What the forms leave open.

  Args:
    settings: of the model and its run, over those that lie beside the weights.
    weights: of a run: its moving average, or the weights of the last step.
    key: of the state dict in a file of several.
    form: of the target; by its name if None.
    by_layer: write the matrices one by one, as scripts without banks have them.
  """

  settings: Settings | None = None
  weights: Literal["averaged", "raw"] = "averaged"
  key: str | None = None
  form: Form | None = None
  by_layer: bool = False


def convert(source: Path, target: Path, choices: Choices = Choices()) -> list[str]:
  """Writes the weights of `source` as `target`; returns sentences about what was done.

  Raises:
    UserError: the source cannot be read, its tensors are not those of the settings' model or of any, the target exists
      or cannot hold them.
  """
  form = _target_form(target, choices)
  source_form = form_of(source)
  if form == "run" and source_form in ("artifact", "run"):
    raise UserError(
      f"{source} is {_article(NAMES[source_form])}, which becomes a file (.pt, .safetensors) or a bare Orbax "
      "checkpoint (.orbax), not another run folder."
    )
  read = _read(source, source_form, choices)
  tensors = _banked(read.tensors, str(source))
  settings = choices.settings or read.settings
  added: list[str] = []
  said = [f"{source}: {NAMES[source_form]}, {_described(read.tensors)}{f' ({read.note})' if read.note else ''}"]
  if settings is None:
    model = infer(tensors, str(source))
    if form == "run":
      raise UserError(
        f"A run folder needs settings, which {source} does not hold; name a config with --config. Its tensors give "
        f"{_sizes(model)}."
      )
    said.append(f"sizes, from the tensors: {_sizes(model)}")
  else:
    model = settings.model
    if form == "run" or choices.settings is not None:
      tensors, added = _with_softcaps(tensors, model)
      said += [f"{name}: added, neutral at {model.logit_softcap:g}" for name in added]
    elif not any(name in tensors for name in SOFTCAPS):  # an older state dict; it comes out as it went in
      model = dataclasses.replace(model, asym_logit_rescale=False)
    parameters.check(model, tensors, str(source))
  tensors = {name: tensors[name] for name in parameters.shapes(model)}
  if form == "run":
    said += _write_run(target, settings, tensors, _origin(source, source_form, read, added))
  else:
    named = {name: np.asarray(x) for name, x in unbank(tensors).items()} if choices.by_layer else tensors
    metadata = None if settings is None else json.dumps(portable(settings))
    target.parent.mkdir(parents=True, exist_ok=True)
    match form:
      case "pt":
        weights.write_torch(target, named)
      case "safetensors":
        weights.write_safetensors(target, named, metadata)
      case "orbax":
        weights.write_orbax(target, named, metadata)
    said.append(f"{target}: {NAMES[form]}, {_described(named)}")
  return said


def form_of(path: Path) -> Form:
  """Returns the form of weights that exist, by what is in the file or folder.

  Raises:
    UserError: there is nothing, or nothing that holds weights.
  """
  if path.is_dir():
    if (path / "config.toml").is_file() or _run_of_step(path) is not None:
      return "run"
    if weights.is_orbax(path):
      return "orbax"
    raise UserError(f"{path} is neither a run folder (it has no config.toml) nor an Orbax checkpoint.")
  try:
    with path.open("rb") as file:
      head = file.read(9)
  except FileNotFoundError:
    raise UserError(f"There is no file or folder {path}.") from None
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror}).") from None
  if head.startswith(b"PGOLFJAX"):
    return "artifact"
  if head[8:] == b"{":
    return "safetensors"
  if head.startswith((b"PK\x03\x04", b"\x80")) or _SUFFIXES.get(path.suffix) == "pt":
    return "pt"
  if path.suffix == ".safetensors":
    return "safetensors"
  raise UserError(f"{path} holds no weights in a known form; those are .pt, .safetensors, .pgolf, Orbax, run folders.")


def infer(tensors: Tensors, where: str) -> ModelConfig:
  """Returns a config whose model has tensors of these shapes.

  Shapes do not tell which layers are looped, where lanes begin, what rotates, nor slopes: these are not the model's.

  Raises:
    UserError: they are not the tensors of any model of the recipe; the message names one that does not fit.
  """

  def shape(name: str, dimensions: int) -> tuple[int, ...]:
    if name not in tensors:
      raise UserError(f"{where}: {name} is missing, so these are not the weights of the recipe's model.")
    if len(found := tensors[name].shape) != dimensions or 0 in found:
      raise UserError(f"{where}: {name} has the shape {found}; it needs {dimensions} dimensions of at least 1.")
    return found

  vocab, width = shape("tok_emb.weight", 2)
  layers, rest = divmod(shape("qo_bank", 3)[0], 2)
  [heads] = shape("blocks.0.attn.q_gain", 1)
  kv_width = shape("kv_bank", 3)[1]
  hidden = shape("mlp_up_bank", 3)[1]
  if rest or not 1 <= layers <= _MOST_LAYERS:
    raise UserError(
      f"{where}: qo_bank holds {2 * layers + rest} matrices; it needs two for each of 1 to {_MOST_LAYERS} layers."
    )
  if width % heads or kv_width % (width // heads) or heads % (kv_heads := kv_width // (width // heads)):
    raise UserError(
      f"{where}: kv_bank has the width {kv_width}, which {heads} heads of {width} dimensions cannot share."
    )
  window = next((x.shape[-1] for name, x in tensors.items() if name.endswith(("attn_gate_w", "smear_gate.weight"))), 12)
  base = ModelConfig()
  model = dataclasses.replace(
    base, vocab_size=vocab, num_layers=layers, model_dim=width, num_heads=heads, num_kv_heads=kv_heads,
    mlp_mult=hidden / width, gate_window=window, skip_gates="skip_gates" in tensors,
    smear_gate="smear_lambda" in tensors, asym_logit_rescale=any(name in tensors for name in SOFTCAPS),
    sparse_attn_gate="blocks.0.attn.attn_gate_w" in tensors, num_loops=0,
    value_residual="value_shares" in tensors, dense_skips=max(0, len(tensors.get("dense_skip_biases", ())) - 1),
  )  # fmt: skip
  if model.mlp_dim != hidden:  # the quotient was rounded down
    model = dataclasses.replace(model, mlp_mult=(hidden + 0.5) / width)
  if layers // 2 < (rows := shape("skip_weights", 2)[0]) <= _MOST_LAYERS:  # one layer, looped often enough
    model = dataclasses.replace(model, num_loops=2 * rows - layers, loop_start=0, loop_end=0)
  parameters.check(model, tensors, f"{where} (sizes taken from other tensors)")
  return model


def _sizes(model: ModelConfig) -> str:
  names = ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult")
  return ", ".join(f"model.{name}={getattr(model, name):g}" for name in names)


def _target_form(target: Path, choices: Choices) -> Form:
  form = choices.form or _SUFFIXES.get(target.suffix.lower())
  if form == "artifact" or target.suffix == ".pgolf":
    raise UserError("Artifacts are made by quantising: convert into a run folder, then `pgolf quantize RUN`.")
  if form is None:
    raise UserError(
      f"{target}: the form does not follow from {target.suffix}; name it with --form, such as --form run."
    )
  if form == "run" and choices.by_layer:
    raise UserError("A run folder holds banks; --by-layer is for .pt, .safetensors and .orbax.")
  if target.exists() or target.is_symlink():
    raise UserError(f"{target} exists and is not overwritten; remove it, or name another.")
  return form


def _read(source: Path, form: Form, choices: Choices) -> Read:
  if choices.key is not None and form != "pt":
    raise UserError(f"--key names an entry of a PyTorch file; {source} is {_article(NAMES[form])}.")
  if choices.weights != "averaged" and form != "run":
    raise UserError(f"--weights raw is a choice of run folders; {source} is {_article(NAMES[form])}.")
  match form:
    case "pt":
      return weights.read_torch(source, choices.key)
    case "safetensors":
      return weights.read_safetensors(source)
    case "orbax":
      return weights.read_orbax(source)
    case "artifact":
      settings, params = artifact.load(source)
      return Read(params, settings, "its quantised weights, dequantised")
  return _read_run(source, choices.weights)


def _run_of_step(path: Path) -> int | None:
  """The step of a folder RUN/checkpoints/STEP."""
  path = path.absolute()
  is_step = path.name.isdigit() and path.parent.name == "checkpoints" and (path.parents[1] / "config.toml").is_file()
  return int(path.name) if is_step else None


def _read_run(path: Path, which: str) -> Read:
  step = None if (path / "config.toml").is_file() else _run_of_step(path)
  run = RunFolder(path if step is None else path.absolute().parents[1])
  if not run.checkpoints.is_dir():
    raise UserError(f"{run.path} has no checkpoints; `pgolf train CONFIG --out {run.path}` makes some.")
  weights.silence_orbax()
  checkpoints = _checkpoints(run, writes=False)
  try:
    there = checkpoints.steps()
    if not there:
      raise UserError(f"{run.path} has no whole checkpoint; `pgolf train CONFIG --out {run.path}` makes one.")
    finished = run.results().get("train", {}).get("steps")
    step = finished if step is None and finished in there else there[-1] if step is None else step
    params = checkpoints.restore_average(step) if which == "averaged" else checkpoints.restore(step)[0].params
  finally:
    checkpoints.close()
  tensors = {name: np.asarray(value) for name, value in params.items()}
  note = f"{which} weights of step {step}{'' if step == finished else ', training is not finished'}"
  if step == 0 and (run.path / CONVERTED).is_file():
    return Read(_as_it_came(tensors, run.path / CONVERTED), run.settings, "as they were converted into it")
  return Read(tensors, run.settings, note)


def _checkpoints(run: RunFolder, *, writes: bool) -> Checkpoints:
  return Checkpoints(run.checkpoints, TrainStep(run.settings, data_mesh(jax.devices()[:1])), writes=writes)


def _origin(source: Path, form: Form, read: Read, added: list[str]) -> dict:
  """What a run folder says of weights that were converted into it."""
  return {
    "from": str(source.absolute()),
    "form": form,
    "sha256": file_hash(source),
    "types": {name: str(x.dtype) for name, x in _banked(read.tensors, "").items() if x.dtype != np.float32},
    "added": added,
  }


def _as_it_came(tensors: Tensors, path: Path) -> Tensors:
  """Converted weights in the types that they had, without what was added."""
  about = read_json(path)
  types, added = about.get("types"), about.get("added")
  if not isinstance(types, dict) or not isinstance(added, list) or not set(types.values()) <= set(TYPES):
    raise UserError(f"{path} is damaged; convert {about.get('from', 'the weights')} again.")
  return {name: x.astype(TYPES[types.get(name, "float32")]) for name, x in tensors.items() if name not in added}


def _write_run(target: Path, settings: Settings, tensors: Tensors, origin: dict) -> list[str]:
  """Makes a run folder whose training counts as complete after no step; it appears whole or not at all."""
  check.check(settings)
  single = {name: _single(name, value) for name, value in tensors.items()}
  partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
  remove(partial)
  try:
    run = RunFolder(partial, settings)
    write_json(run.path / CONVERTED, origin)
    checkpoints = _checkpoints(run, writes=True)
    try:
      state = TrainStep(settings, data_mesh(jax.devices()[:1])).init(single)
      nowhere = {"loader": {"shard": 0, "cursor": 0}, "schedule": {"seq_len": -1, "changed_at": -1, "looping": 0}}
      about = {"elapsed": 0.0, "metrics": [], "settings": to_dict(settings), "shards": {}, "origin": origin}
      checkpoints.save(0, state, nowhere | about)
    finally:
      checkpoints.close()
    result = {
      "steps": 0,
      "seconds": 0.0,
      "tokens": 0,
      "tokens_per_second": 0.0,
      "parameters": parameters.count(settings.model),
      "weights": parameters.content_hash(single),
      "converted_from": origin["from"],
      "stage_seconds": 0.0,
    }
    run.finish("train", result, made_from(run, "train", settings.data.path))
    os.replace(partial, target)
  except BaseException:
    remove(partial)
    raise
  said = [f"{target}: {NAMES['run']}, {_described(single)}"]
  if changed := [name for name in tensors if tensors[name].dtype != np.float32]:
    some = ", ".join(f"{name} from {tensors[name].dtype}" for name in changed[:3])
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    said.append(f"float32 holds exactly: {some}{more}; converted out of the folder they have their types again")
  said.append(
    f"`pgolf eval {target} --weights averaged --no-ttt` scores them, `pgolf quantize {target}` quantises them"
  )
  return said


def _single(name: str, value: np.ndarray) -> np.ndarray:
  """The values in float32, exactly."""
  if value.size == 0:
    raise UserError(f"{name} is empty, which a run folder's checkpoint cannot store; choose a .safetensors file.")
  if not np.isfinite(value.astype(np.float32)).all():
    raise UserError(f"{name} holds values that are not finite in float32; a run folder needs finite ones.")
  if not np.array_equal(value.astype(np.float32).astype(np.float64), value.astype(np.float64)):
    raise UserError(f"{name} is {value.dtype} with digits that float32, which a run folder holds, would lose.")
  return value.astype(np.float32)


def _banked(tensors: Tensors, where: str) -> Tensors:
  """The tensors with matrices that stand by layer stacked into banks, in their own type."""
  banks, taken = {}, set()
  for bank, suffixes in BANKS.items():
    parts = [_layers(tensors, suffix) for suffix in suffixes]
    names = [name for part in parts for name in part]
    if not names:
      continue
    if bank in tensors:
      raise UserError(f"{where}: {bank} and {names[0]} are both there, and mean the same.")
    for suffix, part in zip(suffixes, parts, strict=True):
      if wanted := [n for i in range(max(map(len, parts))) if (n := f"blocks.{i}.{suffix}") not in part]:
        raise UserError(f"{where}: {wanted[0]} is missing.")
    for name in names:
      first = tensors[names[0]]
      if (tensors[name].shape, tensors[name].dtype) != (first.shape, first.dtype):
        raise UserError(
          f"{where}: {name} is {tensors[name].dtype} of the shape {tensors[name].shape}, but {names[0]}, which stands "
          f"in the same bank, {first.dtype} of {first.shape}."
        )
    banks[bank] = np.stack([tensors[name] for name in names])
    taken.update(names)
  return banks | {name: value for name, value in tensors.items() if name not in taken} if banks else tensors


def _layers(tensors: Iterable[str], suffix: str) -> list[str]:
  """Names `blocks.N.suffix`, in the order of N."""
  numbers = [name.removeprefix("blocks.").removesuffix(f".{suffix}") for name in tensors if name.startswith("blocks.")]
  return [f"blocks.{n}.{suffix}" for n in sorted(int(n) for n in numbers if n.isdecimal() and len(n) < 6)]


def _with_softcaps(tensors: Tensors, model: ModelConfig) -> tuple[Tensors, list[str]]:
  """The tensors with evaluation caps where older state dicts lack them, at the value that changes nothing."""
  if not model.asym_logit_rescale or any(name in tensors for name in SOFTCAPS):
    return tensors, []
  return tensors | {name: np.array(model.logit_softcap, np.float32) for name in SOFTCAPS}, list(SOFTCAPS)


def _described(tensors: Tensors) -> str:
  """How many tensors, parameters, and of which types."""
  types = collections.Counter(str(x.dtype) for x in tensors.values())
  few = {kind: next(name for name, x in tensors.items() if str(x.dtype) == kind) for kind, n in types.items() if n == 1}
  kinds = ", ".join(f"{few[kind]} {kind}" if kind in few else kind for kind, _ in types.most_common())
  return f"{len(tensors)} tensors, {sum(x.size for x in tensors.values()):,} parameters, {kinds}"


def _article(noun: str) -> str:
  return f"{'an' if noun[0] in 'aO' else 'a'} {noun}"
