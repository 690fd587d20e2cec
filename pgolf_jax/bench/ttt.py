"""`pgolf bench ttt`: test-time training on documents of given lengths: rate, padding, and time outside the scans."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import jax
import numpy as np
import tyro

from pgolf_jax import stages
from pgolf_jax.bench import harness
from pgolf_jax.bench.harness import Measurement, Way, Work
from pgolf_jax.model import params as parameters
from pgolf_jax.runtime import distributed
from pgolf_jax.runtime.mesh import data_mesh
from pgolf_jax.scoring import buckets
from pgolf_jax.scoring.compiled import Programs
from pgolf_jax.scoring.documents import batches, find_documents
from pgolf_jax.scoring.plain import ValidationData, load_validation
from pgolf_jax.scoring.record import Evaluation
from pgolf_jax.scoring.ttt import evaluate
from pgolf_jax.settings.config import Settings
from pgolf_jax.settings.load import load

Method = Literal["exact", "cached"]


def ttt(
  config: Annotated[Path, tyro.conf.Positional],
  data: Path | None = None,
  documents: int = 48,
  methods: tuple[Method, ...] = ("exact", "cached"),
  repeats: int = 5,
) -> None:
  """Time score-first test-time training with random weights on the validation documents of a data folder.

  The padding of buckets is counted over all documents; the rate is measured on some of them, drawn evenly from the
  shortest to the longest. No global phase runs. Every scan is waited for, so that the time outside is not hidden.
  FLOP/s are those executed, padding included, while a scan runs.

  Example: pgolf bench ttt configs/demo.toml --data data/web --documents 48

  Args:
    config: TOML file of settings.
    data: folder of shards; the config's if not given.
    documents: number of documents to score, or all if there are fewer.
    methods: which evaluations to time.
    repeats: times that each evaluation is run, in turn with the others.
  """
  distributed.start()
  settings = load(config)
  folder = data or stages.data_folder(settings)
  columns = {
    "shapes": lambda m: f"{m.facts.shapes}",
    "useful": lambda m: f"{m.facts.useful_share:.3f}",
    "useful in one shape": lambda m: f"{m.facts.one_shape_share:.3f}",
    "tokens": lambda m: f"{m.way.work.amount:,}",
    **harness.SECONDS,
    **harness.rate("tokens"),
    "outside": lambda m: harness.percentage(m.facts.outside_share),
    "GFLOP/s": lambda m: harness.figure(m.facts.flops_per_second, 1e9),
    "compile s": lambda m: f"{m.facts.compile_seconds:.0f}",
    **harness.COMPARISON,
  }
  measurements = measure(settings, folder, methods, documents, repeats)
  harness.show(f"test-time training, {config.stem} on {folder}", measurements, columns)


class Facts(NamedTuple):
  """What is known of a method beside its times.

  Attributes:
    shapes: number of shapes that are compiled, for all documents.
    useful_share: useful FLOPs over executed ones, for all documents.
    one_shape_share: the same if every chunk ran in the largest shape.
    outside_share: part of the first evaluation's time in which no scan ran.
    flops_per_second: executed in the first evaluation's scans.
    compile_seconds: before the first evaluation.
  """

  shapes: int
  useful_share: float
  one_shape_share: float
  outside_share: float
  flops_per_second: float
  compile_seconds: float


def measure(
  settings: Settings, folder: Path, methods: tuple[Method, ...], count: int, repeats: int
) -> list[Measurement]:
  """Returns the table's rows; `count` documents are scored."""
  data = load_validation(folder)
  sample = sample_documents(data, settings.model.bos_id, count)
  return harness.measure([_way(settings, method, data, sample) for method in methods], repeats, warmups=0)[0]


def sample_documents(data: ValidationData, bos_id: int, count: int) -> ValidationData:
  """Returns a stream of some documents, drawn evenly from the shortest to the longest."""
  by_length = sorted(find_documents(data.tokens, bos_id), key=lambda d: d.length)
  chosen = [by_length[i] for i in np.linspace(0, len(by_length) - 1, min(count, len(by_length))).astype(int)]
  parts = [slice(d.start, d.start + d.targets) for d in dict.fromkeys(chosen)]
  return ValidationData(*(np.concatenate([x[part] for part in parts]) for x in data))


def _way(settings: Settings, method: Method, data: ValidationData, sample: ValidationData) -> Way:
  mesh = data_mesh()
  without_phase = dataclasses.replace(settings.ttt.phase, prefix_docs=0)
  t = dataclasses.replace(settings.ttt, method=method, phase=without_phase)
  settings = dataclasses.replace(settings, ttt=t, eval=dataclasses.replace(settings.eval, doc_fraction=1.0))
  programs = _TimedPrograms(settings, mesh)
  params = parameters.init(settings.model, jax.random.key(0))

  def facts(evaluation: Evaluation) -> Facts:
    costs = buckets.Costs.estimate(settings.model, t)
    cut = batches(t, find_documents(data.tokens, settings.model.bos_id))
    work = buckets.plan_work(t, cut, costs, devices=mesh.size)
    in_one = [call for batch in cut for call in buckets.calls(t, batch, work.shapes[:1], costs, devices=mesh.size)]
    return Facts(
      shapes=len(work.shapes),
      useful_share=work.useful_flops / work.executed_flops,
      one_shape_share=work.useful_flops / (mesh.size * sum(map(costs.call, in_one))),
      outside_share=1 - programs.seconds / evaluation.clocks.evaluation,
      flops_per_second=evaluation.executed_flops / programs.seconds,
      compile_seconds=evaluation.clocks.compilation,
    )

  return Way(
    {"method": method},
    prepare=lambda: lambda: evaluate(settings, params, sample, mesh, programs=programs),
    work=Work(len(sample.tokens) - 1, "tokens"),
    inspect=facts,
    clock=lambda evaluation: evaluation.clocks.evaluation,
  )


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


COMMAND = ttt
