"""The stages of a run, in order. Each reads the run folder, does its work and reports figures."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from pgolf_jax import report
from pgolf_jax.audit import audit
from pgolf_jax.audit.verdict import verdict
from pgolf_jax.data.folder import ensure_prepared, locate_prepared
from pgolf_jax.data.shards import ValidationData, load_validation
from pgolf_jax.errors import Check, UserError, checks_summary, checks_table
from pgolf_jax.model.params import Params
from pgolf_jax.plan import advice
from pgolf_jax.quantize import artifact
from pgolf_jax.quantize.make import Made, make
from pgolf_jax.run_folder import RunFolder, made_from, shards_of
from pgolf_jax.runtime import distributed, events
from pgolf_jax.runtime.distributed import run_mesh, world_size
from pgolf_jax.runtime.files import json_hash, locked, remove, write_bytes, write_npy
from pgolf_jax.runtime.log import log, log_to
from pgolf_jax.runtime.versions import commit, versions
from pgolf_jax.scoring import plain, ttt
from pgolf_jax.scoring.record import Record
from pgolf_jax.scoring.store import OtherEvaluation
from pgolf_jax.settings import Settings, check
from pgolf_jax.settings.load import departures, to_dict
from pgolf_jax.submission import bundle, package
from pgolf_jax.tables import Table
from pgolf_jax.training.checkpoint import Checkpoints
from pgolf_jax.training.loop import Trainer
from pgolf_jax.training.step import TrainStep


def plain_score(
  settings: Settings,
  params: Params,
  mesh: Mesh,
  description: str,
  data: ValidationData | None = None,
  keep: Path | None = None,
) -> dict:
  """Returns the plain score of parameters on `data`, or on the whole validation split, as the stages report it.

  The nats of every target are written to the file `keep`, if it is given.
  """
  data = load_validation(locate_prepared(settings)) if data is None else data
  nll_N = None if keep is None else np.zeros(len(data.tokens) - 1, np.float32)
  began = time.perf_counter()
  score = plain.score(settings, params, data, mesh, description=description, nll_N=nll_N)
  if keep is not None and distributed.is_leader():
    write_npy(keep, nll_N)
  return {
    "loss": score.loss,
    "bpb": score.bpb,
    "targets": score.targets,
    "bytes": score.text_bytes,
    "seconds": time.perf_counter() - began,
  }


def _train(run: RunFolder, mesh: Mesh) -> dict:
  settings = run.settings
  if settings.model.num_loops > 0 and settings.train.enable_looping_at >= 1:
    log.info(
      "training never loops (train.enable_looping_at=%g); every evaluation does", settings.train.enable_looping_at
    )

  def validate(step: int, params: Params) -> dict[str, float]:
    score = plain_score(settings, params, mesh, f"scoring step {step}")
    log.info("step %d | validation loss %.4f | %.4f bits per byte", step, score["loss"], score["bpb"])
    return {"val_loss": score["loss"], "val_bpb": score["bpb"]}

  return Trainer(run, mesh, locate_prepared(settings), validate=validate).train()[1]


def averaged_params(run: RunFolder, mesh: Mesh) -> Params:
  """Returns the averaged weights of a trained run.

  Raises:
    UserError: its training is not finished.
  """
  if "train" not in run.results():
    raise UserError(f"{run.path}: training is not finished; `pgolf train CONFIG --out {run.path}` resumes it.")
  checkpoints = Checkpoints(run.checkpoints, TrainStep(run.settings, mesh))
  try:
    return checkpoints.restore_average(run.results()["train"]["steps"])
  finally:
    checkpoints.close()


def _plain(run: RunFolder, mesh: Mesh) -> dict:
  return plain_score(run.settings, averaged_params(run, mesh), mesh, "scoring the averaged weights")


def _quantize(run: RunFolder, mesh: Mesh) -> dict:
  """Makes the artifact and scores what is read back from it."""
  made = make_artifact(run, run.given, mesh, fit=run.given.quantize.fill_budget)
  if distributed.is_leader():
    write_bytes(run.artifact, made.data)
  distributed.barrier("artifact written")
  budget = run.settings.quantize.budget_bytes
  log.info("artifact:\n%s", package.table(package.count(made.data, bundle.code(), budget=budget)))
  return _score_artifact(run, mesh, made)


def make_artifact(run: RunFolder, settings: Settings, mesh: Mesh, *, fit: bool) -> Made:
  """Returns an artifact of a run's averaged weights, made with these settings.

  Args:
    fit: whether artifact and code are to fill the budget.

  Raises:
    UserError: the code alone fills it.
  """
  room = settings.quantize.budget_bytes - bundle.code().size if fit else None
  if room is not None and room <= 0:
    raise UserError(
      f"quantize.budget_bytes={settings.quantize.budget_bytes:,} leaves no room for an artifact: the code alone takes "
      f"{bundle.code().size:,}."
    )
  return make(
    settings,
    averaged_params(run, mesh),
    locate_prepared(run.settings),
    world=world_size(settings, mesh),
    fit_bytes=room,
  )


def _score_artifact(run: RunFolder, mesh: Mesh, made: Made) -> dict:
  params = artifact.load(run.artifact)[1]
  score = plain_score(run.settings, params, mesh, "scoring the artifact", keep=run.artifact_nll)
  return score | {"artifact_bytes": len(made.data), "code_bytes": bundle.code().size, **made.seconds}


def replace_artifact(run: RunFolder, mesh: Mesh, made: Made) -> None:
  """Puts an artifact that was made with other settings in the place of the run's, and reports on it."""
  inputs = made_from(run, "artifact", locate_prepared(run.settings))
  began = time.perf_counter()
  if distributed.is_leader():
    write_bytes(run.artifact, made.data)
  distributed.barrier("artifact written")
  result = _score_artifact(run, mesh, made)
  if distributed.is_leader():
    run.finish("artifact", result | {"stage_seconds": time.perf_counter() - began}, inputs)
    if later := [name for name in ("ttt", "audit") if name in run.results()]:
      log.info("%s: `pgolf run` will do this again, because %s has changed", ", ".join(later), run.artifact)
  distributed.barrier("artifact complete")


