"""Score-first test-time training: documents scored chunk by chunk while adapters of their own learn. Recipe section 5.

Batches form chains, of which several run side by side, in rounds. For each round, in this order: hints for the
documents of its batches; adapters start (A carried from the batch before in the chain, B zero); scans over the chunks
(scan.py), each target scored by the pass before the update that it takes part in; scores come to the host while the
next round runs; where enough documents are scored, a global phase on all weights.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pgolf_jax.data.shards import ValidationData
from pgolf_jax.errors import Stopped
from pgolf_jax.model.params import Params
from pgolf_jax.runtime import distributed, signals
from pgolf_jax.runtime.clock import Clock
from pgolf_jax.runtime.distributed import place, replicated
from pgolf_jax.runtime.log import Progress, log, progress
from pgolf_jax.scoring import global_phase
from pgolf_jax.scoring.adapter_sets import AdapterSets, Draw
from pgolf_jax.scoring.buckets import Costs, WorkPlan, learning_chunks, plan_work, stream_targets
from pgolf_jax.scoring.compiled import Programs, Workload
from pgolf_jax.scoring.context import Rows
from pgolf_jax.scoring.documents import (
  Batch,
  Chains,
  Document,
  Layout,
  Round,
  batches,
  find_documents,
  phase_boundaries,
  rounds,
  select,
)
from pgolf_jax.scoring.hints import HintCounter
from pgolf_jax.scoring.record import (
  Clocks,
  Evaluation,
  EvaluationProgress,
  HintsEvent,
  Record,
  ScoreEvent,
  WeightsEvent,
  identify,
  total,
)
from pgolf_jax.scoring.scan import ScanInputs, ScanState, Scored, place_call
from pgolf_jax.settings import Settings


@dataclasses.dataclass(frozen=True)
class Options:
  """How an evaluation is run; the settings say what it computes.

  Attributes:
    folder: where scores and progress are kept; a killed evaluation goes on from there.
    save_seconds: least time between saves. A restart loses at most this and the batch at hand; adapters of the full
      size take hundreds of megabytes.
    draw: A of new adapter sets from elsewhere, in place of random ones.
    sample: targets whose whole distributions are returned; of several in one chunk, the first.
    after_batch: called with the number of batches whose scores have come to the host, and with the scores; what it
      raises ends the evaluation.
  """

  folder: Path | None = None
  save_seconds: float = 20.0
  draw: Draw | None = None
  sample: np.ndarray | None = None
  after_batch: Callable[[int, Record], None] | None = None


DEFAULTS = Options()


def evaluate(
  settings: Settings,
  params: Params,
  data: ValidationData,
  mesh: Mesh,
  options: Options = DEFAULTS,
  programs: Programs | None = None,
) -> Evaluation:
  """Scores every selected document once, with test-time training.

  Args:
    settings: `train.compute_dtype` is the type of the computation; adapters, moments and model weights are float32.
    params: float32, under the recipe's names; only read.
    data: the validation stream and its byte sidecar.
    mesh: has the axis `data`; a batch's documents are shared out over it.
    programs: of these settings and this mesh, with distributions where `options.sample` is given: evaluations of the
      same shapes share what is compiled. Made anew if not given.

  Raises:
    UserError: the stream does not begin with bos, or `options.folder` holds another evaluation.
    Stopped: a signal came; what is scored is saved in `options.folder`.
  """
  began = time.monotonic()
  programs = programs or Programs(settings, mesh, distributions=options.sample is not None)
  plan = Plan.make(settings, data, mesh, programs.chains)
  identity = None  # it takes hashes of all weights and tokens
  if options.folder is not None:
    world, chains = programs.phase.world, programs.chains.count
    identity = identify(settings, params, data, world, chains, is_drawn=options.draw is None)
  record = Record(options.folder, data, identity, writes=distributed.is_leader())
  state = _prepare(plan, programs, params, options)
  collect = functools.partial(_collect, plan, state, record, options)
  compilation = time.monotonic() - began

  clock = Clock(record.progress.seconds["evaluation"], record.progress.compilations)
  clock.start()
  if record.is_resumed:
    plan = _resume(plan, programs, state, record)
  saved = clock.seconds
  postponed = contextlib.nullcontext(lambda: 0) if options.folder is None else signals.postponed_signals()
  bar_of_tokens = progress("test-time training", total=sum(batch.targets for batch in plan.batches), unit="tokens")
  with postponed as arrived, bar_of_tokens as bar:
    bar.advance(sum(batch.targets for batch in plan.batches[: state.done.batches]))
    running: list[RunningCall] = []
    for number, each in enumerate(plan.rounds):
      if not each.batches:
        continue  # finished before
      for batch in each.batches:
        _count_hints(state, batch)
      before, running = running, _dispatch(plan, programs, state, number)
      collect(before, bar)  # while the devices work on this round
      state.done.batches += len(each.batches)
      if _phase_is_due(plan, state.done):
        collect(running, bar)
        running = []
        _run_phase(plan, programs, state, record)
      if options.folder is not None:
        seconds, signum = clock.agreed_with(arrived())
        if signum:
          break
        if seconds - saved >= options.save_seconds:
          collect(running, bar)
          running = []
          _save(state, record, clock)
          saved = clock.seconds
    collect(running, bar)
    _save(state, record, clock)
    clock.stop()
    _, signum = clock.agreed_with(arrived())
  if signum:
    raise Stopped(signum, f"batch {state.done.batches} of {len(plan.batches)}")
  return _result(plan, state, record, clock, compilation)


class Plan(NamedTuple):
  """What an evaluation will do, known before it begins."""

  settings: Settings
  data: ValidationData
  documents: list[Document]  # of the whole stream
  batches: list[Batch]  # in the order of scoring
  chains: Chains
  rounds: list[Round]  # the same batches, those together that run side by side
  boundaries: list[int]  # numbers of scored documents after which a global phase runs
  layout: Layout
  work: WorkPlan

  @classmethod
  def make(cls, settings: Settings, data: ValidationData, mesh: Mesh, chains: Chains) -> "Plan":
    """Cuts the selected documents into batches, deals these out to chains, and cuts them into chunks."""
    ttt = settings.ttt
    documents = find_documents(data.tokens, settings.model.bos_id)
    selected = select(documents, settings.eval.doc_fraction, settings.seed)
    cut = batches(ttt, selected)
    boundaries = phase_boundaries(ttt.phase.prefix_docs, ttt.phase.count, len(selected))
    chains = chains.among(len(cut))
    layout = Layout(mesh.size, -(-max(len(batch.documents) for batch in cut) * chains.width // mesh.size))
    dealt, platform = rounds(cut, chains), distributed.platform(mesh)
    work = plan_work(ttt, dealt, Costs.estimate(settings.model, ttt), devices=mesh.size, platform=platform)
    return cls(settings, data, documents, cut, chains, dealt, boundaries, layout, work)

  def padded_tokens(self) -> np.ndarray:
    """Returns the stream with room for a window and a chunk after its end."""
    return np.pad(self.data.tokens.astype(np.int32), (0, self.settings.ttt.seq_len + self.settings.ttt.chunk_size))


@dataclasses.dataclass
class State:
  """What changes from batch to batch."""

  params: Params  # float32, on the mesh
  inputs: ScanInputs  # the parameters in the type of the computation, and the stream; rows and calls are added
  memory: Any  # of the chunks' context
  adapters: AdapterSets
  hints: HintCounter
  sampled_N: np.ndarray | None  # whether a target's whole distribution is wanted
  done: EvaluationProgress = dataclasses.field(default_factory=EvaluationProgress)


class RunningCall(NamedTuple):
  """A scan on the devices, and the targets that its scores belong to."""

  round_: Round
  target_SxBxX: np.ndarray
  valid_SxBxX: np.ndarray
  gate_SxBxX: np.ndarray
  sampled_SxBxX: np.ndarray | None
  scored: Scored


def _prepare(plan: Plan, programs: Programs, params: Params, options: Options) -> State:
  """Compiles everything, and places what the first batch needs."""
  mesh, tokens = programs.mesh, plan.padded_tokens()
  # A copy: global phases donate the weights.
  params = jax.device_put({name: jnp.array(value, jnp.float32) for name, value in params.items()}, replicated(mesh))
  scans = {(e.is_short, call.shape) for e, calls in zip(plan.rounds, plan.work.calls, strict=True) for call in calls}
  has_phases = bool(plan.boundaries) and programs.phase.row_tokens > 0
  programs.compile(params, Workload(frozenset(scans), plan.layout.slots, len(tokens), has_phases))
  largest = max(len(batch.documents) for batch in plan.batches)
  state = State(
    params=params,
    inputs=ScanInputs(programs.computing(params), place(mesh, tokens, P())),
    memory=programs.new_memory(plan.layout.slots),
    adapters=AdapterSets(plan.settings, plan.layout, programs, plan.chains, largest=largest, draw=options.draw),
    hints=HintCounter(plan.settings, plan.data.tokens, plan.documents),
    sampled_N=None if options.sample is None else np.isin(np.arange(len(plan.data.tokens) - 1), options.sample),
  )
  jax.block_until_ready((state.inputs.params, state.inputs.stream_N))
  return state


def _count_hints(state: State, batch: Batch) -> None:
  began = time.monotonic()
  if counted := state.hints.prepare(batch.documents):
    state.done.events.append(HintsEvent(tuple(document.index for document in counted)))
  state.done.seconds["hints"] += time.monotonic() - began


def _dispatch(plan: Plan, programs: Programs, state: State, number: int) -> list[RunningCall]:
  """Puts a round's scans on the devices, without waiting for them."""
  round_, place_n, updates = plan.rounds[number], plan.rounds[number].place_n, plan.settings.ttt.lora.grad_steps
  start = state.adapters.start(round_)
  for batch, origin in zip(round_.batches, start.sets, strict=True):
    documents = tuple(document.index for document in batch.documents)
    state.done.events.append(ScoreEvent(batch.index, documents, state.done.phases, *origin))
  rows = Rows(
    start=np.array([document.start for document in round_.documents], np.int32),
    targets=np.array([document.targets for document in round_.documents], np.int32),
    learns=round_.by_document(lambda batch: batch.learns),
    moving=round_.by_document(lambda batch: np.int32(learning_chunks(plan.settings.ttt, batch))),
  )
  rows = Rows(*(plan.layout.to_rows(x, place_n) for x in rows))
  inputs = state.inputs._replace(rows=programs.place_rows(rows), size=programs.place_size(round_.chunk_size))
  scan = ScanState(start.learner, state.memory)
  steps_B = np.zeros(plan.layout.rows, np.int32)
  running = []
  for call in plan.work.calls[number]:
    target, valid = stream_targets(plan.layout, round_, call)
    gate = valid & state.hints.gate_N[target]
    hint = np.where(gate, state.hints.ids_N[target], -1)
    sampled = None if state.sampled_N is None else valid & state.sampled_N[target]
    sample = None if sampled is None else sampled.argmax(axis=2)
    arguments = place_call(programs.mesh, inputs, call, hint, sample)
    scan, scored = programs.scan(round_.is_short, call.shape, scan, arguments)
    running.append(RunningCall(round_, target, valid, gate, sampled, scored))
    k_S = np.array([step.k for step in call.steps])
    in_shape_B = plan.layout.slot_of_rows() < call.shape.slots
    steps_B += in_shape_B * (k_S[:, None] < rows.moving).sum(axis=0, dtype=np.int32)
  state.memory = scan.memory
  if state.adapters.needs_end(start):
    ended = programs.adapters[round_.is_short].finish(scan.learner, steps_B * updates, rows.moving * updates)
    state.adapters.finish(round_, start, ended)
  return running


