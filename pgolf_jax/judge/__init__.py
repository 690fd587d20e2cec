"""What an organiser runs on a submission folder: it is scored again in processes of its own, and nothing is believed.

tracer.py  runs inside the evaluator's process and reports what that loads
child.py   the evaluator's process: what it gets, and the clock around it
"""

import contextlib
import dataclasses
import datetime
import math
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pgolf_jax.audit import CUTS, replays
from pgolf_jax.audit.evidence import data_checks
from pgolf_jax.audit.recheck import Subject, recheck
from pgolf_jax.audit.verdict import rules, verdict
from pgolf_jax.data.manifest import Manifest
from pgolf_jax.data.shards import ValidationData, load_validation
from pgolf_jax.errors import ArtifactError, Check, UserError, checks_table
from pgolf_jax.judge.child import COUNTED, Children, Packages, Ran, network_isolation
from pgolf_jax.quantize.artifact import load, read_origin
from pgolf_jax.quantize.provenance import require_tokenizer
from pgolf_jax.scoring.record import Scores, read_scores
from pgolf_jax.settings import Settings

REQUIRED = {
  "scores from its counted files": "the folder alone makes the score",
  "artifact and code": "size",
  "code that evaluation loads": "size: whatever runs is counted, or a declared package",
  "network": "nothing comes from outside",
  "clock: evaluation": "time",
  "every target scored exactly once": "C4",
  "one order explains every score": "C1, C3",
  "hints and tilts recomputed": "C1, C2",
  "later tokens change no score": "C1, C3",
  "a score is that of a distribution fixed before": "C2",
  "distributions are full": "C2",
  "sums of the results": "the score",
  "bytes of the score": "the score",
}
"""Check that has to hold → what it proves."""

CANNOT_PROVE = (
  "How the weights were trained: on which text, for how long. A folder holds no training; its logs are claims.",
  "That native code (compiled C, a GPU kernel, a compiler that is started) opens no file: the trace sees what Python's "
  "own functions open, load, change and start.",
  "That code which deceives the trace opens no file: the trace lives in the evaluator's process and withstands other "
  "functions in os and another file for its pipe, but not replaced builtins, private modules that start programs, or a "
  "search among all objects. The counted code is Python; read it.",
  "That code which Python tells nothing of, as of os.mkfifo, leaves this machine as it was: judge as a user, or in a "
  "container, that is thrown away afterwards.",
  "That the packages of requirements.txt are what their names say: install them from where you trust them.",
  "That another machine gives the same score to the last digit, or another accelerator the same seconds.",
  "That the validation shards are the official ones: the data folder is the judge's own, and trusted.",
)


@dataclasses.dataclass(frozen=True)
class Terms:
  """How a submission is judged.

  Attributes:
    submission_bytes: most bytes of artifact and code.
    evaluation_seconds: longest evaluation, from start to end of its process.
    patience_seconds: longest that any other run may take, compiling included.
    cuts: replays with later text replaced from a place on that is drawn; one or two others have fixed places.
    cache: compiled programs to start with.
  """

  submission_bytes: int = rules().submission_bytes
  evaluation_seconds: float = rules().evaluation_seconds
  patience_seconds: float = 6 * rules().evaluation_seconds
  cuts: int = CUTS
  cache: Path | None = None


@dataclasses.dataclass
class Judgement:
  """What a judge found.

  Attributes:
    submission: the folder.
    machine: on which it was judged.
    checks: as far as they were made.
    sizes: counted file → bytes.
    seconds: of the evaluation, by the clock outside; of one with everything still to be compiled; of all runs.
    bpb: bits per byte, added up by the judge.
    packages: that the evaluation imported.
  """

  submission: Path
  machine: str
  checks: list[Check] = dataclasses.field(default_factory=list)
  sizes: dict[str, int] = dataclasses.field(default_factory=dict)
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  bpb: float = math.nan
  packages: list[str] = dataclasses.field(default_factory=list)

  @property
  def broken(self) -> list[str]:
    """Checks that failed."""
    return verdict(self.checks, REQUIRED).broken

  @property
  def unproved(self) -> dict[str, str]:
    """Required check that was not made → why."""
    return verdict(self.checks, REQUIRED).unproved

  @property
  def is_proved(self) -> bool:
    """Whether all that is required is proved and nothing is broken."""
    return not self.broken and not self.unproved


