"""`pgolf bench scoring`: ways of scoring the same weights with test-time training, in pairs, with their speed."""

import functools
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from pgolf_jax import run_set, stages
from pgolf_jax.data.folder import locate_prepared
from pgolf_jax.data.shards import ValidationData, load_validation, stream_hash
from pgolf_jax.errors import UserError
from pgolf_jax.model.params import Params, content_hash
from pgolf_jax.quantize import artifact
from pgolf_jax.report.statistics import ratio
from pgolf_jax.run_folder import RunFolder
from pgolf_jax.run_set import Member
from pgolf_jax.runtime import distributed
from pgolf_jax.runtime.distributed import data_mesh
from pgolf_jax.runtime.files import read_sealed, require_room, seal, write_json
from pgolf_jax.runtime.log import log
from pgolf_jax.scoring import ttt
from pgolf_jax.scoring.compiled import Programs
from pgolf_jax.scoring.documents import first_documents, sum_by_document
from pgolf_jax.settings import Settings
from pgolf_jax.settings.arguments import Positional, Repeated
from pgolf_jax.settings.load import changed, written
from pgolf_jax.tables import Table


def scoring(
  folder: Positional[Path],
  set: Repeated[str] = (),
  weights: Literal["artifact", "averaged"] = "artifact",
  documents: int | None = None,
  json: Path | None = None,
) -> None:
  """Score the weights of a run, or of every run of a set, with several settings of test-time training and of hints.

  Every combination of the values is scored on the same documents. ΔBPB is the difference from the first combination,
  paired by document after the mean over runs, ± its standard error over documents, with Student's two-sided p. Targets
  a second are those of the evaluation's clock, compilation apart. The folders are only read.

  Example: pgolf bench scoring runs/demo --set ttt.chunk_size=64,32,16 --set grad_steps=1,2 --documents 100

  Args:
    folder: a run, or a set of runs that differ in their seeds.
    set: values of a setting of ttt or hints, as in ttt.chunk_size=64,32; again for a grid.
    weights: those of the artifact, or the averaged ones before quantising.
    documents: number of documents to score, from the first; all if not given.
    json: file that keeps all figures; what it has of these weights, targets and settings is not scored again.
  """
  if json is not None:
    require_room(json)
  distributed.start()
  record = Record(json)
  runs, names, scored = _runs(folder), [], []
  # All runs in one way, then in the next, so that each way is compiled once.
  for ways in zip(*(_members(path, set) for path in runs), strict=True):
    names.append(ways[0].name)
    scored.append([])
    for path, way in zip(runs, ways, strict=True):
      inputs = Inputs.load(path, way, weights, documents)
      key = f"{path.name} {way.name} {weights} {documents or 'all'} {inputs.digest()}"
      if key not in record.rows:
        record.add(key, _score(inputs, f"{path}, {way.name or 'as configured'}"))
      scored[-1].append(record.rows[key])
  title = f"{folder}, {weights} weights: {len(scored[0][0]['nats'])} documents, {len(runs)} run{'s'[: len(runs) > 1]}"
  print(table(names, scored, title))


def _runs(folder: Path) -> list[Path]:
  if (folder / "config.toml").is_file():
    return [folder]
  if runs := sorted(path.parent for path in folder.glob("*/config.toml")):
    return runs
  raise UserError(f"{folder} is neither a run nor a set of runs; `pgolf train` makes both.")


def _members(path: Path, grid: Sequence[str]) -> list[Member]:
  """The combinations of a grid as changes of a run's settings."""
  names = [run_set.full_name(text.partition("=")[0]) for text in grid]
  if other := [name for name in names if not name.startswith(("ttt.", "hints."))]:
    raise UserError(f"{other[0]} is no setting of ttt or hints, so that its values cannot share a run's weights.")
  return run_set.members(RunFolder(path).settings, "", grid)


