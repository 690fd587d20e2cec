"""The audit of a run: every rule of scoring, checked on what the run left and on its own evaluator.

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
from pgolf_jax.data.verify import Check, verify
from pgolf_jax.errors import UserError
from pgolf_jax.model import params as parameters
from pgolf_jax.model.gpt import bind
from pgolf_jax.model.loss import packed_nll
from pgolf_jax.model.params import Params
from pgolf_jax.run_folder import RunFolder, read_metrics
from pgolf_jax.scoring import trace, ttt
from pgolf_jax.scoring.documents import find_documents
from pgolf_jax.scoring.plain import ValidationData
from pgolf_jax.settings.config import Settings
from pgolf_jax.settings.load import to_dict

_STEP_1_AGREEMENT = 0.02  # nats; bfloat16 on another backend stays well within, another text does not


def audit(run: RunFolder, data_folder: Path, mesh: Mesh, *, probe_tokens: int = 600, count: int = 3) -> Iterator[Check]:
  """All checks of one run that was scored with test-time training.

  Args:
    data_folder: that the run was trained and scored on.
    probe_tokens: tokens of the stream on which the evaluator is probed.
    count: perturbations of each kind.

  Raises:
    UserError: the run has no artifact.
  """
  from pgolf_jax.quantize import artifact
  from pgolf_jax.scoring.plain import load_validation

  if not run.artifact.exists():
    raise UserError(f"{run.path} has no artifact to audit; `pgolf run` makes and scores one.")
  settings = run.settings
  data = load_validation(data_folder)
  params = artifact.load(run.artifact)[1]
  yield from probe(settings, params, data, mesh, tokens=probe_tokens, count=count)
  yield from scores(run.scores, data, settings)
  yield from data_checks(data_folder)
  yield size(run.artifact, settings.quantize.budget_bytes)
  yield from clocks(run.results(), settings)
  yield first_step(run, data_folder)


def probe(
  settings: Settings, params: Params, data: ValidationData, mesh: Mesh, *, tokens: int, count: int
) -> list[Check]:
  """Perturbations of a small stream, scored by the evaluator that scored the run.

  Few documents are scored, so a global phase is put among them where the settings have one at all.
  """
  sample = probe_stream(data, settings, tokens)
  few = len(find_documents(sample.tokens, settings.model.bos_id))
  small = dataclasses.replace(
    settings.ttt,
    batch_size=min(settings.ttt.batch_size, max(2, few // 3)),
    phase=dataclasses.replace(
      settings.ttt.phase,
      prefix_docs=few // 2 if settings.ttt.phase.prefix_docs else 0,
      chunk_tokens=min(settings.ttt.phase.chunk_tokens, max(len(sample.tokens) // 8, 16)),
    ),
    eval_batches=(),
  )
  seq_len = min(settings.eval.seq_len, small.phase.chunk_tokens)
  changed = dataclasses.replace(
    settings, ttt=small, eval=dataclasses.replace(settings.eval, seq_len=seq_len, doc_fraction=1.0)
  )
  options, programs = ttt.Options(distributions=True), ttt.Programs(changed, mesh, distributions=True)

  def evaluate(stream_N1):
    return ttt.evaluate(changed, params, ValidationData(stream_N1, sample.token_bytes), mesh, options, programs)

  model = settings.model
  return probes.run(
    evaluate, sample.tokens, bos_id=model.bos_id, vocab_size=model.vocab_size, probes=count, seed=settings.seed
  )


def probe_stream(data: ValidationData, settings: Settings, tokens: int) -> ValidationData:
  """The beginnings of documents, every other one with a stretch of the one before, so that hints occur."""
  documents = find_documents(data.tokens, settings.model.bos_id)
  each = max(tokens // 8, 2 * settings.hints.order + 8)
  parts: list[np.ndarray] = []
  for document in documents[: max(tokens // each, 4)]:
    # A length of its own for each, so that documents end at different chunks.
    length = min(document.targets, each - len(parts) % 4 * (each // 8))
    part = data.tokens[document.start : document.start + length].copy()
    if len(parts) % 2 and len(part) > 8:
      stretch = parts[-1][1 : 1 + max(len(part) - 4, 1)]
      part[1 : 1 + len(stretch)] = stretch
    parts.append(part)
  stream = np.concatenate(parts)
  return ValidationData(stream, np.where(stream == settings.model.bos_id, 0, 1).astype(np.int32))


def scores(folder: Path, data: ValidationData, settings: Settings) -> Iterator[Check]:
  """Every target of the run scored once; its trace explained by one order; its bytes those of the sidecar."""
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
  events = trace.read(folder / "trace.jsonl")
  yield acyclic(events, len(find_documents(data.tokens, settings.model.bos_id)))
  lines = [json.loads(line) for line in (folder / "documents.jsonl").read_text(encoding="utf-8").splitlines()]
  scored, wanted = sum(line["bytes"] for line in lines), int(data.token_bytes[1:].sum(dtype=np.int64))
  yield Check("bytes of the score", scored == wanted, f"{scored:,} counted, the sidecar adds up to {wanted:,}")


def acyclic(events: Sequence[dict], documents: int) -> Check:
  """Whether one order of documents explains the trace, and all are in it once."""
  name = "one order explains every score"
  times = trace.times_scored(events)
  wrong = [i for i in range(documents) if times.get(i, 0) != 1]
  if wrong:
    return Check(name, False, f"document {wrong[0]} was scored {times.get(wrong[0], 0)} times ({len(wrong)} such)")
  cycle = trace.find_cycle(events)
  if cycle is None:
    return Check(name, True, f"the trace of {documents:,} documents is acyclic")
  shown = " ← ".join(cycle[:6]) + (" ← …" if len(cycle) > 6 else "")
  return Check(name, False, f"not acyclic: {shown}")


def data_checks(folder: Path) -> Iterator[Check]:
  """Sidecar and split, as `pgolf data verify` checks them."""
  for check in verify(folder):
    if check.name in ("sidecar", "text", "overlap"):
      yield dataclasses.replace(check, name=f"data: {check.name}")


def size(artifact: Path, budget: int) -> Check:
  """Artifact and code within the budget."""
  from pgolf_jax.submission import bundle

  weights = artifact.stat().st_size
  code = bundle.code().size
  return Check("artifact and code", weights + code <= budget, f"{weights:,} + {code:,} of {budget:,} bytes")


def clocks(results: dict[str, dict], settings: Settings) -> Iterator[Check]:
  """Training and evaluation within their time, with nothing compiled inside a clock."""
  limit = settings.train.max_wallclock_seconds
  parts = {
    "train": (limit, "steps, loading, checkpoints; not compiling and warm-up on made-up tokens", "seconds"),
    "ttt": (600.0, "hints, chunks, global phases, fetching and saving scores; not compiling", "seconds"),
  }
  for stage, (cap, includes, key) in parts.items():
    name = f"clock: {stage}"
    if stage not in results:
      yield Check(name, None, "not checked: this stage is not complete")
      continue
    seconds, faults = results[stage][key], results[stage].get("recompilations_in_clock", 0)
    # Training stops after the first step that ends past the cap.
    late = cap > 0 and seconds > cap * 1.01
    fault = f"; {faults} compilations inside" if faults else ""
    cap_text = f" of {cap:g}" if cap else ", no cap"
    yield Check(name, not late and not faults, f"{seconds:.1f} s{cap_text} ({includes}){fault}")


def first_step(run: RunFolder, data_folder: Path) -> Check:
  """The first logged loss is that of the seed's initial weights on the first tokens of the training shards."""
  from pgolf_jax.data.loader import Loader

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


def one_config(runs: Sequence[RunFolder]) -> Check:
  """All runs of a set have the same settings but for the seed."""
  hashes = {config_hash(run.settings): run for run in runs}
  seeds = [run.settings.seed for run in runs]
  name = "one config for all seeds"
  if len(hashes) > 1:
    return Check(name, False, "; ".join(f"{run.path.name}: {key[:12]}" for key, run in hashes.items()))
  if len(set(seeds)) < len(seeds):
    return Check(name, False, f"seeds {seeds} are not all different")
  return Check(name, True, f"{next(iter(hashes))[:12]}, seeds {', '.join(map(str, seeds))}")


def config_hash(settings: Settings) -> str:
  """SHA-256 of everything but the seed."""
  plain = {k: v for k, v in to_dict(settings).items() if k != "seed"}
  return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def table(checks: Sequence[Check]) -> str:
  """One line a check: whether it holds, and the evidence."""
  words = {True: "holds", False: "BROKEN", None: "-"}
  width = max(len(check.name) for check in checks)
  return "\n".join(f"{words[check.passed]:<7} {check.name:<{width}}  {check.finding}" for check in checks)