def judge(submission: Path, data_folder: Path, terms: Terms | None = None) -> Judgement:
  """Judges a submission on the validation split of a data folder.

  Raises:
    UserError: there is no such folder, the data are damaged, or are of another tokenizer than the artifact says it has.
  """
  if not submission.is_dir():
    raise UserError(f"{submission}: no such folder; give the folder of a submission.")
  if not (submission / COUNTED[0]).is_file() or not any((submission / name).is_file() for name in COUNTED[1:]):
    raise UserError(f"{submission} is not a submission folder; `pgolf package RUN` makes one.")
  terms, data = terms or Terms(), load_validation(data_folder)
  _require_tokenizer(submission / COUNTED[0], data_folder)
  judgement = Judgement(submission, _machine())
  with tempfile.TemporaryDirectory(prefix="pgolf-") as work:
    has_training = any(data_folder.glob("fineweb_train_*.bin"))
    judgement.checks += data_checks(data_folder, ("sidecar", "text", *(["overlap"] if has_training else [])))
    for check in _checks(judgement, data, terms, Path(work)):
      judgement.checks.append(check)
  return judgement


def _require_tokenizer(artifact: Path, data_folder: Path) -> None:
  """A score on tokens that the model never saw would mean nothing; one that lies about its tokenizer harms itself."""
  manifest = Manifest.read(data_folder)
  with contextlib.suppress(ArtifactError):  # one that cannot be read is judged further on
    if manifest is not None and artifact.is_file():
      known, _ = read_origin(artifact)
      made = f"The text in {data_folder} was made with"
      require_tokenizer(known, str(artifact), manifest.tokenizer_sha256, manifest.vocab_size, made)


def _checks(judgement: Judgement, data: ValidationData, terms: Terms, work: Path) -> Iterator[Check]:
  yield _size(judgement, terms)
  ready = "scores from its counted files"
  try:
    settings, _ = load(judgement.submission / COUNTED[0])
    packages = Packages(judgement.submission / "requirements.txt", work / "packages")
  except UserError as error:
    yield Check(ready, False, str(error))
    return
  children = Children(judgement.submission, work, packages, terms.patience_seconds, terms.cache)
  # A run on random tokens compiles. The programs that it leaves for later runs know nothing of the text but lengths.
  first = children.run(_random_tokens(data, settings))
  judgement.seconds["with compiling"] = first.seconds
  if first.fault is None:
    limit = terms.evaluation_seconds
    children = dataclasses.replace(children, cache=first.folder / "cache", wall_seconds=1.5 * limit)
    run = children.run(data)
    judgement.seconds["evaluation"] = run.seconds
    yield Check("clock: evaluation", run.seconds <= limit, _clock(judgement, limit))
  else:
    run = first
  judgement.packages = run.packages
  yield _loaded(first, run)
  tried = sorted({*first.network, *run.network})
  yield Check("network", not tried, ", ".join(tried) or network_isolation())
  yield Check(ready, run.fault is None, run.fault or f"{', '.join(COUNTED)} and {len(packages.names)} packages")
  if run.fault is None:
    replayed = Replayed(dataclasses.replace(children, wall_seconds=terms.patience_seconds), data)
    yield from _scores(judgement, run, settings, replayed, terms.cuts)


