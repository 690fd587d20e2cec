"""What a run left beside its scores: files by hash, bytes, clocks, and the training that its log tells of."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pgolf_jax.audit.verdict import rules
from pgolf_jax.data.loader import Loader
from pgolf_jax.data.verify import verify
from pgolf_jax.errors import Check, UserError, shown
from pgolf_jax.model import params as parameters
from pgolf_jax.model.gpt import bind, packed_nll
from pgolf_jax.model.params import Params
from pgolf_jax.run_folder import RunFolder, made_from, read_metrics
from pgolf_jax.runtime.distributed import world_size
from pgolf_jax.settings import Settings
from pgolf_jax.settings.load import to_dict
from pgolf_jax.submission import bundle
from pgolf_jax.training import Schedule
from pgolf_jax.training.checkpoint import Checkpoints
from pgolf_jax.training.step import TrainStep

_LOSS_AGREEMENT = {"float32": 2e-3, "bfloat16": 0.02}
"""Nats, of a mean loss: between another backend or program and the training step; another text is far beyond."""


def same_files(run: RunFolder, data_folder: Path) -> Check:
  """Config, shards, tokenizer, sidecar, artifact and scores are the files that each stage read or left."""
  name, results, compared = "files are those that were scored", run.results(), 0
  for stage in ("train", "artifact", "ttt"):
    if not results.get(stage, {}).get("made_from"):
      return Check(
        name, None, f"not checked: results.json has no hashes of the stage {stage}; `pgolf run` records them"
      )
    if changed := run.changes(stage, made_from(run, stage, data_folder)):
      more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
      return Check(name, False, f"{changed[0]}{more} is not what the stage {stage} read or left")
    compared += sum(len(results[stage][part]) for part in ("made_from", "made"))
  return Check(name, True, f"{compared} hashes of three stages")


def data_checks(folder: Path, names: Sequence[str] = ("sidecar", "text", "overlap")) -> Iterator[Check]:
  """The byte sidecar, its agreement with the text, and the split hold, as `pgolf data verify` checks them."""
  for check in verify(folder, names=names):
    yield dataclasses.replace(check, name=f"data: {check.name}")


def size(run: RunFolder) -> Check:
  """Artifact and code fit in the bytes that the rules allow, and the artifact has those that the results say."""
  name, budget = "artifact and code", rules().submission_bytes
  weights, code = run.artifact.stat().st_size, bundle.code().size
  stated = run.results().get("artifact", {}).get("artifact_bytes", weights)
  if stated != weights:
    return Check(name, False, f"results.json says {stated} bytes of artifact, the file has {weights:,}")
  return Check(name, weights + code <= budget, f"{weights:,} + {code:,} of {budget:,} bytes")


def clocks(results: dict[str, dict], settings: Settings) -> Iterator[Check]:
  """Training and evaluation kept to the time that the rules allow, and nothing was compiled while their clocks ran."""
  limits, cap = rules(), settings.train.max_wallclock_seconds
  stages = {
    "training": ("train", limits.training_seconds, "steps, loading, checkpoints; not compiling and warm-up"),
    "evaluation": ("ttt", limits.evaluation_seconds, "hints, chunks, global phases, saving scores; not compiling"),
  }
  for what, (stage, limit, includes) in stages.items():
    name, result = f"clock: {what}", results.get(stage)
    if result is None:
      yield Check(name, None, f"not checked: results.json has no stage {stage}; `pgolf run` makes it")
      continue
    if "converted_from" in result:
      yield Check(name, None, _ELSEWHERE)
      continue
    seconds, faults = result.get("seconds"), result.get("recompilations_in_clock", 0)
    if not _is_time(seconds):
      yield Check(name, False, f"results.json says {shown(seconds)} seconds")
      continue
    # Training stops after the first step that ends past the cap.
    late = seconds > limit * (1.01 if what == "training" else 1)
    fault = f"; {faults} compilations inside" if faults else ""
    text = f"{seconds:.1f} s of {limit:g} ({includes}){fault}"
    if what == "training" and cap <= 0 and not late and not faults:
      yield Check(name, None, f"not proved: trained without a cap; train.max_wallclock_seconds sets one; {text}")
    else:
      yield Check(name, not late and not faults, text)


_ELSEWHERE = "not checked: the weights were trained elsewhere, and converted; their own log says what is known of it"


def _is_time(seconds: object) -> bool:
  return isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 < seconds < math.inf


def training_log(run: RunFolder) -> Check:
  """The metrics have every step from 1 to the last once, under the schedule, up to the time in the results."""
  name, train = "training log", run.results().get("train")
  if train is None:
    return Check(name, None, "not checked: results.json says nothing of training; `pgolf run` trains")
  if "converted_from" in train:
    return Check(name, None, _ELSEWHERE)
  try:
    if not (lines := read_metrics(run.metrics)):
      return Check(name, None, "not checked: there is no metrics.jsonl; train the run again")
    return Check(name, *_training_log(run.settings, lines, train))
  except UserError as error:
    return Check(name, False, str(error))
  except (KeyError, TypeError) as error:
    return Check(name, False, f"metrics.jsonl is damaged ({shown(str(error))})")


def _training_log(settings: Settings, lines: Sequence[dict], train: dict) -> tuple[bool, str]:
  steps = [line["step"] for line in lines]
  missing = next((i for i, step in enumerate(steps, 1) if step != i), None)
  if missing is not None:
    return False, f"step {missing} is missing; step {steps[missing - 1]} stands in its place"
  if len(steps) != train["steps"]:
    return False, f"{len(steps)} steps in metrics.jsonl, {train['steps']} in results.json"
  if train["tokens"] != (tokens := len(steps) * settings.train.batch_tokens):
    return False, f"results.json says {train['tokens']} tokens, {len(steps)} steps take {tokens}"
  seconds = [line["seconds"] for line in lines]
  if any(later < earlier for earlier, later in itertools.pairwise(seconds)):
    return False, "its seconds do not ascend"
  if seconds[-1] > train["seconds"] + 1e-6:
    return False, f"it ends after {seconds[-1]:.1f} s, the results say {train['seconds']:.1f}"
  schedule = Schedule(settings)
  for line in lines:
    if not all(math.isfinite(line[key]) for key in ("loss", "grad_norm", "lr_scale", "momentum", "seconds")):
      return False, f"step {line['step']} has numbers that are not finite"
    if not 0 <= line["progress"] <= 1 or (line["seq_len"], line["looping"]) not in schedule.shapes():
      return False, f"step {line['step']} was not made under the run's schedule"
  return True, f"{len(lines):,} steps, all there, {seconds[-1]:.1f} s"


def first_step(run: RunFolder, data_folder: Path, mesh: Mesh) -> Check:
  """The first logged loss is that of the seed's initial weights on the first tokens of the training shards."""
  name, settings = "step 1 is of this data", run.settings
  lines = read_metrics(run.metrics)
  if not lines:
    return Check(name, None, "not checked: there is no metrics.jsonl; train the run again")
  if lines[0].get("step") != 1:
    return Check(name, False, f"metrics.jsonl begins with step {lines[0].get('step')}")
  params = jax.jit(lambda key: parameters.init(settings.model, key))(jax.random.key(settings.seed))
  logged, expected = lines[0]["loss"], _loss(settings, params, _loader(run, data_folder, mesh), lines[0])
  text = f"logged {logged:.4f}, the first step's tokens under the seed's weights give {expected:.4f}"
  return Check(name, abs(logged - expected) <= _LOSS_AGREEMENT[settings.train.compute_dtype], text)


