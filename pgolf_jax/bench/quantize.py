"""`pgolf bench quantize`: bits per byte that quantising a trained run costs, against bytes, by method and rate.

All weights are scored on the same targets by the same compiled programs, so that differences are paired by document.
"""

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jax.sharding import Mesh

from pgolf_jax import stages
from pgolf_jax.data.folder import locate_prepared
from pgolf_jax.data.shards import ValidationData, list_shards, load_validation, stream_hash
from pgolf_jax.errors import UserError
from pgolf_jax.model import params as parameters
from pgolf_jax.model.params import Params
from pgolf_jax.quantize import make
from pgolf_jax.quantize.artifact import read
from pgolf_jax.quantize.calibrate import draw_rows
from pgolf_jax.report.statistics import Ratio, interpolated, ratio
from pgolf_jax.run_folder import RunFolder
from pgolf_jax.runtime import distributed
from pgolf_jax.runtime.distributed import run_mesh, world_size
from pgolf_jax.runtime.files import read_sealed, require_room, seal, write_json
from pgolf_jax.runtime.log import log
from pgolf_jax.scoring import plain, ttt
from pgolf_jax.scoring.compiled import Programs
from pgolf_jax.scoring.documents import find_documents, first_documents, sum_by_document
from pgolf_jax.settings import QuantizeConfig, Settings
from pgolf_jax.settings.arguments import Positional
from pgolf_jax.settings.load import changed, differences, written
from pgolf_jax.tables import Table

SAMPLE = 65_536
"""Validation targets whose distributions are compared with the float model's, and which it scores twice."""
TUNING_TOKENS = 32_768
"""Training tokens by whose distributions the clips are tuned."""
TUNING_FACTORS = (1.5, 1.2)
"""By which a clip is tried larger and smaller, in one sweep over all clips each."""


def quantize(
  run: Positional[Path],
  methods: tuple[Literal["gptq", "rate"], ...] = ("gptq", "rate"),
  rates: tuple[float, ...] = (0.7, 1.0, 1.4, 2.0, 2.8),
  factors: tuple[float, ...] = (),
  tune: bool = False,
  targets: int | None = None,
  ttt: bool = False,
  ttt_docs: int | None = None,
  json: Path | None = None,
  again: bool = False,
  quantize: QuantizeConfig = QuantizeConfig(),
) -> None:
  """Measure what quantising the averaged weights of a run costs in bits per byte, and how many bytes that saves.

  Every row is one artifact. ΔBPB is its score less that of the float weights on the same targets, ± the standard error
  over documents, with Student's two-sided p. Bits a weight count the artifact's streams, bytes the whole artifact. KL
  is the divergence from the float model on the first 65,536 targets, in bits per byte. The run's folder is only read.

  Example: pgolf bench quantize runs/demo --rates 1 1.4 2 --json demo.json

  Args:
    run: run folder with finished training.
    methods: values of `quantize.method`.
    rates: factors on every clip of GPTQ: the larger, the coarser the grids and the fewer the bytes. The method rate has
      a row at the bytes of each.
    factors: factors on `quantize.step`, for rows of the method rate at bytes of their own.
    tune: add a row of GPTQ whose embedding bits and clips are tuned on training text, at the bytes of factor 1.
    targets: number of validation targets to score; all if not given.
    ttt: score with test-time training too.
    ttt_docs: number of documents to score with it, from the first; all if not given.
    json: file that keeps all figures; what it has of these weights and targets is not measured again.
    again: measure the rows again that the file has.
  """
  if json is not None:
    require_room(json)
  distributed.start()
  folder = RunFolder(run)
  mesh = run_mesh(folder.settings)
  params = {name: np.asarray(value) for name, value in stages.averaged_params(folder, mesh).items()}
  source = Source(folder.settings, quantize, params, locate_prepared(folder.settings))
  bench = Bench(source, Scorer(folder.settings, load_validation(source.data), mesh, targets, ttt_docs), json)
  bench.measure_float(with_ttt=ttt)
  for method in methods:
    for label, config in bench.wanted(method, rates, factors, tune=tune):
      bench.measure(method, label, config, with_ttt=ttt, again=again)
  print(bench.table(str(run)))


class Source(NamedTuple):
  """What is quantised."""

  settings: Settings  # the run's own
  given: QuantizeConfig  # for all rows; the rates are factors on it
  params: Params
  data: Path  # folder with the training shards

  def config(self, method: str) -> QuantizeConfig:
    """Returns the given config with a method."""
    return dataclasses.replace(self.given, method=method)


