"""The public functions of the package: prepare text, train, load a model, score text, generate, evaluate.

Nothing here prints: log lines go to the logger `pgolf`, whose warnings Python shows, and to a run's run.log.
"""

import contextlib
import dataclasses
import functools
import math
import operator
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pgolf_jax import stages as run_stages
from pgolf_jax.data.encode import encode_texts
from pgolf_jax.data.folder import Sources, locate, locate_prepared, option, prepare_files
from pgolf_jax.data.manifest import MANIFEST, TOKENIZER, Manifest, sha256_of, tokenizer_file
from pgolf_jax.data.shards import ValidationData, load_validation
from pgolf_jax.data.tokenizer import Tokenizer
from pgolf_jax.errors import UserError
from pgolf_jax.model import generate as generation
from pgolf_jax.model.params import Params
from pgolf_jax.quantize import artifact as artifacts
from pgolf_jax.quantize.artifact import Origin
from pgolf_jax.quantize.artifact.header import UNKNOWN
from pgolf_jax.quantize.provenance import NoTokenizer, find_tokenizer, origin_of, require_data
from pgolf_jax.run_folder import RunFolder
from pgolf_jax.runtime import distributed, jax_setup
from pgolf_jax.runtime.distributed import data_mesh, run_mesh
from pgolf_jax.runtime.log import quietly
from pgolf_jax.scoring import plain
from pgolf_jax.scoring import ttt as adaptation
from pgolf_jax.scoring.compiled import Programs
from pgolf_jax.scoring.documents import find_documents, first_documents
from pgolf_jax.settings import Settings
from pgolf_jax.settings.builtin import settings

Weights = Literal["artifact", "averaged"]


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
  """Prints nothing in the block, and hides from it a mesh that the caller has set; our programs bring their own.

  Raises:
    UserError: JAX is told to compute otherwise, see `check_options`.
  """
  jax_setup.check_options()
  with quietly(), jax.set_mesh(None):
    yield


def prepare(out: str | Path, train: str | Path | None = None, **options: Any) -> Manifest:
  """Turns documents into shards, byte sidecar, tokenizer and manifest, as `pgolf data prepare` does.

  A preparation that was cut off continues. The same text and options give the same files.

  Args:
    out: folder to make; `settings(data__path=out)` trains on it.
    train: documents, a .jsonl or .jsonl.zst file or a folder of .txt files; the built-in speeches if not given.
    **options: `val`, `val_docs`, `val_every`, `tokenizer`, `vocab_size`, `caseops`, `caseops_markers`, `shard_tokens`,
      `max_document` and `workers`, see `pgolf data prepare --help`.

  Returns:
    What the folder holds.

  Raises:
    UserError: the text is faulty, an option is unknown or missing, or the folder holds something else.
  """
  known = [field.name for field in dataclasses.fields(Sources)]
  if unknown := [name for name in options if name not in known]:
    raise UserError(f"prepare has no option {unknown[0]}; its options are {', '.join(known[1:])}.")
  options = {name: option(name, value) for name, value in options.items()}
  with quietly():
    return prepare_files(Path(out), Sources(**options | {"train": None if train is None else Path(train)}))


def train(
  config: str | Path | Mapping[str, object] | Settings,
  out: str | Path,
  stages: Sequence[str] = ("train", "plain", "artifact"),
) -> dict[str, dict]:
  """Trains a model in a run folder, and does what else is asked for; stages that are complete are skipped.

  Args:
    config: settings, or what `settings` makes them of.
    out: run folder; a run that was cut off there continues. `load(out)` gives its model.
    stages: of "train", "plain" (score of the averaged weights), "artifact" (quantised, and its score), "ttt" (score
      with test-time training) and "audit".

  Returns:
    Stage → its figures, as results.json has them, of all stages that are complete in the folder.

  Raises:
    UserError: an unknown stage, settings that cannot work, or the folder holds a run of other settings.
  """
  stages = [stages] if isinstance(stages, str) else stages
  if wrong := [name for name in stages if name not in run_stages.STAGES]:
    raise UserError(f"There is no stage {wrong[0]}; choose among {', '.join(run_stages.STAGES)}.")
  with _undisturbed():
    run_stages.run(settings(config), Path(out), [name for name in run_stages.STAGES if name in stages])
    return RunFolder(out).results()


