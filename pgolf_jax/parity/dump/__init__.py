"""Makes a golden case from someone's own PyTorch training script, and optionally from a checkpoint of it.

The script is imported, never run: its functions are called one by one, in float32, with stand-ins for what a machine
may lack (stand_ins.py). One process makes one case, for the script reads its settings from the environment when it is
imported. The case says what it was made from: the settings as the script resolved them, versions, device, stand-ins,
and the hashes of script and checkpoint.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pgolf_jax.errors import UserError
from pgolf_jax.model import params as parameters
from pgolf_jax.parity import Arrays, Case, write_outputs
from pgolf_jax.parity.check import distances
from pgolf_jax.parity.dump.job import Job
from pgolf_jax.parity.dump.kinds import KINDS
from pgolf_jax.parity.dump.script import FORCED, Script, as_environment, environment
from pgolf_jax.parity.dump.stand_ins import Places
from pgolf_jax.parity.tolerances import PERTURBATION
from pgolf_jax.runtime.files import remove, write_json, write_text
from pgolf_jax.runtime.log import progress
from pgolf_jax.settings import Settings, check
from pgolf_jax.settings.load import changed, env_names, from_env

NOISE = 0.3
"""Noise on initial weights: without it the zeros among them would hide most of the model."""

_TINY_MODEL: dict[str, object] = {
  "model.vocab_size": 64,
  "model.num_layers": 4,
  "model.model_dim": 48,
  "model.num_heads": 4,
  "model.num_kv_heads": 2,
  "model.mlp_mult": 2.0,
  "model.num_loops": 1,
  "model.loop_start": 1,
  "model.loop_end": 2,
  "model.parallel_start_layer": 3,
  "model.xsa_last_n": 3,
  "model.rope_dims": 8,
}
_TINY_ROWS: dict[str, object] = {
  "train.batch_tokens": 768,
  "train.seq_len": 96,
  "train.seq_schedule": "32@0.3,48@0.7,96@1",
  "train.schedule_mode": "step",
  "train.seq_change_warmup_steps": 3,
  "train.ema_decay": 0.9,
  "optimizer.muon_momentum_warmup_steps": 8,
  "eval.batch_tokens": 1024,
  "eval.seq_len": 64,
}
_TINY_SCORING: dict[str, object] = {
  "ttt.batch_size": 3,
  "ttt.seq_len": 64,
  "ttt.chunk_size": 16,
  "ttt.lora.rank": 4,
  "ttt.lora.lr": 0.003,
  "ttt.short.score_first_steps": "24:4,64:8",
  "ttt.phase.prefix_docs": 3,
  "ttt.phase.chunk_tokens": 128,
  "ttt.phase.lr": 0.1,
  "hints.order": 4,
  "hints.threshold": 0.6,
}
# Just large enough that matrices of every kind are quantised and not kept as float16.
_TINY_QUANTIZED: dict[str, object] = {
  "model.vocab_size": 256,
  "model.num_layers": 1,
  "model.model_dim": 272,
  "model.num_kv_heads": 4,
  "model.mlp_mult": 1.0,
  "model.num_loops": 0,
  "model.parallel_start_layer": 0,
  "quantize.calibration_batches": 4,
}


@dataclasses.dataclass(frozen=True)
class Request:
  """What to dump.

  Attributes:
    script: a PyTorch module with `GPT` and `Hyperparameters`.
    kind: one of `KINDS`.
    out: the folder to make.
    checkpoint: weights to start from; those that the script draws, and noise, if None.
    base: settings that the environment does not set: a tiny model's, the record run's, or the script's own defaults.
    changes: settings over those of the environment, by environment name.
    tokens: of the row (forward, optimizer, quantize) or the stream (train: for validation; ngram, ttt).
    documents: in the row or the stream, where it is not from `data`.
    max_doc_len: longest segment of a row, tokens; the mean length of the documents if None.
    steps: of optimizer and train.
    data: folder of shards to take text from; random documents if None.
    noise: see `Script.make_model`.
    activations: of every layer, in a case of the kind forward.
    floor: compute everything once more from inputs moved by 1e-7, to say how far the script's own outputs move.
  """

  script: Path
  kind: str
  out: Path
  checkpoint: Path | None = None
  base: Literal["tiny", "record", "script"] = "tiny"
  changes: dict[str, str] = dataclasses.field(default_factory=dict)
  tokens: int = 512
  documents: int = 8
  max_doc_len: int | None = None
  steps: int = 4
  seed: int = 0
  data: Path | None = None
  device: str = "cpu"
  noise: float = NOISE
  activations: bool = False
  floor: bool = True


def dump(request: Request) -> Case:
  """Makes the case of a request; its folder appears once it is complete.

  Raises:
    UserError: the folder is there already, the script lacks what the kind needs or has settings that this package
      does not support, or something that the request names cannot be read.
  """
  if request.out.exists() and (not request.out.is_dir() or any(request.out.iterdir())):
    raise UserError(f"{request.out} is there already; name another folder, or delete it.")
  if request.device == "cuda" and not torch.cuda.is_available():
    raise UserError("PyTorch sees no GPU here; dump with --device cpu.")
  partial = request.out.with_name(f".{request.out.name}.{os.getpid()}.partial")
  partial.mkdir(parents=True)
  try:
    _write(request, partial)
    if request.out.exists():
      request.out.rmdir()
    os.replace(partial, request.out)
  finally:
    remove(partial)
  return Case.load(request.out)


def _write(request: Request, folder: Path) -> None:
  """Writes the files of the case."""
  places = Places(request.device)
  with_floor = request.floor and request.kind != "ngram"
  with (
    environment(_environment(request)),
    places.in_float32(),
    _one_thread(request.base == "tiny"),
    progress(f"dumping {request.kind}", total=2 + with_floor, unit="parts") as bar,
  ):
    bar.note("importing the script")
    script = Script.load(request.script, places)
    _refuse_missing(script, request.kind)
    with contextlib.redirect_stdout(script.printed), _errors_of(script, request.kind):
      np.random.seed(request.seed)
      model = script.make_model(request.seed, request.checkpoint, request.noise)
      values, silent = script.resolved(model)
      settings = from_env(values)
      check.check(settings)
      shapes = {name: np.empty(p.shape, np.bool_) for name, p in model.named_parameters()}
      parameters.check(settings.model, shapes, f"The model of {request.script}")
      job, kind = _job(request, script, model, folder, settings), KINDS[request.kind]
      bar.note("inputs")
      inputs = kind.draw(job)
      bar.note("outputs")
      bar.advance()
      expected = kind.compute(job, inputs)
      bar.note("outputs, weights moved" if with_floor else "files")
      bar.advance()
      write_outputs(folder / "inputs.safetensors", inputs)
      write_outputs(folder / "expected.safetensors", expected)
      assumed = [name for name in silent if env_names().get(name, "").split(".")[0] in kind.sections]
      about = _about(request, script, values, assumed) | job.about
      write_json(folder / "case.json", about)
      if with_floor:
        write_json(folder / "case.json", about | {"floor": _floor(job, expected)})
        bar.advance()
  if script.printed.getvalue():
    write_text(folder / "script.log", script.printed.getvalue())


@contextlib.contextmanager
def _errors_of(script: Script, kind: str) -> Iterator[None]:
  """Turns an error in the script's own code into a sentence that names the script."""
  try:
    yield
  except UserError:
    raise
  except Exception as e:
    said = str(e).splitlines()[0] if str(e) else "no message"
    raise UserError(
      f"{script.path} failed while a case of the kind {kind} was made: {type(e).__name__}: {said} (pgolf --debug … "
      "shows where)."
    ) from e