class Scorer:
  """Scores weights of one model on the same targets, the first of a stream; programs are compiled once.

  Attributes:
    bytes_n: bytes of text of each document.
    ttt_docs: number of documents, from the first, that are scored with test-time training.

  Raises:
    UserError: there are fewer targets or documents.
  """

  def __init__(
    self, settings: Settings, data: ValidationData, mesh: Mesh, targets: int | None = None, ttt_docs: int | None = None
  ):
    available = len(data.tokens) - 1
    if targets is not None and not 0 < targets <= available:
      raise UserError(f"There are {available:,} validation targets; ask for 1 to {available}, not {targets}.")
    self.settings = changed(settings, {"eval.doc_fraction": 1.0})
    self.mesh, self.data = mesh, ValidationData(*(x[: (targets or available) + 1] for x in data))
    self._first = first_documents(self.data, ttt_docs, settings.model.bos_id)
    self._programs = Programs(self.settings, mesh)
    self.bytes_n = np.array(self._by_document(self.data, self.data.token_bytes[1:]))
    self.ttt_docs = len(find_documents(self._first.tokens, settings.model.bos_id))

  def _by_document(self, data: ValidationData, x_N: np.ndarray) -> list[float]:
    return sum_by_document(data, self.settings.model.bos_id, x_N).tolist()

  def plain(self, params: Params) -> list[float]:
    """Returns the nats of each document, without adaptation."""
    return self._by_document(self.data, plain.losses(self.settings, params, self.data, self.mesh))

  def sample(self, params: Params) -> list[float]:
    """Returns the nats of each document in the first `SAMPLE` targets, scored by themselves."""
    data = ValidationData(*(x[: SAMPLE + 1] for x in self.data))
    return self._by_document(data, plain.losses(self.settings, params, data, self.mesh))

  def ttt(self, params: Params) -> list[float]:
    """Returns the nats of each document, with test-time training."""
    result = ttt.evaluate(self.settings, params, self._first, self.mesh, programs=self._programs)
    return self._by_document(self._first, result.nll_N)

  def divergence(self, params: Params, other: Params) -> float:
    """Returns the mean divergence of other weights' distributions, in bits per byte of the first `SAMPLE` targets."""
    length = min(self.settings.eval.seq_len, len(self.data.tokens) - 1)
    count = min(SAMPLE, len(self.data.tokens) - 1) // length * length
    rows_BxT = self.data.tokens[:count].reshape(-1, length)
    nats = plain.divergence(self.settings, params, other, rows_BxT, self.mesh) * count
    return nats / math.log(2) / int(self.data.token_bytes[1 : count + 1].sum())