def _collect(
  plan: Plan, state: State, record: Record, options: Options, running: list[RunningCall], bar: Progress
) -> None:
  """Brings a round's scores to the host and enters them under their targets."""
  if not running:
    return
  entries, samples = [], {}
  for _, target, valid, gate, sampled, scored in running:
    steps = len(valid)
    model_M, hint_M, tilted_M = (np.asarray(x)[:steps][valid] for x in (scored.model_nll, scored.hint_nll, scored.nll))
    # Without a hint the two are one number, which a compiler that computes it twice may round differently.
    entries.append((target[valid], model_M, hint_M, np.where(gate[valid], tilted_M, model_M)))
    if sampled is not None and sampled.any():
      step_M, row_M = sampled.any(axis=2).nonzero()
      targets = target[step_M, row_M, sampled[step_M, row_M].argmax(axis=1)]
      logp_MxV = np.asarray(scored.logp)[step_M, row_M]
      samples.update(zip(targets.tolist(), logp_MxV, strict=True))
  round_ = running[-1].round_
  target_M, model_M, hint_M, nll_M = map(np.concatenate, zip(*entries, strict=True))
  if state.hints.learns:
    record.hint_nll_N[target_M] = hint_M
    state.hints.learn(round_.documents, record.hint_nll_N)
    nll_M = state.hints.tilt(target_M, model_M, hint_M)
    samples = {t: state.hints.tilt_all(t, logp_V) for t, logp_V in samples.items()}
  record.enter(target_M, model_M, hint_M, nll_M)
  record.distributions.update(samples)
  bar.advance(len(target_M))
  bar.note(f"bpb {record.running_bpb:.4f}")
  for batch in round_.batches:
    if batch.index + 1 in plan.settings.ttt.eval_batches:
      log.info("batch %d of %d: running bpb %.5f", batch.index + 1, len(plan.batches), record.running_bpb)
    if options.after_batch is not None:
      options.after_batch(plan.batches.index(batch) + 1, record)


