"""`pgolf bench ttt`: test-time training on documents of given lengths: rate, padding, and time outside the steps."""

import time
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np

from pgolf_jax.bench import harness
from pgolf_jax.bench.harness import Way, Work, figure, percentage
from pgolf_jax.data.folder import locate_prepared
from pgolf_jax.data.shards import ValidationData, load_validation
from pgolf_jax.model import params as parameters
from pgolf_jax.runtime import distributed
from pgolf_jax.runtime.distributed import data_mesh
from pgolf_jax.scoring import buckets
from pgolf_jax.scoring.compiled import Programs
from pgolf_jax.scoring.documents import batches, find_documents, rounds
from pgolf_jax.scoring.record import Evaluation
from pgolf_jax.scoring.ttt import evaluate
from pgolf_jax.settings import Settings
from pgolf_jax.settings.arguments import Positional
from pgolf_jax.settings.load import changed, load


class Facts(NamedTuple):
  """What is known of an evaluation besides its time."""

  shapes: int  # compiled, for all documents
  useful_share: float  # useful FLOPs over executed, all documents
  one_shape_share: float  # the same if every chunk ran in the largest shape
  outside_share: float  # of the first timed seconds, those in which no step ran
  flops_per_second: float  # executed, while a step ran
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
  shortest to the longest. No global phase runs. Every step is waited for, so that the time outside is not hidden.

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
    work = buckets.plan_work(t, dealt, costs, devices=mesh.size, platform=jax.default_backend())
    largest = work.shapes[:1]
    in_one_shape = [c for each in dealt for c in buckets.calls(t, each, largest, costs, devices=mesh.size)]
    return Facts(
      shapes=len(work.shapes),
      useful_share=work.useful_flops / work.executed_flops,
      one_shape_share=work.useful_flops / (mesh.size * sum(costs.step(call.shape) for call in in_one_shape)),
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
  """Programs that wait for every step.

  Attributes:
    seconds: time in which a step ran.
  """

  seconds = 0.0

  def step(self, *arguments):
    began = time.perf_counter()
    result = jax.block_until_ready(super().step(*arguments))
    self.seconds += time.perf_counter() - began
    return result


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