def later_steps(run: RunFolder, data_folder: Path, mesh: Mesh) -> Check:
  """The loss logged after each checkpoint that lies in the folder is that of its weights on the next tokens."""
  name, settings = "a step after each checkpoint", run.settings
  unmade = Check(name, None, "not checked: no checkpoint before the last step; train.checkpoint_every_steps makes one")
  lines = {line.get("step"): line for line in read_metrics(run.metrics)}
  compared = []
  if not run.checkpoints.is_dir():
    return unmade
  with contextlib.closing(Checkpoints(run.checkpoints, TrainStep(settings, mesh), writes=False)) as checkpoints:
    for step in checkpoints.steps():
      try:
        state, progress = checkpoints.restore(step)
      except UserError as error:
        return Check(name, False, str(error))
      if differing := [line["step"] for line in progress["metrics"] if lines.get(line["step"]) != line]:
        return Check(
          name, False, f"step {differing[0]} was logged otherwise when the checkpoint of step {step} was made"
        )
      if (line := lines.get(step + 1)) is None:
        continue
      loader = _loader(run, data_folder, mesh)
      loader.restore(progress["loader"])
      if settings.data.discard_prefetched and line["seq_len"] != lines[step]["seq_len"]:
        loader.skip(2)
      expected = _loss(settings, state.params, loader, line)
      text = f"logged {line['loss']:.4f} at step {step + 1}, the checkpoint before gives {expected:.4f}"
      if not abs(line["loss"] - expected) <= _LOSS_AGREEMENT[settings.train.compute_dtype]:
        return Check(name, False, text)
      compared.append(text)
  return Check(name, True, "; ".join(compared)) if compared else unmade


def _loader(run: RunFolder, data_folder: Path, mesh: Mesh) -> Loader:
  t = run.settings.train
  world = t.world_size or run.results().get("train", {}).get("devices", world_size(run.settings, mesh))
  row_tokens = t.batch_tokens // t.micro_batches
  return Loader(data_folder, world_size=world, row_tokens=row_tokens, bos_id=run.settings.model.bos_id)


def _loss(settings: Settings, params: Params, loader: Loader, line: dict) -> float:
  """Mean loss of the loader's next step under the sequence length and looping of a line of the metrics."""
  t = settings.train
  rows = loader.step(t.micro_batches // loader.world_size).astype(np.int32)
  row_loss = _row_loss(settings, line["seq_len"], bool(line["looping"]))
  return float(np.mean([row_loss(params, row) for row in rows]))


@functools.lru_cache(maxsize=8)
def _row_loss(settings: Settings, seq_len: int, looping: bool):
  @jax.jit
  def row_loss(params, row):
    dtype = jnp.dtype(settings.train.compute_dtype)
    model = bind(settings.model, params)
    return packed_nll(model, row[None], looping=looping, seq_len=seq_len, dtype=dtype).mean()

  return row_loss


def one_config(runs: Sequence[RunFolder]) -> Check:
  """All runs of a set have the same settings except the seed, and different seeds."""
  hashes = {config_hash(run.settings): run for run in runs}
  seeds = [run.settings.seed for run in runs]
  name = "one config for all seeds"
  if len(hashes) > 1:
    return Check(name, False, "; ".join(f"{run.path.name}: {key[:12]}" for key, run in hashes.items()))
  if len(set(seeds)) < len(seeds):
    return Check(name, False, f"seeds {seeds} are not all different")
  return Check(name, True, f"{next(iter(hashes))[:12]}, seeds {', '.join(map(str, seeds))}")


def config_hash(settings: Settings) -> str:
  """Returns the SHA-256 of all settings but the seed."""
  config = {k: v for k, v in to_dict(settings).items() if k != "seed"}
  return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def require_artifact(run: RunFolder) -> None:
  """Raises UserError if the run has no artifact."""
  if not run.artifact.exists():
    raise UserError(f"{run.path} has no artifact to audit; `pgolf run` makes and scores one.")