def _phase_is_due(plan: Plan, done: EvaluationProgress) -> bool:
  if done.phases >= len(plan.boundaries) or (done.batches % plan.chains.count and done.batches < len(plan.batches)):
    return False  # chains wait for one another
  scored = sum(len(batch.documents) for batch in plan.batches[: done.batches])
  # After the last document a phase would change no score; the published procedure runs it all the same.
  matters = done.batches < len(plan.batches) or plan.settings.ttt.order == "reference"
  return matters and scored >= plan.boundaries[done.phases]


def _run_phase(plan: Plan, programs: Programs, state: State, record: Record) -> None:
  """Trains all weights on the first documents scored, from shorter to longer batches; adapters start afresh."""
  began = time.monotonic()
  done = state.done
  scored = sorted(plan.batches[: done.batches], key=lambda batch: batch.index)
  learning = [d for b in scored for d, learns in zip(b.documents, b.learns, strict=True) if learns]
  documents = learning[: plan.boundaries[done.phases]]
  state.params = programs.phase.run(state.params, global_phase.join(plan.data.tokens, documents))
  state.inputs = state.inputs._replace(params=programs.computing(state.params))
  state.adapters.renew()
  done.phases += 1
  done.events.append(WeightsEvent(done.phases, tuple(document.index for document in documents)))
  record.save_weights(done.phases, state.params)
  jax.block_until_ready(state.inputs.params)
  done.seconds["global_phases"] += time.monotonic() - began