def _scores(judgement: Judgement, run: Ran, settings: Settings, replayed: "Replayed", cuts: int) -> Iterator[Check]:
  try:
    subject = Subject.read(run.folder / "scores", settings, replayed.data)
    checks = list(recheck(subject, run.folder / "scores", run.figures))
  except Exception as error:  # the evaluator may have left anything
    yield Check("every target scored exactly once", False, f"its scores cannot be read: {error}")
    return
  yield from checks
  if checks[0].passed:
    text_bytes = int(subject.data.token_bytes[1:].sum(dtype=np.int64))
    judgement.bpb = float(subject.scores.nll_N.sum(dtype=np.float64)) / math.log(2) / max(text_bytes, 1)
  if any(check.passed is False for check in [*judgement.checks, *checks]):
    return  # replays take long, and the verdict stands
  try:
    yield from replays(subject, replayed, cuts=cuts)
  except Exception as error:  # likewise
    yield Check("later tokens change no score", False, f"its replay cannot be read: {error}")
  odd = [ran for ran in replayed.runs if ran.outside or ran.network]
  if odd:
    yield Check("code that replays load", False, (odd[0].outside + odd[0].network)[0])
  judgement.seconds["replays"] = sum(ran.seconds for ran in replayed.runs)


@dataclasses.dataclass
class Replayed:
  """The submission's own evaluator on streams of the judge, in the place of the audit's evaluator.

  Args:
    children: starts it.
    data: the stream that was scored.
  """

  children: Children
  data: ValidationData
  runs: list[Ran] = dataclasses.field(default_factory=list)

  def evaluate(self, data: ValidationData, batches: int) -> Scores:
    """Returns the scores of a stream, all of them, however few batches are asked for."""
    return read_scores(self._run(data).folder / "scores", len(data.tokens) - 1)

  def sample(self, targets: np.ndarray, batches: int) -> dict[int, np.ndarray]:
    """Returns log-probabilities of all tokens at some of the targets of the stream itself."""
    path = self._run(self.data, targets).folder / "scores" / "distributions.npz"
    try:
      with np.load(path, allow_pickle=False) as arrays:
        where, logp = arrays["targets"], np.asarray(arrays["logp"], np.float32)
      if logp.ndim != 2 or where.shape != logp.shape[:1] or not np.isin(where, targets).all():
        raise ValueError("its shapes do not fit")
    except (OSError, ValueError, KeyError, EOFError) as error:
      raise UserError(f"The evaluator left no distributions that can be read ({error}).") from error
    return dict(zip(where.tolist(), logp, strict=True))

  def _run(self, data: ValidationData, sample: np.ndarray | None = None) -> Ran:
    run = self.children.run(data, sample=sample)
    self.runs.append(run)
    if run.fault is not None:
      raise UserError(f"On other text the evaluator fails: {run.fault}")
    return run


def _machine() -> str:
  try:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    cards = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.split("\n")
  except (OSError, subprocess.TimeoutExpired):
    cards = []
  names = ", ".join(sorted({name for name in cards if name}))
  parts = [f"{len([name for name in cards if name])} × {names}"] if names else []
  return ", ".join(
    [*parts, f"{os.cpu_count()} processors ({platform.machine()})", f"Python {platform.python_version()}"]
  )


def _size(judgement: Judgement, terms: Terms) -> Check:
  name = "artifact and code"
  for file in COUNTED:
    path = judgement.submission / file
    if path.is_symlink() or not path.is_file():
      return Check(name, False, f"{path} is missing or not a plain file")
    judgement.sizes[file] = path.stat().st_size
  total = sum(judgement.sizes.values())
  return Check(name, total <= terms.submission_bytes, f"{total:,} of {terms.submission_bytes:,} bytes")


def _random_tokens(data: ValidationData, settings: Settings) -> ValidationData:
  """Documents of the same lengths and of tokens drawn at random."""
  bos, vocab_size = settings.model.bos_id, settings.model.vocab_size
  is_bos_N1 = data.tokens == bos
  drawn_N1 = np.random.default_rng().choice(np.delete(np.arange(vocab_size), bos), len(data.tokens))
  tokens_N1 = np.where(is_bos_N1, bos, drawn_N1).astype(data.tokens.dtype)
  return ValidationData(tokens_N1, np.where(is_bos_N1, 0, 3).astype(data.token_bytes.dtype))


