"""`pgolf bench ttt`: test-time training on documents of given lengths: rate, padding, and time outside the scans."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from pgolf_jax.data.folder import locate_prepared
from pgolf_jax.data.validation import ValidationData, load_validation
from pgolf_jax.model import params as parameters
from pgolf_jax.runtime import distributed
from pgolf_jax.runtime.mesh import data_mesh
from pgolf_jax.scoring import buckets
from pgolf_jax.scoring.compiled import Programs
from pgolf_jax.scoring.documents import batches, find_documents
from pgolf_jax.scoring.ttt import evaluate
from pgolf_jax.settings.config import Settings
from pgolf_jax.settings.load import load


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
  distributed.start()
  loaded = load(config)
  folder = data or locate_prepared(loaded)
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


def measure(settings: Settings, folder: Path, method: str, count: int) -> Row:
  """Returns one line of the table."""
  mesh = data_mesh()
  without_phase = dataclasses.replace(settings.ttt.phase, prefix_docs=0)
  t = dataclasses.replace(settings.ttt, method=method, phase=without_phase)
  settings = dataclasses.replace(settings, ttt=t, eval=dataclasses.replace(settings.eval, doc_fraction=1.0))
  data = load_validation(folder)
  documents = find_documents(data.tokens, settings.model.bos_id)
  costs, cut = buckets.Costs.estimate(settings.model, t), batches(t, documents)
  work = buckets.plan_work(t, cut, costs, devices=mesh.size)
  in_one = [call for batch in cut for call in buckets.calls(t, batch, work.shapes[:1], costs, devices=mesh.size)]

  by_length = sorted(documents, key=lambda d: d.length)
  chosen = [by_length[i] for i in np.linspace(0, len(by_length) - 1, min(count, len(by_length))).astype(int)]
  parts = [slice(d.start, d.start + d.targets) for d in dict.fromkeys(chosen)]
  sample = ValidationData(*(np.concatenate([x[part] for part in parts]) for x in data))

  programs = _TimedPrograms(settings, mesh)
  result = evaluate(settings, parameters.init(settings.model, jax.random.key(0)), sample, mesh, programs=programs)
  seconds = result.clocks.evaluation
  return Row(
    method=method,
    shapes=len(work.shapes),
    useful_share=work.useful_flops / work.executed_flops,
    one_shape_share=work.useful_flops / (mesh.size * sum(map(costs.call, in_one))),
    tokens=result.score.targets,
    seconds=seconds,
    outside_share=1 - programs.seconds / seconds,
    flops_per_second=result.executed_flops / programs.seconds,
    compile_seconds=result.clocks.compilation,
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