class Subject(NamedTuple):
  """Weights to be scored, and what is known of them."""

  name: str  # for messages
  settings: Settings
  params: Params
  origin: Origin
  run: RunFolder | None  # None: a bare artifact

  @classmethod
  def read(cls, path: Path, weights: Weights = "artifact") -> "Subject":
    """Reads a run's weights, or an artifact's; the path is of a file or of the folder that it lies in.

    Raises:
      UserError: there is nothing to read there, or it is damaged.
    """
    if weights not in typing.get_args(Weights):
      raise UserError(f"There are no {weights!r} weights; choose among {', '.join(typing.get_args(Weights))}.")
    folder = path if path.is_dir() else path.parent
    run = RunFolder(folder) if (folder / "config.toml").is_file() else None
    if weights == "averaged":
      if run is None or not path.is_dir():
        raise UserError(f"{path} holds quantised weights alone; give the run folder for the averaged ones.")
      data = locate(run.settings)
      origin = origin_of(run.settings, data) if data.is_dir() else UNKNOWN
      return cls(str(path), run.settings, run_stages.averaged_params(run, data_mesh()), origin, run)
    file = path / "artifact.pgolf" if path.is_dir() else path
    settings, params = artifacts.load(file)
    if run is not None and path.is_dir():
      settings = run.settings
    return cls(str(file), settings, params, artifacts.read_origin(file)[0], run)

  def data_folder(self, given: Path | None) -> Path:
    """Returns the folder of data to score on: the given one, or the run's.

    Raises:
      UserError: a bare artifact without a given one, or there is no such folder.
    """
    if given is not None:
      return given
    if self.run is None:
      made, speeches = f"; it was made with {self.origin.data}" if self.origin.data else "", locate(self.settings)
      if self.origin.manifest and (speeches / MANIFEST).is_file():
        made += f", which lies in {speeches}" if sha256_of(speeches / MANIFEST) == self.origin.manifest else ""
      raise UserError(
        f"{self.name} is an artifact without its run: say which prepared text it is to be scored on, as in --data "
        f"data/web{made}."
      )
    return locate_prepared(self.run.settings)

  def validation(self, folder: Path, *, documents: int | None = None, any_text: bool = False) -> ValidationData:
    """Returns the validation stream of a data folder, or its first documents, once it is known to fit.

    Raises:
      UserError: the data are not those that the weights were made with, see `require_data`; or there are fewer.
    """
    data = load_validation(folder)
    require_data(self.origin, self.name, folder, data, self.settings, any_text=any_text)
    return first_documents(data, documents, self.settings.model.bos_id)


def evaluate(
  target: str | Path,
  data: str | Path | None = None,
  *,
  ttt: bool = True,
  documents: int | None = None,
  any_text: bool = False,
  weights: Weights = "artifact",
) -> dict[str, Any]:
  """Scores a run or an artifact on the validation documents of a data folder, as `pgolf eval` does.

  Args:
    target: run folder, or an artifact's file.
    data: data folder; the run's if not given.
    ttt: with test-time training and hints, or plainly.
    documents: scores only the first so many.
    any_text: lets a text through that the artifact was not made with, if its tokenizer is the same.
    weights: of a run: those of its artifact, or the averaged ones before quantising.

  Returns:
    Name → figure, such as "bpb", "loss", "targets", "bytes".

  Raises:
    UserError: the data are not the artifact's, or something is missing or damaged.
  """
  distributed.start()
  with _undisturbed():
    subject = Subject.read(Path(target), weights)
    mesh = run_mesh(subject.settings)
    stream = subject.validation(
      subject.data_folder(None if data is None else Path(data)), documents=documents, any_text=any_text
    )
    if ttt:
      return adaptation.evaluate(subject.settings, subject.params, stream, mesh).figures(subject.settings)
    return run_stages.plain_score(subject.settings, subject.params, mesh, "scoring", stream)


@dataclasses.dataclass(frozen=True)
class DocumentScore:
  """The score of one document.

  Attributes:
    nats: sum over its tokens.
    bytes: of its text in UTF-8, as its tokens stand for them.
    tokens: ids [N] of its tokens; a bos of the next document, which the model has to predict too, is the last one.
    token_nats: of each token [N].
    token_bytes: bytes of the text that each token stands for [N].
  """

  nats: float
  bytes: int
  tokens: np.ndarray = dataclasses.field(repr=False, compare=False)
  token_nats: np.ndarray = dataclasses.field(repr=False, compare=False)
  token_bytes: np.ndarray = dataclasses.field(repr=False, compare=False)

  @property
  def bpb(self) -> float:
    """Bits per byte."""
    return self.nats / math.log(2) / self.bytes


@dataclasses.dataclass(frozen=True)
class Score:
  """The score of one text or several; see `DocumentScore` for each.

  Attributes:
    nats: sum over all tokens.
    bytes: of all texts in UTF-8.
    tokens: number of tokens scored.
    documents: one score for each text, in the order given.
  """

  nats: float
  bytes: int
  tokens: int
  documents: tuple[DocumentScore, ...] = dataclasses.field(repr=False)

  @property
  def bpb(self) -> float:
    """Bits per byte of the texts."""
    return self.nats / math.log(2) / self.bytes

  @property
  def loss(self) -> float:
    """Nats per token."""
    return self.nats / self.tokens