def _save(state: State, record: Record, clock: Clock) -> None:
  if record.folder is not None:
    state.done.adapters, arrays = state.adapters.state()
    state.done.seconds["evaluation"], state.done.compilations = clock.seconds, clock.compilations
    record.save(state.done, arrays)


def _resume(plan: Plan, programs: Programs, state: State, record: Record) -> Plan:
  """Goes on from the last save: state from disk, hints by counting the finished documents again.

  Returns:
    What is left to do. On other devices other batches ran side by side, so that a round may be half done.
  """
  state.done = record.progress
  for batch in plan.batches[: state.done.batches]:
    state.hints.prepare(batch.documents)
    if state.hints.learns:
      state.hints.learn(batch.documents, record.hint_nll_N)
  state.adapters.restore(state.done.adapters, record.arrays())
  if state.done.phases:
    state.params = jax.device_put(record.weights(state.done.phases), replicated(programs.mesh))
    state.inputs = state.inputs._replace(params=programs.computing(state.params))
  log.info("test-time training goes on after batch %d of %d", state.done.batches, len(plan.batches))
  left, done = [], state.done.batches
  for each in plan.rounds:
    left.append(each._replace(batches=each.batches[max(done, 0) :], places=each.places[max(done, 0) :]))
    done -= len(each.batches)
  return plan._replace(rounds=left)


def _result(plan: Plan, state: State, record: Record, clock: Clock, compilation: float) -> Evaluation:
  if clock.compilations:
    log.warning("fault: %d compilations inside the evaluation clock", clock.compilations)
  result = Evaluation(
    score=total(record.nll_N, plan.data),
    untilted=total(record.model_nll_N, plan.data),
    nll_N=record.nll_N,
    model_nll_N=record.model_nll_N,
    hint_nll_N=record.hint_nll_N,
    times_N=record.times_N,
    hint_N=state.hints.ids_N,
    gate_N=state.hints.gate_N,
    params=state.params,
    trace=state.done.events,
    clocks=Clocks(**{**state.done.seconds, "evaluation": clock.seconds}, compilation=compilation),
    recompilations=clock.compilations,
    useful_flops=plan.work.useful_flops,
    executed_flops=plan.work.executed_flops,
    distributions=record.distributions,
  )
  record.write_results(plan.batches, result)
  return result
