"""Score-first test-time training: documents scored chunk by chunk while adapters of their own learn. Recipe section 5.

The order of things, for each batch: hints for its documents → adapters start (A kept from the batch before, B zero) →
scans over chunks (scan.py), each target scored by the pass before the update that it takes part in → the batch's scores
to the host while the next one runs → where enough documents are scored, a global phase on all weights.
"""

import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pgolf_jax.model.params import Params
from pgolf_jax.runtime import distributed
from pgolf_jax.runtime.clock import compilations
from pgolf_jax.runtime.log import log
from pgolf_jax.runtime.mesh import place, world_size
from pgolf_jax.runtime.progress import progress
from pgolf_jax.scoring import chunks, evaluation, global_phase, order
from pgolf_jax.scoring.chunks import LEARN, Call, Shape
from pgolf_jax.scoring.documents import Batch, batches, find_documents, phase_boundaries, select
from pgolf_jax.scoring.evaluation import Clocks, Evaluation
from pgolf_jax.scoring.flops import Costs
from pgolf_jax.scoring.plain import ValidationData
from pgolf_jax.scoring.programs import Programs
from pgolf_jax.scoring.scan import call_arguments
from pgolf_jax.scoring.sets import AdapterSets, Draw, document_rows, is_short
from pgolf_jax.scoring.store import Store
from pgolf_jax.scoring.trace import Trace
from pgolf_jax.scoring.window import Rows, Scored
from pgolf_jax.settings.config import Settings

SAVE_SECONDS = 20.0
"""A restart loses at most this and the batch at hand; adapters of the full size take hundreds of megabytes."""


class Evaluator:
  """Scores documents with test-time training.

  Args:
    settings: of the run.
    mesh: has the axis `data`; a batch's documents are shared out over it.
    dtype: of the computation; adapters, moments and model weights are float32.
    draw: A of new adapter sets from elsewhere, in place of random ones.
    folder: where scores and progress are kept; an evaluation found there is gone on with.
    save_seconds: least time between saves.
    watch: targets whose whole distribution is wanted. It costs memory: all targets' are computed.
  """

  def __init__(
    self,
    settings: Settings,
    mesh: Mesh,
    *,
    dtype=jnp.bfloat16,
    draw: Draw | None = None,
    folder: Path | None = None,
    save_seconds: float = SAVE_SECONDS,
    watch: frozenset[int] = frozenset(),
  ):
    self.settings, self.mesh, self.dtype = settings, mesh, dtype
    self.draw, self.folder, self.save_seconds, self.watch = draw, folder, save_seconds, watch
    self._compiled: dict[tuple, Programs] = {}

  def programs(self, params: Params, scans: list[tuple[bool, Shape]], *, slots: int, stream_length: int, phases: bool):
    """Compiled programs, made when first asked for; an evaluation of the same shapes finds them ready."""
    key = (tuple(dict.fromkeys(scans)), slots, stream_length, phases)
    if key not in self._compiled:
      self._compiled[key] = Programs(
        self.settings,
        self.mesh,
        slots=slots,
        stream_length=stream_length,
        world=world_size(self.settings, self.mesh),
        dtype=self.dtype,
        distributions=bool(self.watch),
      )
      self._compiled[key].compile(params, scans, phases=phases)
    return self._compiled[key]

  def __call__(self, params: Params, data: ValidationData) -> Evaluation:
    """Scores every selected document once.

    Args:
      params: float32, under the recipe's names; left as they are.
      data: the validation stream and its byte sidecar.
    """
    return _Run(self, params, data).run()