class Model:
  """A model with its tokenizer: scores text and continues it. `load` makes it.

  Attributes:
    config: the settings that it was made with.
    params: float32 weights by the recipe's names.
  """

  def __init__(self, subject: Subject, tokenizer: Tokenizer | None, why_none: str = ""):
    self.config = dataclasses.replace(
      subject.settings, eval=dataclasses.replace(subject.settings.eval, doc_fraction=1.0)
    )
    self.params = dict(subject.params)
    self._name, self._tokenizer, self._why_none = subject.name, tokenizer, why_none

  def __getstate__(self) -> dict[str, Any]:
    """What a copy needs: all but what lies on devices or was compiled for them, which is made again."""
    return {name: value for name, value in vars(self).items() if name not in ("_mesh", "_placed", "_programs")}

  def __repr__(self) -> str:
    model = self.config.model
    shape = f"{model.num_layers} layers of width {model.model_dim}, {model.vocab_size:,} tokens"
    return f"Model({self._name!r}: {sum(value.size for value in self.params.values()):,} parameters, {shape})"

  @property
  def tokenizer(self) -> Tokenizer:
    """The model's tokenizer.

    Raises:
      UserError: it was neither given nor found.
    """
    if self._tokenizer is None:
      raise UserError(self._why_none)
    return self._tokenizer

  def score(self, text: str | Iterable[str], ttt: bool = False) -> Score:
    """Returns how well the model predicts a text, or several, one document each, in the order given.

    The figures are those of `pgolf eval` on data of these documents. What the model sees first, the rewriting of
    capitals and the bytes of the text are taken care of.

    Args:
      text: one text or several; none may be empty.
      ttt: lets the model learn from what it has scored, chunk by chunk and text by text, with n-gram hints; the order
        of scoring is the settings'.

    Raises:
      UserError: a text is empty, or no text is given.
    """
    texts = [text] if isinstance(text, str) else list(text)
    data = encode_texts(texts, self.tokenizer, self.config.data.markers)
    with _undisturbed():
      if ttt:
        nll_N = adaptation.evaluate(self.config, self._placed, data, self._mesh, programs=self._programs).nll_N
      else:
        nll_N = plain.losses(self.config, self._placed, data, self._mesh)
    documents = []
    for document in find_documents(data.tokens, self.config.model.bos_id):
      here = document.target_slice
      after = slice(here.start + 1, here.stop + 1)
      nats = float(nll_N[here].sum(dtype=np.float64))
      text_bytes = int(data.token_bytes[after].sum(dtype=np.int64))
      documents.append(DocumentScore(nats, text_bytes, data.tokens[after], nll_N[here], data.token_bytes[after]))
    nats = math.fsum(document.nats for document in documents)
    return Score(nats, sum(document.bytes for document in documents), len(nll_N), tuple(documents))

  def generate(
    self, prompt: str = "", tokens: int = 200, temperature: float = 0.8, top_p: float = 0.95, seed: int = 0
  ) -> Iterator[str]:
    """Yields the continuation of a prompt in pieces of text, each as soon as later tokens cannot change it.

    Args:
      prompt: text to continue.
      tokens: makes at most so many.
      temperature: 0 takes the likeliest token each time; 1 samples as the model says.
      top_p: samples from the fewest tokens that together have this probability.
      seed: the same seed gives the same text.

    Raises:
      UserError: a number out of range, or a prompt that is no Unicode, at once.
      TypeError: `tokens` or `seed` is no whole number.
    """
    sampling = generation.Sampling(operator.index(tokens), temperature, top_p, operator.index(seed))
    try:
      prompt.encode()
    except (UnicodeEncodeError, AttributeError) as error:
      raise UserError(f"The prompt is no text ({error}); give a string of whole Unicode characters.") from error
    with _undisturbed():
      pieces = generation.generate(self.config, self._placed, self.tokenizer, prompt, sampling)
    return _each_undisturbed(pieces)

  @functools.cached_property
  def _mesh(self):
    return run_mesh(self.config)

  @functools.cached_property
  def _placed(self) -> Params:
    """The weights on the devices."""
    return jax.device_put({name: jnp.asarray(value) for name, value in self.params.items()})

  @functools.cached_property
  def _programs(self) -> Programs:
    """What test-time training compiles, kept from one call to the next."""
    return Programs(self.config, self._mesh)


def _each_undisturbed(pieces: Iterator[str]) -> Iterator[str]:
  while True:
    with _undisturbed():
      piece = next(pieces, None)
    if piece is None:
      return
    yield piece


def load(path: str | Path, tokenizer: str | Path | None = None, weights: Weights = "artifact") -> Model:
  """Returns the model of a run, of an artifact or of a submission, with its tokenizer.

  Example: load("runs/demo").score("My fellow citizens").bpb

  Args:
    path: folder of a run or of a submission, or an artifact's file.
    tokenizer: SentencePiece model; the one in the artifact, beside it, or of the run if not given. Where none is found,
      scoring and generating say so.
    weights: of a run: those of its artifact, or the averaged ones before quantising.

  Raises:
    UserError: there is no such file, it is damaged, or the tokenizer is not the model's.
  """
  distributed.start()
  with _undisturbed():
    subject = Subject.read(Path(path), weights)
    file = None if weights == "averaged" else Path(subject.name)
    beside = Path(path if Path(path).is_dir() else Path(path).parent) / TOKENIZER
    if not beside.is_file() and subject.run is not None:
      beside = tokenizer_file(subject.settings, locate(subject.run.settings))
    try:
      return Model(subject, find_tokenizer(subject.name, file, None if tokenizer is None else Path(tokenizer), beside))
    except NoTokenizer as error:
      return Model(subject, None, str(error))