def _ttt(run: RunFolder, mesh: Mesh) -> dict:
  """Scores the artifact with test-time training, in the run's order; scores are kept in the run's folder."""
  params, data = artifact.load(run.artifact)[1], load_validation(locate_prepared(run.settings))

  def after_batch(count: int, record: Record) -> None:
    log.debug("batch %d scored, running bpb %.5f", count, record.running_bpb)

  options = ttt.Options(folder=run.scores, after_batch=after_batch)
  try:
    evaluation = ttt.evaluate(run.settings, params, data, mesh, options)
  except OtherEvaluation as other:
    log.info("%s The run scores again from the beginning.", other)
    with distributed.leader_first("scores removed"):
      if distributed.is_leader():
        remove(run.scores)
    evaluation = ttt.evaluate(run.settings, params, data, mesh, options)
  result = evaluation.figures(run.settings)
  text = "ttt: %.5f bits per byte (%.5f without hints), %.1f s, %s order"
  log.info(text, *(result[name] for name in ("bpb", "bpb_without_hints", "seconds", "order")))
  return result


def _audit(run: RunFolder, mesh: Mesh) -> dict:
  """Audits the run; the table goes to the log, every check with its evidence and the verdict to the results."""
  made = list(audit(run, locate_prepared(run.settings), mesh))
  reached = verdict(made)
  log.info("audit:\n%s\n%s", checks_table(made), reached.text())
  return {
    "broken": reached.broken,
    "unproved": reached.unproved,
    "is_legal": reached.is_legal,
    "checks": [dataclasses.asdict(check) for check in made],
  }


STAGES: dict[str, Callable[[RunFolder, Mesh], dict]] = {
  "train": _train,
  "plain": _plain,
  "artifact": _quantize,
  "ttt": _ttt,
  "audit": _audit,
}
"""Name → function of the run and the mesh that does the stage and returns what it reports."""


@dataclasses.dataclass(frozen=True)
class Tracking:
  """Where the figures of a run go, beside its folder: a project of Weights & Biases, and a group of runs there."""

  project: str
  group: str = ""


def run(settings: Settings, folder: Path, names: list[str], tracking: Tracking | None = None) -> int:
  """Runs the stages that are not yet complete, then prints the table. Returns the exit status.

  Raises:
    UserError: the settings cannot work here, another process has the folder, or it was made with other settings.
  """
  distributed.start()
  mesh = run_mesh(settings)
  check.check(settings, device_count=mesh.size)
  if tracking:
    events.require_wandb()
  if not (folder / "config.toml").exists() and (within := sorted(folder.glob("*/config.toml"))):
    raise UserError(f"{folder} holds other runs, such as {within[0].parent.name}; give this one another with --out.")
  if distributed.is_leader():
    folder.mkdir(parents=True, exist_ok=True)
  with locked(folder):
    with distributed.leader_first("run folder"):
      run = RunFolder(folder, settings)
    log_to(run.log)
    try:
      with _tracked(run, tracking):
        return _run_stages(run, names, mesh)
    except BaseException:
      if distributed.is_leader():
        run.clear_start()
      raise


@contextlib.contextmanager
def _tracked(run: RunFolder, tracking: Tracking | None) -> Iterator[None]:
  """Sends the run's figures to Weights & Biases too, if it is named."""
  if tracking is None or not distributed.is_leader():
    yield
    return
  sink = events.WandB(tracking.project, run.path, group=tracking.group, config=to_dict(run.settings))
  run.sinks.append(sink)
  try:
    yield
  finally:
    run.sinks.remove(sink)
    sink.close()


