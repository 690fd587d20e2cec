"""The audit of a run: every rule of scoring, checked on what the run left and on its evaluator.

C1: a distribution depends on the artifact and earlier tokens only. C2: it is a full, normalised one, fixed before the
target is looked at. C3: a token is scored before it changes any state. C4: one pass, every token once.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pgolf_jax.audit import probes
from pgolf_jax.audit.probes import probe
from pgolf_jax.data.loader import Loader
from pgolf_jax.data.shards import ValidationData, load_validation
from pgolf_jax.data.verify import verify
from pgolf_jax.errors import Check, UserError
from pgolf_jax.model import params as parameters
from pgolf_jax.model.gpt import bind, packed_nll
from pgolf_jax.quantize import artifact
from pgolf_jax.run_folder import RunFolder, read_metrics
from pgolf_jax.scoring import record
from pgolf_jax.scoring.documents import find_documents
from pgolf_jax.settings import Settings
from pgolf_jax.settings.load import to_dict
from pgolf_jax.submission import bundle

_STEP_1_AGREEMENT = 0.02  # nats; bfloat16 on another backend stays well within, another text does not


def scores(folder: Path, data: ValidationData, settings: Settings) -> Iterator[Check]:
  """Every target was scored once, one order of documents explains the trace, and the bytes are those of the sidecar."""
  targets = len(data.tokens) - 1
  missing = [name for name in ("times.npy", "trace.jsonl", "documents.jsonl") if not (folder / name).exists()]
  if missing:
    yield Check("scores of the run", False, f"{folder} has no {missing[0]}; score the run with test-time training")
    return
  times_N = np.load(folder / "times.npy")
  if settings.eval.doc_fraction < 1:
    yield Check("every target scored exactly once", False, f"only {settings.eval.doc_fraction:.0%} of documents scored")
  elif len(times_N) != targets:
    yield Check("every target scored exactly once", False, f"{len(times_N)} counts for {targets} targets")
  else:
    yield probes.count_once(times_N)
  events = record.read_trace(folder / "trace.jsonl")
  yield acyclic(events, len(find_documents(data.tokens, settings.model.bos_id)))
  lines = [json.loads(line) for line in (folder / "documents.jsonl").read_text(encoding="utf-8").splitlines()]
  scored, wanted = sum(line["bytes"] for line in lines), int(data.token_bytes[1:].sum(dtype=np.int64))
  yield Check("bytes of the score", scored == wanted, f"{scored:,} counted, the sidecar adds up to {wanted:,}")


def acyclic(events: Sequence[record.Event], documents: int) -> Check:
  """One order of documents explains the trace, and every document was scored once."""
  name = "one order explains every score"
  times = record.times_scored(events)
  wrong = [i for i in range(documents) if times.get(i, 0) != 1]
  if wrong:
    return Check(
      name, False, f"document {wrong[0]} was scored {times.get(wrong[0], 0)} times ({len(wrong)} documents not once)"
    )
  cycle = record.find_cycle(events)
  if cycle is None:
    return Check(name, True, f"the trace of {documents:,} documents is acyclic")
  shown = " ← ".join(cycle[:6]) + (" ← …" if len(cycle) > 6 else "")
  return Check(name, False, f"not acyclic: {shown}")


def data_checks(folder: Path) -> Iterator[Check]:
  """The byte sidecar, its agreement with the text, and the split hold, as `pgolf data verify` checks them."""
  for check in verify(folder):
    if check.name in ("sidecar", "text", "overlap"):
      yield dataclasses.replace(check, name=f"data: {check.name}")


def size(artifact: Path, budget: int) -> Check:
  """Artifact and code fit in the budget, in bytes."""
  weights, code = artifact.stat().st_size, bundle.code().size
  return Check("artifact and code", weights + code <= budget, f"{weights:,} + {code:,} of {budget:,} bytes")


def clocks(results: dict[str, dict], settings: Settings) -> Iterator[Check]:
  """Training and evaluation kept to their time, and nothing was compiled while their clocks ran."""
  limit = settings.train.max_wallclock_seconds
  stages = {
    "train": (limit, "steps, loading, checkpoints; not compiling and warm-up on random tokens"),
    "ttt": (600.0, "hints, chunks, global phases, fetching and saving scores; not compiling"),
  }
  for stage, (cap, includes) in stages.items():
    name = f"clock: {stage}"
    if stage not in results:
      yield Check(name, None, "not checked: this stage is not complete")
      continue
    seconds, faults = results[stage]["seconds"], results[stage].get("recompilations_in_clock", 0)
    # Training stops after the first step that ends past the cap.
    late = cap > 0 and seconds > cap * 1.01
    fault = f"; {faults} compilations inside" if faults else ""
    cap_text = f" of {cap:g}" if cap else ", no cap"
    yield Check(name, not late and not faults, f"{seconds:.1f} s{cap_text} ({includes}){fault}")


def first_step(run: RunFolder, data_folder: Path) -> Check:
  """The first logged loss is that of the seed's initial weights on the first tokens of the training shards."""
  name, settings = "step 1 is of this data", run.settings
  lines = [line for line in read_metrics(run.metrics) if line["step"] == 1]
  if not lines:
    return Check(name, None, "not checked: metrics.jsonl has no step 1")
  t = settings.train
  world = t.world_size or run.results().get("train", {}).get("devices", 1)
  row_tokens = t.batch_tokens // t.micro_batches
  loader = Loader(data_folder, world_size=world, row_tokens=row_tokens, bos_id=settings.model.bos_id)
  rows = loader.step(t.micro_batches // world).astype(np.int32)
  params = jax.jit(lambda key: parameters.init(settings.model, key))(jax.random.key(settings.seed))
  seq_len = lines[0].get("seq_len", t.length_stages[0].seq_len)
  looping = bool(lines[0].get("looping", False))

  @jax.jit
  def row_loss(params, row):
    dtype = jnp.dtype(t.compute_dtype)
    model = bind(settings.model, params)
    return packed_nll(model, row[None], looping=looping, seq_len=seq_len, dtype=dtype).mean()

  logged, expected = lines[0]["loss"], float(np.mean([row_loss(params, row) for row in rows]))
  return Check(
    name,
    abs(logged - expected) <= _STEP_1_AGREEMENT,
    f"logged {logged:.4f}, the first step's tokens under the seed's weights give {expected:.4f}",
  )


def audit(run: RunFolder, data_folder: Path, mesh: Mesh, *, probe_tokens: int = 600, count: int = 3) -> Iterator[Check]:
  """Makes all checks of one run that was scored with test-time training.

  Args:
    data_folder: shards that the run was trained and scored on.
    probe_tokens: tokens of the stream on which the evaluator is probed.
    count: perturbations of each kind.

  Raises:
    UserError: the run has no artifact.
  """
  if not run.artifact.exists():
    raise UserError(f"{run.path} has no artifact to audit; `pgolf run` makes and scores one.")
  settings = run.settings
  data = load_validation(data_folder)
  _, params = artifact.load(run.artifact)
  yield from probe(settings, params, data, mesh, tokens=probe_tokens, count=count)
  yield from scores(run.scores, data, settings)
  yield from data_checks(data_folder)
  yield size(run.artifact, settings.quantize.budget_bytes)
  yield from clocks(run.results(), settings)
  yield first_step(run, data_folder)


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
