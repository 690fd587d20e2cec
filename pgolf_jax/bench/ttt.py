"""`pgolf bench ttt`: test-time training on documents of given lengths: rate, padding, and time outside the scans."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pgolf_jax.bench import harness
from pgolf_jax.bench.harness import Way, Work, figure, percentage
from pgolf_jax.bench.step import first_params
from pgolf_jax.data.folder import locate_prepared
from pgolf_jax.data.shards import ValidationData, load_validation
from pgolf_jax.model import params as parameters
from pgolf_jax.runtime import distributed
from pgolf_jax.runtime.distributed import data_mesh, place
from pgolf_jax.scoring import buckets
from pgolf_jax.scoring.buckets import LEARN, Call, Shape, Step, steps_per_call
from pgolf_jax.scoring.compiled import Programs
from pgolf_jax.scoring.context import Rows
from pgolf_jax.scoring.documents import batches, find_documents, rounds
from pgolf_jax.scoring.record import Evaluation
from pgolf_jax.scoring.scan import ScanInputs, ScanState, Spec, abstract, place_call, sharded_scan
from pgolf_jax.scoring.ttt import evaluate
from pgolf_jax.settings import Settings
from pgolf_jax.settings.arguments import Positional
from pgolf_jax.settings.load import changed, load


class Facts(NamedTuple):
  """What is known of an evaluation besides its time."""

  shapes: int  # compiled, for all documents
  useful_share: float  # useful FLOPs over executed, all documents
  one_shape_share: float  # the same if every chunk ran in the largest shape
  outside_share: float  # of the first timed seconds, those in which no scan ran
  flops_per_second: float  # executed, while a scan ran
  compile_seconds: float


def ttt(
  config: Positional[Path],
  data: Path | None = None,
  documents: int = 48,
  methods: tuple[Literal["exact", "cached"], ...] = ("exact", "cached"),
  repeats: int = 5,
) -> None:
  """Time score-first test-time training with random weights on the validation documents of a data folder.

  The padding of buckets is counted over all documents; the rate is measured on some of them, drawn evenly from the
  shortest to the longest. No global phase runs. Every scan is waited for, so that the time outside is not hidden.

  Example: pgolf bench ttt configs/demo.toml --data data/web --documents 48

  Args:
    config: TOML file of settings.
    data: folder of shards; the config's if not given.
    documents: number of documents to score, or all if there are fewer.
    methods: which evaluations to time.
    repeats: timed evaluations of each method, in turn with the others.
  """
  distributed.start()
  settings = load(config)
  folder = data or locate_prepared(settings)
  validation = load_validation(folder)
  measurements, notes = harness.measure([way(settings, validation, m, documents) for m in methods], repeats, warmups=0)
  harness.show(f"test-time training, {config.stem} on {folder}", measurements, _COLUMNS, notes)


def way(settings: Settings, data: ValidationData, method: str, count: int) -> Way:
  """Returns the evaluation of `count` documents by one method; its time is that of the evaluation's own clock."""
  mesh = data_mesh()
  settings = changed(settings, {"ttt.method": method, "ttt.phase.prefix_docs": 0, "eval.doc_fraction": 1.0})
  t = settings.ttt
  sample = _sample(data, count, settings.model.bos_id)
  programs = _TimedPrograms(settings, mesh)

  def prepare():
    params = parameters.init(settings.model, jax.random.key(0))
    return lambda: evaluate(settings, params, sample, mesh, programs=programs)

  def inspect(result: Evaluation) -> Facts:
    cut = batches(t, find_documents(data.tokens, settings.model.bos_id))
    dealt = rounds(cut, programs.chains.among(len(cut)))
    costs = buckets.Costs.estimate(settings.model, t)
    work = buckets.plan_work(t, dealt, costs, devices=mesh.size, platform=distributed.platform(mesh))
    steps_in_all = sum(len(buckets.steps(t, each)) for each in dealt)
    return Facts(
      shapes=len(work.shapes),
      useful_share=work.useful_flops / work.executed_flops,
      one_shape_share=work.useful_flops / (mesh.size * steps_in_all * costs.step(work.shapes[0])),
      outside_share=1 - programs.seconds / result.clocks.evaluation,
      flops_per_second=result.executed_flops / programs.seconds,
      compile_seconds=result.clocks.compilation,
    )

  work = Work(amount=len(sample.tokens) - 1, unit="tokens")
  return Way({"method": method}, prepare, work, inspect=inspect, clock=lambda result: result.clocks.evaluation)