@contextlib.contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
  """Within it, PyTorch computes tiny models in one thread; more would wait for one another longer than they compute."""
  threads = torch.get_num_threads()
  torch.set_num_threads(1 if wanted else threads)
  try:
    yield
  finally:
    torch.set_num_threads(threads)


def _floor(job: Job, expected: Arrays) -> dict[str, float]:
  """How far the script's own outputs move when its inputs move by 1e-7, in the measures of `pgolf parity check`."""
  case = Case.load(job.folder)
  moved = dataclasses.replace(case, perturbation=PERTURBATION).inputs
  job.restart(moved)
  found = distances(case, KINDS[case.kind].compute(job, moved), expected)
  # A tensor that does not move at all is infinitely far from any that does.
  return {name: float(f"{distance:.3e}") if math.isfinite(distance) else 0.0 for name, distance in found.items()}


def _environment(request: Request) -> dict[str, str]:
  """The names to set: those of the base that the environment leaves open, the request's own, and what is forced."""
  for name, value in request.changes.items():
    if name in FORCED and value != FORCED[name]:
      raise UserError(f"{name} is {FORCED[name]} in every case, so it cannot be {value}.")
  given = {**os.environ, **request.changes}
  own = {"SEED": str(request.seed), "ITERATIONS": str(request.steps), **FORCED}
  if request.base == "script":
    return {**request.changes, **own}
  settings = Settings()
  if request.base == "tiny":
    quantized = _TINY_QUANTIZED if request.kind == "quantize" else {}
    settings = changed(settings, {**_TINY_MODEL, **_TINY_ROWS, **_TINY_SCORING, **quantized})
  base = {name: value for name, value in as_environment(settings).items() if name not in given}
  return {**base, **request.changes, **own}


def _refuse_missing(script: Script, kind: str) -> None:
  missing = {name: [need for need in KINDS[name].needs if not script.offers(need)] for name in KINDS}
  if missing[kind]:
    offered = ", ".join(name for name, lacks in missing.items() if not lacks) or "none"
    raise UserError(
      f"{script.path} has no {missing[kind][0]}, which a case of the kind {kind} comes from; kinds that it offers: "
      f"{offered}."
    )


def _job(request: Request, script: Script, model: torch.nn.Module, folder: Path, settings: Settings) -> Job:
  return Job(
    script=script,
    model=model,
    folder=folder,
    tokens=request.tokens,
    documents=request.documents,
    max_doc_len=request.max_doc_len or max(request.tokens // request.documents, 2),
    steps=request.steps,
    data=request.data,
    rng=np.random.default_rng(request.seed),
    activations=request.activations,
    config=settings.model,
  )


def _about(request: Request, script: Script, values: dict[str, str], assumed: list[str]) -> dict[str, Any]:
  def named(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

  device = torch.cuda.get_device_name() if request.device == "cuda" else platform.processor() or platform.machine()
  made_from: dict[str, Any] = {
    "script": named(request.script),
    "checkpoint": named(request.checkpoint) if request.checkpoint else None,
    "text": "shards" if request.data else "random documents",
    "noise": request.noise,
    "seed": request.seed,
    "stand_ins": dict(sorted(script.places.used.items())),
    "settings_assumed": assumed,
    "device": f"{request.device} ({device})",
    "versions": {
      "python": platform.python_version(),
      "torch": torch.__version__,
      "numpy": np.__version__,
      "pgolf_jax": version("pgolf_jax"),
    },
  }
  return {"kind": request.kind, "settings": values, "dtype": "float32", "made_from": made_from}