def _clock(judgement: Judgement, limit: float) -> str:
  compiling = judgement.seconds["with compiling"] - judgement.seconds["evaluation"]
  return (
    f"{judgement.seconds['evaluation']:.1f} s of {limit:g} from start to end of the process; compiling, in a run "
    f"before, took {max(compiling, 0):.1f} s more"
  )


def _loaded(*runs: Ran) -> Check:
  name, outside = "code that evaluation loads", list(dict.fromkeys(what for run in runs for what in run.outside))
  if outside:
    rest = f" and {len(outside) - 3} more" if len(outside) > 3 else ""
    return Check(name, False, f"{'; '.join(outside[:3])}{rest}")
  last = runs[-1]
  if not last.modules:
    return Check(name, None, "not checked: the process told of nothing that it loaded")
  packages = ", ".join(last.packages) or "no package"
  return Check(name, True, f"{last.modules:,} modules, of the standard library, its own, and of {packages}")


_WORDS = {True: "holds", False: "**BROKEN**", None: "not proved"}


def headline(judgement: Judgement) -> str:
  """Returns the verdict in one line."""
  if judgement.is_proved:
    return f"PROVED: {judgement.bpb:.5f} bits per byte; every rule about the score holds."
  if judgement.broken:
    return f"BROKEN: {', '.join(judgement.broken)}."
  return f"NOT PROVED: {', '.join(judgement.unproved)}."


def summary(judgement: Judgement) -> str:
  """Returns the checks, and the verdict below them."""
  return f"{checks_table(judgement.checks)}\n{headline(judgement)}"


def page(judgement: Judgement) -> str:
  """Returns the whole page."""
  now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
  parts = [
    f"# {judgement.submission.resolve().name}\n\n**{_escaped(headline(judgement))}**\n\nJudged {now} on "
    f"{_escaped(judgement.machine)}. The evaluator ran {_escaped(network_isolation())}.",
    "## Score, bytes, time\n\n" + _table(("", ""), _figure_rows(judgement)),
    "## Checks\n\n" + _table(("outcome", "check", "proves", "evidence"), _check_rows(judgement)),
  ]
  if judgement.unproved:
    parts.append("## Not proved\n\n" + _bullets(f"{name}: {why}" for name, why in judgement.unproved.items()))
  parts.append("## What this page cannot prove\n\n" + _bullets(CANNOT_PROVE))
  return "\n\n".join(parts) + "\n"


def _figure_rows(judgement: Judgement) -> list[tuple[str, str]]:
  sizes, seconds = judgement.sizes, judgement.seconds
  rows = [("bits per byte, added up by the judge", f"{judgement.bpb:.5f}")]
  rows += [(f"`{name}`", f"{size:,} bytes") for name, size in sizes.items()]
  rows += [("counted together", f"{sum(sizes.values()):,} bytes")]
  rows += [(f"seconds: {what}", f"{value:.1f}") for what, value in seconds.items()]
  return [*rows, ("packages imported", ", ".join(judgement.packages) or "none")]


def _check_rows(judgement: Judgement) -> list[tuple[str, ...]]:
  return [(_WORDS[c.passed], c.name, REQUIRED.get(c.name, ""), c.finding) for c in judgement.checks]


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
  line = lambda cells: "| " + " | ".join(cells) + " |"  # noqa: E731
  body = [line([cells[0], *map(_escaped, cells[1:])]) for cells in rows]
  return "\n".join([line(head), line(["---"] * len(head)), *body])


def _bullets(lines) -> str:
  return "\n".join(f"- {_escaped(line)}" for line in lines)


def _escaped(text: str) -> str:
  """Text of a submission must not become part of the page's form."""
  for mark in "\\`*_<>|[]#":
    text = text.replace(mark, f"\\{mark}")
  return " ".join(text.split())
