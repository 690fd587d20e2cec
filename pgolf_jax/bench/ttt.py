"""`pgolf bench ttt`: test-time training on documents of given lengths: rate, padding, and time outside the scans."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Row:
  """What was measured with one method."""

  method: str
  shapes: int  # compiled, for all documents
  useful_share: float  # useful FLOPs over executed, all documents
  one_shape_share: float  # the same if every chunk ran in the largest shape
  tokens: int  # scored
  seconds: float
  outside_share: float  # of the seconds, those in which no scan ran
  flops_per_second: float  # executed
  compile_seconds: float


def ttt(
  config: Annotated[Path, tyro.conf.Positional],
  data: Path | None = None,
  documents: int = 48,
  methods: tuple[Literal["exact", "cached"], ...] = ("exact", "cached"),
) -> None:
  """Time score-first test-time training with random weights on the validation documents of a data folder.

  The padding of buckets is counted over all documents; the rate is measured on some of them, drawn evenly from the
  shortest to the longest. No global phase runs. Every scan is waited for, so that the time outside is not hidden.

  Example: pgolf bench ttt configs/demo.toml --data data/web --documents 48

  Args:
    config: TOML file of settings.
    data: folder of shards; the config's if not given.
    documents: how many to score; all if there are fewer.
    methods: which evaluations to time.
  """
  from rich.console import Console
  from rich.table import Table

  from pgolf_jax import stages
  from pgolf_jax.runtime import distributed
  from pgolf_jax.settings.load import load

  distributed.start()
  loaded = load(config)
  folder = data or stages.data_folder(loaded)
  table = Table(title=f"test-time training, {config.stem} on {folder}", title_justify="left")
  columns = ("method", "shapes", "useful", "one shape", "tokens", "s", "tokens/s", "outside", "GFLOP/s", "compile s")
  for column in columns:
    table.add_column(column, justify="left" if column == "method" else "right")
  for method in methods:
    row = measure(loaded, folder, method, documents)
    table.add_row(
      row.method,
      str(row.shapes),
      f"{row.useful_share:.3f}",
      f"{row.one_shape_share:.3f}",
      f"{row.tokens:,}",
      f"{row.seconds:.1f}",
      f"{row.tokens / row.seconds:,.0f}",
      f"{row.outside_share:.1%}",
      f"{row.flops_per_second / 1e9:,.1f}",
      f"{row.compile_seconds:.0f}",
    )
  console = Console()
  if not console.is_terminal:
    console.width = 120  # a log file takes the whole table
  console.print(table)


def measure(settings, folder: Path, method: str, count: int) -> Row:
  """One line of the table."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from pgolf_jax.model import params as parameters
  from pgolf_jax.runtime.mesh import data_mesh
  from pgolf_jax.scoring import chunks
  from pgolf_jax.scoring.documents import batches, find_documents
  from pgolf_jax.scoring.flops import Costs
  from pgolf_jax.scoring.plain import ValidationData, load_validation
  from pgolf_jax.scoring.ttt import Evaluator

  mesh = data_mesh()
  t = dataclasses.replace(settings.ttt, method=method, phase=dataclasses.replace(settings.ttt.phase, prefix_docs=0))
  settings = dataclasses.replace(settings, ttt=t, eval=dataclasses.replace(settings.eval, doc_fraction=1.0))
  data = load_validation(folder)
  found = find_documents(data.tokens, settings.model.bos_id)
  costs = Costs.of(settings.model, t)
  cut = batches(found, t.batch_size)
  shapes = chunks.choose_shapes(t, cut, costs, devices=mesh.size)
  useful = sum(chunks.own_flops(t, costs, d, chunks.chunk_size(t, b.longest)) for b in cut for d in b.documents)

  def executed(shapes) -> float:
    calls = [call for b in cut for call in chunks.calls(t, b, shapes, costs, devices=mesh.size)]
    steps = [(call.shape, step) for call in calls for step in call.steps]
    return mesh.size * sum(costs.step(*shape, learn=step.kind == chunks.LEARN) for shape, step in steps)

  by_length = sorted(found, key=lambda d: d.length)
  chosen = [by_length[i] for i in np.linspace(0, len(by_length) - 1, min(count, len(by_length))).astype(int)]
  parts = [slice(d.start, d.start + d.targets) for d in dict.fromkeys(chosen)]
  sample = ValidationData(*(np.concatenate([x[part] for part in parts]) for x in data))

  class Timed(Evaluator):
    scans = 0.0

    def programs(self, *arguments, **options):
      programs = super().programs(*arguments, **options)
      scan = programs.scan

      def timed(*arguments):
        began = time.perf_counter()
        result = jax.block_until_ready(scan(*arguments))
        self.scans += time.perf_counter() - began
        return result

      programs.scan = timed
      return programs

  evaluator = Timed(settings, mesh, dtype=jnp.dtype(settings.train.compute_dtype))
  scored = evaluator(parameters.init(settings.model, jax.random.key(0)), sample)
  seconds = scored.clocks.evaluation
  return Row(
    method=method,
    shapes=len(shapes),
    useful_share=useful / executed(shapes),
    one_shape_share=useful / executed(shapes[:1]),
    tokens=scored.score.targets,
    seconds=seconds,
    outside_share=1 - evaluator.scans / seconds,
    flops_per_second=scored.executed_flops / evaluator.scans,
    compile_seconds=scored.clocks.compilation,
  )


COMMAND = ttt