class Record:
  """Scores in memory, and in a file if one is given."""

  def __init__(self, path: Path | None):
    self._path = path
    self.rows: dict[str, dict] = read_sealed(path)["rows"] if path is not None and path.exists() else {}

  def add(self, key: str, row: dict) -> None:
    """Enters what `_score` returns."""
    self.rows[key] = row
    if self._path is not None and distributed.is_leader():
      write_json(self._path, seal({"rows": self.rows}))


class Inputs(NamedTuple):
  """All that decides what a run's documents score."""

  settings: Settings
  params: Params
  data: ValidationData

  @classmethod
  def load(cls, path: Path, member: Member, weights: str, count: int | None) -> "Inputs":
    """Reads a run's weights and its first documents, to be scored in one way."""
    run, settings = RunFolder(path), changed(member.settings, {"eval.doc_fraction": 1.0})
    params = artifact.load(run.artifact)[1] if weights == "artifact" else stages.averaged_params(run, data_mesh())
    data = first_documents(load_validation(locate_prepared(settings)), count, settings.model.bos_id)
    return cls(settings, params, data)

  def digest(self) -> str:
    """Returns the SHA-256 of weights, targets, their bytes, and settings but for where the data lie."""
    decides = sorted((name, value) for name, value in written(self.settings).items() if not name.startswith("data."))
    parts = content_hash(self.params), self.data.tokens_sha256, stream_hash(self.data.token_bytes), decides
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _score(inputs: Inputs, name: str) -> dict:
  """Scores a run's documents; the log has the result under this name."""
  settings, params, data = inputs
  bos = settings.model.bos_id
  result = ttt.evaluate(settings, params, data, data_mesh(), programs=_programs(changed(settings, {"seed": 0})))
  log.info("%s: %.5f bits per byte", name, result.score.bpb)
  return {
    "nats": sum_by_document(data, bos, result.nll_N).tolist(),
    "nats_without_hints": sum_by_document(data, bos, result.model_nll_N).tolist(),
    "bytes": sum_by_document(data, bos, data.token_bytes[1:]).tolist(),
    "targets": result.score.targets,
    "seconds": result.clocks.evaluation,
  }


@functools.lru_cache(maxsize=1)
def _programs(settings: Settings) -> Programs:
  """Programs are the same whatever the seed."""
  return Programs(settings, data_mesh())


class Way(NamedTuple):
  """What came of one way of scoring, means over runs."""

  bits_n: np.ndarray  # of each document
  bits_without_hints: float  # of all
  bytes_n: np.ndarray
  targets_per_second: float

  @classmethod
  def of_rows(cls, rows: Sequence[dict]) -> "Way":
    """Returns the means of what `_score` returned for several runs."""
    nats_n, plain_n, bytes_n = (
      np.mean([row[name] for row in rows], axis=0) for name in ("nats", "nats_without_hints", "bytes")
    )
    seconds = sum(row["seconds"] for row in rows)
    speed = sum(row["targets"] for row in rows) / seconds
    return cls(nats_n / math.log(2), plain_n.sum() / math.log(2), bytes_n, speed)


def table(names: Sequence[str], scored: Sequence[Sequence[dict]], title: str) -> Table:
  """Returns a row for each way of scoring, beside the first.

  Args:
    names: of the ways.
    scored: for each way what every run's scores came to.
  """
  ways = [Way.of_rows(rows) for rows in scored]
  first, rows = ways[0], []
  for name, way in zip(names, ways, strict=True):
    size = way.bytes_n.sum()
    line = [name or "as configured", f"{way.bits_n.sum() / size:.5f}", f"{way.bits_without_hints / size:.5f}"]
    if way is first:
      line += ["", "", ""]
    else:
      value, error, p, _ = ratio(way.bits_n - first.bits_n, way.bytes_n)
      line += [f"{value:+.5f}", "" if error is None else f"{error:.5f}", "" if p is None else f"{p:.1g}"]
    rows.append([*line, f"{way.targets_per_second:,.0f}"])
  return Table(["way", ">BPB", ">without hints", ">ΔBPB", ">±", ">p", ">targets/s"], rows, title)


COMMAND = scoring