class _Run:
  """One evaluation under way."""

  def __init__(self, evaluator: Evaluator, params: Params, data: ValidationData):
    self.settings, self.mesh = evaluator.settings, evaluator.mesh
    self._watch, self._save_seconds = evaluator.watch, evaluator.save_seconds
    s, ttt = self.settings, self.settings.ttt
    self._data = data
    self._targets = len(data.tokens) - 1
    self._all = find_documents(data.tokens, s.model.bos_id)
    documents = select(self._all, s.eval.doc_fraction, s.seed)
    self._reported = set(ttt.eval_batches)
    self._batches = batches(documents, ttt.batch_size, ascending=bool(ttt.eval_batches))
    self._boundaries = phase_boundaries(ttt.phase.prefix_docs, ttt.phase.count, len(documents))
    self._world = world_size(s, self.mesh)
    self._costs = Costs.of(s.model, ttt)
    began = time.monotonic()
    self._params = jax.device_put(
      {k: jnp.array(v, jnp.float32) for k, v in params.items()}, NamedSharding(self.mesh, P())
    )
    self._calls = self._plan()
    self._programs = evaluator.programs(
      self._params,
      [(is_short(ttt, b), call.shape) for b in self._batches for call in self._calls[b.index]],
      slots=-(-max(len(b.documents) for b in self._batches) // self.mesh.size),
      stream_length=len(data.tokens) + ttt.seq_len + ttt.chunk_size,
      # A chunk of the phase that is shorter than a row has nothing to train on.
      phases=bool(self._boundaries) and global_phase.row_tokens(ttt, s.eval.seq_len, self._world) > 0,
    )
    self._stream = place(self.mesh, np.pad(data.tokens.astype(np.int32), (0, ttt.seq_len + ttt.chunk_size)), P())
    self._store = Store(
      evaluator.folder,
      self._targets,
      evaluation.identity(s, params, data, evaluator.dtype) if evaluator.folder is not None else {},
      writes=distributed.is_leader(),
    )
    self._sets = AdapterSets(ttt, self._programs, seed=s.seed, draw=evaluator.draw)
    self._computing = self._programs.computing(self._params)
    self._memory = self._programs.new_memory()
    jax.block_until_ready((self._stream, self._computing))
    self._compilation = time.monotonic() - began
    self._trace = Trace()
    self._pending: list[tuple[Batch, Call, Scored]] = []
    self._distributions: dict[int, np.ndarray] = {}
    self._version = self._phase = self._finished = 0
    self._nats, self._bytes = 0.0, 0
    self._seconds = {"evaluation": 0.0, "hints": 0.0, "global_phases": 0.0}

  def _plan(self) -> dict[int, list[Call]]:
    """Each batch's calls, in shapes chosen for all of them; small and large adapters share the choice."""
    devices = self.mesh.size
    shapes = chunks.choose_shapes(self.settings.ttt, self._batches, self._costs, devices=devices)
    return {b.index: chunks.calls(self.settings.ttt, b, shapes, self._costs, devices=devices) for b in self._batches}

  def run(self) -> Evaluation:
    compiled = compilations()
    self._clock = time.monotonic()
    self._hints = self._make_hints()
    if self._store.progress is not None:
      self._resume()
    saved = time.monotonic()
    total = sum(d.targets for b in self._batches for d in b.documents)
    with progress("test-time training", total=total, unit="tokens") as bar:
      for batch in self._batches[: self._finished]:
        bar.advance(sum(d.targets for d in batch.documents))
      for batch in self._batches[self._finished :]:
        self._hint(batch)
        collect = self._pending
        self._pending = []
        self._dispatch(batch)
        # The batch before is fetched while the devices work on this one.
        self._collect(collect, bar)
        self._finished += 1
        if self._phase_due():
          self._collect(self._pending, bar)
          self._pending = []
          self._global_phase()
        if self._store.folder is not None and distributed.leaders(time.monotonic() - saved) >= self._save_seconds:
          self._collect(self._pending, bar)
          self._pending = []
          self._save()
          saved = time.monotonic()
      self._collect(self._pending, bar)
      self._pending = []
    self._save()
    return self._result(compilations() - compiled)

  def _make_hints(self) -> order.Hints:
    s = self.settings
    if not s.hints.enabled:
      return order.NoHints(self._targets)
    if s.ttt.order == "strict":
      return order.StrictHints(s.hints, s.model.vocab_size, self._data.tokens, self._trace)
    return order.ReferenceHints(s.hints, s.model.vocab_size, self._data.tokens, self._trace, self._all)

  def _hint(self, batch: Batch) -> None:
    began = time.monotonic()
    self._hints.prepare(batch.documents)
    self._seconds["hints"] += time.monotonic() - began

  def _dispatch(self, batch: Batch) -> None:
    """Puts a batch's scans on the devices, without waiting for them."""
    ttt, programs, n = self.settings.ttt, self._programs, self.mesh.size
    lease = self._sets.take(batch)
    of = programs.adapters[lease.short]
    self._trace.score(batch.index, batch.documents, weights=self._version, adapters=lease.label, carried=lease.carried)
    carry = of.begin(lease.adapters)
    row_D = document_rows(len(batch.documents), programs.slots, n)
    host = Rows(*(np.zeros(programs.rows, t) for t in (np.int32, np.int32, bool)))
    for row, document in zip(row_D, batch.documents, strict=True):
      host.start[row], host.targets[row] = document.start, document.targets
      host.learns[row] = chunks.learns(ttt, document)
    rows = programs.place_rows(host)
    size = chunks.chunk_size(ttt, batch.longest)
    done_B = np.zeros(programs.rows, np.int32)
    total = 0
    for call in self._calls[batch.index]:
      at, valid = _places(batch, call, size, n)
      hint = np.where(valid & self._hints.gate_N[at], self._hints.hint_N[at], -1)
      arguments = call_arguments(self.mesh, size, [s.k for s in call.steps], [s.kind for s in call.steps], hint)
      carry, self._memory, scored = programs.scan(
        lease.short, call.shape, self._computing, self._stream, carry, self._memory, rows, arguments
      )
      self._pending.append((batch, call, scored))
      updates = ttt.lora.grad_steps * sum(step.kind == LEARN for step in call.steps)
      done_B[np.arange(programs.rows) % programs.slots < call.shape.slots] += updates
      total += updates
    if self._sets.needs_end(lease):
      adapters = of.settle(carry, programs.row_integers(done_B), place(self.mesh, np.int32(total)[...], P()))
      self._sets.give_back(batch, lease, adapters)

  def _collect(self, pending: list[tuple[Batch, Call, Scored]], bar) -> None:
    """Brings scores to the host and enters them under their targets."""
    for batch, call, scored in pending:
      size = chunks.chunk_size(self.settings.ttt, batch.longest)
      at, valid = _places(batch, call, size, self.mesh.size)
      at = at[valid]
      steps = len(call.steps)
      model_nll, nll, logp = (None if x is None else np.asarray(x)[:steps][valid] for x in scored)
      self._store.model_nll_N[at] = model_nll
      self._store.nll_N[at] = nll
      np.add.at(self._store.times_N, at, 1)
      self._nats += float(self._store.nll_N[at].sum(dtype=np.float64))
      self._bytes += int(self._data.token_bytes[at + 1].sum(dtype=np.int64))
      if logp is not None:
        self._distributions.update((t, row) for t, row in zip(at.tolist(), logp, strict=True) if t in self._watch)
      bar.advance(len(at))
    if pending:
      self._report(pending[-1][0], bar)

  def _report(self, batch: Batch, bar) -> None:
    bpb = self._nats / math.log(2) / max(self._bytes, 1)
    bar.note(f"bpb {bpb:.4f}")
    if batch.index + 1 in self._reported:
      log.info("batch %d of %d: running bpb %.5f", batch.index + 1, len(self._batches), bpb)

  def _phase_due(self) -> bool:
    if self._phase >= len(self._boundaries):
      return False
    scored = sum(len(b.documents) for b in self._batches[: self._finished])
    # After the last document a phase would change no score; the published procedure runs it all the same.
    more = self._finished < len(self._batches) or self.settings.ttt.order == "reference"
    return more and scored >= self._boundaries[self._phase]

  def _global_phase(self) -> None:
    began = time.monotonic()
    ttt, s = self.settings.ttt, self.settings
    scored = sorted(self._batches[: self._finished], key=lambda b: b.index)
    documents = [d for b in scored for d in b.documents if chunks.learns(ttt, d)][: self._boundaries[self._phase]]
    stream = global_phase.join(self._data.tokens, documents)
    momentum = self._programs.zeros(self._params)
    for step in global_phase.phase_steps(ttt, stream, seq_len=s.eval.seq_len, world=self._world):
      self._params, momentum, _ = self._programs.update(self._params, momentum, step)
    del momentum
    self._phase += 1
    self._version += 1
    self._trace.weights(self._version, documents)
    self._computing = self._programs.computing(self._params)
    self._sets.renew()
    if self._store.folder is not None:
      self._store.save_weights(self._version, {k: np.asarray(v) for k, v in self._params.items()})
    jax.block_until_ready(self._params)
    self._seconds["global_phases"] += time.monotonic() - began

  def _save(self) -> None:
    if self._store.folder is None:
      return
    values, arrays = self._sets.state()
    self._store.save(
      {
        "batches": self._finished,
        "version": self._version,
        "phase": self._phase,
        "sets": values,
        "events": self._trace.events,
        "seconds": {**self._seconds, "evaluation": self._elapsed()},
      },
      arrays,
    )

  def _resume(self) -> None:
    """Goes on from the last save: state from disk, hints by counting the finished documents again."""
    kept = self._store.progress
    self._finished, self._version, self._phase = kept["batches"], kept["version"], kept["phase"]
    self._seconds = kept["seconds"]
    for batch in self._batches[: self._finished]:
      self._hint(batch)
    self._trace.events = kept["events"]
    for batch in self._batches[self._finished :]:
      for document in batch.documents:
        self._store.forget(document.target_slice)
    self._sets.restore(kept["sets"], self._store.arrays())
    if self._version:
      host = self._store.weights(self._version)
      self._params = jax.device_put(host, NamedSharding(self.mesh, P()))
      self._computing = self._programs.computing(self._params)
    score = evaluation.total(self._store.nll_N, self._data)
    self._nats, self._bytes = score.nats, score.text_bytes
    log.info("test-time training goes on after batch %d of %d", self._finished, len(self._batches))

  def _elapsed(self) -> float:
    return self._seconds["evaluation"] + time.monotonic() - self._clock

  def _result(self, recompilations: int) -> Evaluation:
    if recompilations:
      log.warning("fault: %d compilations inside the evaluation clock", recompilations)
    flops = [self._flops(batch) for batch in self._batches]
    found = Evaluation(
      score=evaluation.total(self._store.nll_N, self._data),
      untilted=evaluation.total(self._store.model_nll_N, self._data),
      nll_N=self._store.nll_N,
      model_nll_N=self._store.model_nll_N,
      times_N=self._store.times_N,
      hint_N=self._hints.hint_N,
      gate_N=self._hints.gate_N,
      params=self._params,
      trace=self._trace.events,
      clocks=Clocks(**{**self._seconds, "evaluation": self._elapsed()}, compilation=self._compilation),
      recompilations=recompilations,
      useful_flops=sum(useful for useful, _ in flops),
      executed_flops=sum(executed for _, executed in flops),
      distributions=self._distributions,
    )
    self._store.write_lines("documents.jsonl", evaluation.document_lines(self._batches, found, self._data))
    self._store.write_lines("trace.jsonl", found.trace)
    return found

  def _flops(self, batch: Batch) -> tuple[float, float]:
    """(needed by the documents' own windows, run with all padding) of a batch."""
    ttt, size = self.settings.ttt, chunks.chunk_size(self.settings.ttt, batch.longest)
    executed = sum(
      self._costs.step(*call.shape, learn=step.kind == LEARN) * self.mesh.size
      for call in self._calls[batch.index]
      for step in call.steps
    )
    return sum(chunks.own_flops(ttt, self._costs, d, size) for d in batch.documents), executed


def _places(batch: Batch, call: Call, size: int, devices: int) -> tuple[np.ndarray, np.ndarray]:
  """The stream's target at each place [S, B, X] of a call's output, and whether there is one."""
  slots, _, width = call.shape
  longest_first = batch.documents[::-1]
  # Row r is slot r % slots of device r // slots; the i-th longest document is in slot i // devices of i % devices.
  rank_B = np.arange(slots * devices) % slots * devices + np.arange(slots * devices) // slots
  there_B = rank_B < len(longest_first)
  start_B, targets_B = (
    np.array([getattr(longest_first[i], name) if there else 0 for i, there in zip(rank_B, there_B, strict=True)])
    for name in ("start", "targets")
  )
  k_S = np.array([step.k for step in call.steps])
  within = k_S[:, None, None] * size + np.arange(width)
  valid = (within < targets_B[:, None]) & (np.arange(width) < size)
  return np.where(valid, start_B[:, None] + within, 0), valid