def _sample(data: ValidationData, count: int, bos_id: int) -> ValidationData:
  """Returns a stream of documents drawn evenly from the shortest to the longest."""
  by_length = sorted(find_documents(data.tokens, bos_id), key=lambda d: d.length)
  chosen = [by_length[i] for i in np.linspace(0, len(by_length) - 1, min(count, len(by_length))).astype(int)]
  parts = [slice(d.start, d.start + d.targets) for d in dict.fromkeys(chosen)]
  return ValidationData(*(np.concatenate([x[part] for part in parts]) for x in data))


class _TimedPrograms(Programs):
  """Programs that wait for every scan.

  Attributes:
    seconds: time in which a scan ran.
  """

  seconds = 0.0

  def scan(self, *arguments):
    began = time.perf_counter()
    result = jax.block_until_ready(super().scan(*arguments))
    self.seconds += time.perf_counter() - began
    return result


LEARNING_STEPS = 8
"""Chunks that `learning_steps` takes."""


def learning_steps(settings: Settings, mesh: Mesh, shape: Shape) -> Callable[[], Any]:
  """Places random documents of `shape`; returns a function that scores and learns from `LEARNING_STEPS` chunks of each.

  Args:
    settings: `ttt.method` and `train.compute_dtype` say how.
    shape: documents on each device, tokens of their windows, targets of a chunk; it learns.
  """
  slots, window, width, _ = shape
  spec, rows = Spec.choose(settings, short=False), slots * mesh.size
  length = window + (LEARNING_STEPS + 1) * width + 1
  tokens = np.random.default_rng(0).integers(2, settings.model.vocab_size, rows * length, np.int32)
  tokens[::length] = settings.model.bos_id
  stream = np.pad(tokens, (0, settings.ttt.seq_len + width))
  programs = Programs(settings, mesh)
  params = {name: jax.numpy.asarray(x) for name, x in first_params(settings).items()}
  first, ones = -(-window // width), np.ones(rows, np.int32)  # the first chunk before which a window is full
  steps = tuple(Step(first + i, rows, window, LEARN) for i in range(LEARNING_STEPS))
  documents = Rows(np.arange(rows, dtype=np.int32) * length, ones * (length - 1), ones > 0, ones * (steps[-1].k + 1))
  inputs = ScanInputs(
    programs.computing(params), place(mesh, stream, P()), programs.place_rows(documents), programs.place_size(width)
  )
  at_once = steps_per_call(distributed.platform(mesh))
  calls = [Call(shape, steps[i : i + at_once]) for i in range(0, LEARNING_STEPS, at_once)]
  no_hints = np.full((at_once, rows, width), -1)
  inputs = [place_call(mesh, inputs, call, no_hints[: len(call.steps)]) for call in calls]
  state = ScanState(programs.adapters[False].warm_up(rows), programs.new_memory(slots))
  program = sharded_scan(mesh, spec, shape).lower(*abstract(mesh, spec, shape, slots, len(stream))).compile()

  def run():
    nonlocal state
    for each in inputs:
      state, scored = program(state, each)
    return scored

  return run


_COLUMNS: harness.Columns = {
  "shapes": lambda m: str(m.facts.shapes),
  "useful": lambda m: f"{m.facts.useful_share:.3f}",
  "one shape": lambda m: f"{m.facts.one_shape_share:.3f}",
  "tokens": lambda m: figure(m.way.work.amount),
  **harness.SECONDS,
  **harness.rate("tokens"),
  "outside": lambda m: percentage(m.facts.outside_share),
  "GFLOP/s": lambda m: figure(m.facts.flops_per_second, 1e9),
  "compile s": lambda m: figure(m.facts.compile_seconds),
  **harness.COMPARISON,
}

COMMAND = ttt