class Bench:
  """The figures of a run's quantised weights, in memory and in a file if one is given.

  Attributes:
    maker: what makes a method's artifacts, calibrated at the first call.
    rows: by label, each as JSON has it.

  Raises:
    UserError: the file holds figures of other weights, targets or settings.
  """

  def __init__(self, source: Source, scorer: Scorer, path: Path | None = None):
    self.source, self.scorer, self._path = source, scorer, path
    self.maker = cache(self._maker)
    self._made_with = {
      "weights": parameters.content_hash(source.params),
      "targets": scorer.data.tokens_sha256,
      "bytes of the targets": stream_hash(scorer.data.token_bytes),
      **{name: value for name, value in written(source.settings).items() if name.startswith(_DECIDES)},
    }
    record = read_sealed(path) if path is not None and path.exists() else {"made_with": self._made_with}
    if other := [name for name, value in self._made_with.items() if record["made_with"].get(name, value) != value]:
      raise UserError(f"{path} holds figures of another run or other targets ({other[0]} differs); name another file.")
    self._float: dict[str, Any] = record.get("float", {})
    self.rows: dict[str, dict] = record.get("rows", {})

  def _maker(self, method: str) -> make.Maker:
    settings = dataclasses.replace(self.source.settings, quantize=self.source.config(method))
    return make.Maker(settings, self.source.params, self.source.data, world=world_size(settings, self.scorer.mesh))

  def _save(self) -> None:
    if self._path is not None and distributed.is_leader():
      write_json(self._path, seal({"made_with": self._made_with, "float": self._float, "rows": self.rows}))

  def measure_float(self, *, with_ttt: bool) -> None:
    """Scores the float weights, unless the file has their scores, and some of them once more: A/A has to be exact."""
    if "plain" not in self._float:
      self._float["sample"] = self.scorer.sample(self.source.params)
      self._float["plain"], self._float["plain_seconds"] = _timed(self.scorer.plain, self.source.params)
      self._save()
    if self.scorer.sample(self.source.params) != self._float["sample"]:
      raise UserError(f"{self._path or 'This machine'} scores the float weights otherwise than the first time.")
    if with_ttt and len(self._float.get("ttt", ())) != self.scorer.ttt_docs:
      self._float["ttt"], self._float["ttt_seconds"] = _timed(self.scorer.ttt, self.source.params)
      self._save()

  def wanted(
    self, method: str, rates: Sequence[float], factors: Sequence[float], *, tune: bool
  ) -> Iterator[tuple[str, Callable]]:
    """Yields a label of each row that is asked for, and what makes its config."""
    if method != "gptq":
      for rate in rates:
        yield f"bytes of × {rate:g}", partial(self._at_bytes_of_gptq, method, rate)
    for factor in rates if method == "gptq" else factors:
      yield f"× {factor:g}", partial(make.scaled, self.source.config(method), factor)
    if tune and method == "gptq":
      yield "tuned", self.tuned

  def _at_bytes_of_gptq(self, method: str, rate: float) -> QuantizeConfig:
    if (row := self.rows.get(f"gptq × {rate:g}")) is None:
      row = {"bytes": len(self.maker("gptq").artifact(make.scaled(self.source.config("gptq"), rate)))}
    return self.maker(method).fit(self.source.config(method), row["bytes"])[0]

  def measure(self, method: str, label: str, config: Callable, *, with_ttt: bool, again: bool = False) -> None:
    """Makes and scores an artifact, as far as the file lacks its scores."""
    given = self._departures(dataclasses.replace(self.source.given, method=self.source.settings.quantize.method))
    shown = ", ".join(f"{name.partition('.')[2]}={value}" for name, value in given.items())
    key = " ".join(filter(None, (method, label, shown)))
    row = {} if again else self.rows.get(key, {})
    if row and not (with_ttt and len(row.get("ttt", ())) != self.scorer.ttt_docs):
      return
    made = changed(self.source.settings, row["settings"]).quantize if row else config()
    data, seconds = _timed(self.maker(method).artifact, made)
    sha256 = hashlib.sha256(data).hexdigest()
    if row and row["sha256"] != sha256:
      raise UserError(f"The artifact of {key} is not the one that {self._path} tells of; --again measures it anew.")
    params = (artifact := read(data)).params()
    if not row:
      row |= {
        "method": method,
        "rate": label,
        "given": shown,
        "settings": self._departures(made),
        "bytes": len(data),
        "stream_bytes": sum(size for name, size in artifact.stream_bytes.items() if name != "header"),
        "sha256": sha256,
        "make_seconds": seconds,
        "kl": self.scorer.divergence(self.source.params, params),
      }
      self._score("plain", row, params)
    if with_ttt:
      self._score("ttt", row, params)
    self.rows[key] = row
    self._save()

  def _departures(self, config: QuantizeConfig) -> dict[str, object]:
    settings = self.source.settings
    changed_values = differences(settings, dataclasses.replace(settings, quantize=config))
    return {name: value for name, (_, value) in changed_values.items()}

  def _score(self, kind: str, row: dict, params: Params) -> None:
    """Enters in a row what its weights lose to the float ones: nats of each document."""
    nats_n, row[f"{kind}_seconds"] = _timed(getattr(self.scorer, kind), params)
    row[kind] = np.subtract(nats_n, self._float[kind]).tolist()
    loss = self.loss(row, kind).value
    log.info("%s %s, %d bytes: %+.5f bits per byte (%s)", row["method"], row["rate"], row["bytes"], loss, kind)

  def loss(self, row: dict, kind: str) -> Ratio | None:
    """Returns what a row loses to the float weights, in bits per byte; None where it is not scored."""
    if len(row.get(kind, ())) != len(self._float[kind]):
      return None
    return ratio(np.array(row[kind]) / math.log(2), self.scorer.bytes_n[: len(row[kind])])

  def tuned(self) -> QuantizeConfig:
    """Returns GPTQ's config whose distributions on training text are nearest to the float model's, at the bytes of × 1.

    By coordinate search: the embedding with other bits, and each clip larger and smaller; a factor on all clips keeps
    the bytes. The divergence is the loss that errors add under the model's own labels.
    """
    maker, start = self.maker("gptq"), self.source.config("gptq")
    settings, params = self.source.settings, self.source.params
    length, shards = settings.train.seq_len, list_shards(self.source.data, "train")
    rows_BxT = draw_rows(shards, seq_len=length, count=-(-TUNING_TOKENS // length), seed=settings.seed + 1)
    budget = len(maker.artifact(start))

    def tried(config: QuantizeConfig) -> tuple[float, QuantizeConfig]:
      config, data = maker.fit(config, budget)
      divergence = plain.divergence(settings, params, read(data).params(), rows_BxT, self.scorer.mesh)
      knobs = ", ".join(f"{name} {getattr(config, name):g}" for name in ("embed_bits", *_CLIPS))
      log.info("tuning: %.6f nats a token with %s", divergence, knobs)
      return divergence, config

    best = tried(start)
    for factor in TUNING_FACTORS:
      for moves in ((_other_bits,), *([partial(_scale, clip, by) for by in (factor, 1 / factor)] for clip in _CLIPS)):
        for move in moves:  # in turn, until one is an improvement
          before = best
          while (candidate := tried(move(best[1])))[0] < best[0]:
            best = candidate
          if best is not before:
            break
    return best[1]

  def table(self, title: str) -> str:
    """Returns the figures of all rows, and how the methods compare at equal bytes and at equal loss."""
    weights = sum(value.size for value in self.source.params.values())
    title += f": {weights:,} weights"
    kinds = [kind for kind in ("plain", "ttt") if kind in self._float]
    head = ["method", "rate", "with", ">bits a weight", ">bytes", ">KL"]
    for kind in kinds:
      size = self.scorer.bytes_n[: len(self._float[kind])].sum()
      bpb = sum(self._float[kind]) / math.log(2) / size
      after = f" with test-time training on {len(self._float[kind])} documents" if kind == "ttt" else ""
      title += f"; float weights {bpb:.5f} bits per byte of {int(size):,}{after}"
      head += [f">ΔBPB{' after TTT' if kind == 'ttt' else ''}", ">±", ">p"]
    cells = []
    for row in sorted(self.rows.values(), key=lambda row: (row["method"], row["given"], -row["bytes"])):
      bits = 8 * row["stream_bytes"] / weights
      line = [row["method"], row["rate"], row["given"], f"{bits:.3f}", f"{row['bytes']:,}", f"{row['kl']:.5f}"]
      for kind in kinds:
        value, error, p, _ = self.loss(row, kind) or (None,) * 4
        line += [_cell(value, "+.5f"), _cell(error, ".5f"), _cell(p, ".1g")]
      cells.append(line)
    columns = [column for column in zip(head, *cells, strict=True) if any(column[1:])]
    head, *cells = zip(*columns, strict=True) if columns else [head]
    return "\n".join([str(Table(head, cells, title)), *map(str, self._comparisons(kinds))])

  def _comparisons(self, kinds: list[str]) -> Iterator[Table]:
    """Yields a table of every other method against GPTQ: ratios at equal bytes and, by interpolation, at equal loss."""
    groups: dict[str, list[dict]] = {}
    for row in self.rows.values():
      groups.setdefault(" ".join(filter(None, (row["method"], row["given"]))), []).append(row)
    first = groups.pop("gptq", [])
    for name, rows in groups.items():
      head, cells = ["GPTQ"], [[row["rate"]] for row in first]
      for kind in kinds:
        after = " after TTT" if kind == "ttt" else ""
        head += [f">ΔBPB ÷ GPTQ's at its bytes{after}", f">bytes ÷ GPTQ's at its ΔBPB{after}"]
        points = [(row["bytes"], loss.value) for row in rows if (loss := self.loss(row, kind))]
        for line, row in zip(cells, first, strict=True):
          loss = self.loss(row, kind)
          at_bytes, at_loss = interpolated(points, row["bytes"], loss.value) if loss else (None, None)
          line += [_cell(at_bytes and at_bytes / loss.value, ".3f"), _cell(at_loss and at_loss / row["bytes"], ".3f")]
      if first:
        yield Table(head, cells, f"{name} against gptq; empty where that lies outside its rows")


_DECIDES = ("model.", "eval.", "ttt.", "hints.", "quantize.", "seed", "train.compute_dtype", "train.world_size")
_CLIPS = ("attn_clip_sigmas", "mlp_clip_sigmas", "embed_clip_sigmas")


def _scale(name: str, factor: float, config: QuantizeConfig) -> QuantizeConfig:
  return dataclasses.replace(config, **{name: getattr(config, name) * factor})


def _other_bits(config: QuantizeConfig) -> QuantizeConfig:
  """The embedding with 7 bits or, if it has them, 8, on the same step."""
  bits = 8 if config.embed_bits == 7 else 7
  clip = config.embed_clip_sigmas * (2 ** (bits - 1) - 1) / (2 ** (config.embed_bits - 1) - 1)
  return dataclasses.replace(config, embed_bits=bits, embed_clip_sigmas=clip)


def _cell(x: float | None, form: str) -> str:
  return "" if x is None else format(x, form)


def _timed(function: Callable, *arguments) -> tuple[Any, float]:
  """Returns a result and the seconds that it took."""
  began = time.perf_counter()
  return function(*arguments), time.perf_counter() - began


COMMAND = quantize