def _run_stages(run: RunFolder, names: list[str], mesh: Mesh) -> int:
  settings = run.settings
  count = jax.device_count()
  share = f"as many as share train.micro_batches={settings.train.micro_batches}"
  idle = f" of {count}, {share}" if mesh.size < count else ""
  log.info("run folder %s, %d × %s%s", run.path, mesh.size, mesh.devices.flat[0].device_kind, idle)
  if misfit := advice.warning(settings, mesh):
    log.warning("%s", misfit)
  source = f", commit {commit()}" if commit() else ""
  log.info("with %s%s", ", ".join(map(" ".join, versions().items())), source)
  if differing := departures(settings):
    log.info("differs from the record (its value in brackets): %s", "; ".join(differing))
  data_folder, wanted = ensure_prepared(settings), list(filter(partial(_wanted, settings), names))
  for name in wanted:
    shards_of(run, name, data_folder)  # what a later stage lacks is refused before the first one
  for name in wanted:
    inputs = made_from(run, name, data_folder)
    if _is_complete(run, name, inputs):
      log.info("%s: already complete", name)
      continue
    log.info("%s: begins, from %s", name, _hashes(inputs))
    began = time.perf_counter()
    result = STAGES[name](run, mesh)
    seconds = time.perf_counter() - began
    if distributed.is_leader():
      run.finish(name, result | {"stage_seconds": seconds}, inputs)
      _show(run, name)
    score = f", {result['bpb']:.5f} bits per byte" if "bpb" in result else ""
    log.info("%s: complete after %.1f s%s", name, seconds, score)
    distributed.barrier(f"{name} complete")
  log.info("\n%s", table(run))
  if distributed.is_leader() and names == list(STAGES):
    report.after_run(run)
  broken = run.results().get("audit", {}).get("broken", [])
  return 1 if broken else 0


def _hashes(inputs: dict[str, str]) -> str:
  """What a stage reads, each with the beginning of its SHA-256; the shards of the data under one."""
  shards = {name: sha256 for name, sha256 in inputs.items() if name.endswith(".bin")}
  shown = {name: sha256 for name, sha256 in inputs.items() if name not in shards}
  if shards:
    shown["1 shard" if len(shards) == 1 else f"{len(shards)} shards"] = json_hash(shards)
  return ", ".join(f"{name} {sha256[:12]}" for name, sha256 in shown.items())


def _show(run: RunFolder, name: str) -> None:
  """Adds what a stage reported to the curves, at the last step of training."""
  results = run.results()
  result, steps = results[name], results.get("train", {}).get("steps", 0)
  tags = {
    "plain": {"bpb/averaged": "bpb"},
    "artifact": {"bpb/artifact": "bpb", "bytes/artifact": "artifact_bytes", "bytes/code": "code_bytes"},
    "ttt": {"bpb/ttt": "bpb", "bpb/ttt_without_hints": "bpb_without_hints"},
  }
  if figures := {tag: result[key] for tag, key in tags.get(name, {}).items() if key in result}:
    run.show(steps, figures)


def _is_complete(run: RunFolder, name: str, inputs: dict[str, str]) -> bool:
  """Whether a stage is complete, and made from what is there now; the log says why one is done again."""
  if name not in run.results():
    return False
  changed = run.changes(name, inputs)
  if changed:
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    log.info("%s: done again, because %s%s changed", name, changed[0], more)
  return not changed


def _wanted(settings: Settings, name: str) -> bool:
  return settings.ttt.enabled or name not in ("ttt", "audit")


def table(run: RunFolder) -> Table:
  """Returns the run's figures as a table, one line a stage."""
  results = run.figures()
  rows = []
  if train := results.get("train"):
    note = f"{train['steps']} steps, {train['tokens_per_second']:,.0f} tokens/s, {train['parameters']:,} parameters"
    rows.append(("train", "", train["seconds"], note))
  if plain_ := results.get("plain"):
    rows.append(("averaged weights", f"{plain_['bpb']:.5f}", plain_["seconds"], f"loss {plain_['loss']:.5f}"))
  if made := results.get("artifact"):
    total = made["artifact_bytes"] + made["code_bytes"]
    tax = f"{made['bpb'] - plain_['bpb']:+.5f} by quantising; " if plain_ else ""
    note = f"{tax}{made['artifact_bytes']:,} bytes, {total:,} with the code, of {run.settings.quantize.budget_bytes:,}"
    rows.append(("artifact", f"{made['bpb']:.5f}", made["seconds"], note))
  if ttt := results.get("ttt"):
    note = f"{ttt['order']} order, {ttt['method']}; without hints {ttt['bpb_without_hints']:.5f}"
    rows.append(("test-time training", f"{ttt['bpb']:.5f}", ttt["seconds"], note))
  if audit := results.get("audit"):
    note = checks_summary([Check(**check) for check in audit["checks"]])
    rows.append(("audit", "", audit["stage_seconds"], note))
  cells = ((what, bpb, f"{seconds:.1f}", note) for what, bpb, seconds, note in rows)
  return Table(("", ">bits per byte", ">seconds", ""), cells)
