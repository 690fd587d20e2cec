"""Which tokenizer and which data an artifact belongs to: written when it is made, and held against what it meets later.

A model knows its own tokenizer's tokens alone, so another tokenizer is always refused. Another text of the same
tokenizer can be scored, where that is asked for.
"""

import importlib.metadata
from pathlib import Path

from pgolf_jax import __version__
from pgolf_jax.data import caseops
from pgolf_jax.data.manifest import MANIFEST, TOKENIZER, Manifest, sha256_of, tokenizer_file
from pgolf_jax.data.shards import ValidationData, load_validation
from pgolf_jax.data.tokenizer import Tokenizer
from pgolf_jax.errors import UserError
from pgolf_jax.quantize.artifact import Origin, read_origin
from pgolf_jax.quantize.artifact.codecs import zstd
from pgolf_jax.quantize.artifact.header import UNKNOWN
from pgolf_jax.runtime.log import log
from pgolf_jax.settings import Settings

SMALL_TOKENIZER = 1 << 14
"""Compressed bytes up to which a tokenizer is embedded unasked: a thousandth of the budget. One of 1,024 pieces has a
third of it, the published one of 8,192 nine times as many."""


def origin_of(settings: Settings, folder: Path) -> Origin:
  """Returns what tells of the tokenizer and the data of a data folder, with the versions that run here.

  Raises:
    UserError: a file of the folder is damaged, or the tokenizer is not the one that it was prepared with.
  """
  manifest, path = Manifest.read(folder), tokenizer_file(settings, folder)
  made_with = manifest.tokenizer_sha256 if manifest else ""
  tokenizer = sha256_of(path) if path.is_file() else made_with
  if made_with and tokenizer != made_with:
    raise UserError(
      f"{path} (sha256 {tokenizer[:8]}) is not the tokenizer that {folder} was prepared with ({made_with[:8]}); give "
      "that one as data.tokenizer, or prepare the text again."
    )
  return Origin(
    pgolf_jax=__version__,
    jax=importlib.metadata.version("jax"),
    pieces=settings.model.vocab_size,
    tokenizer=tokenizer,
    data=_printable(manifest.validation if manifest else folder.resolve().name),
    manifest=sha256_of(folder / MANIFEST) if manifest else "",
    validation=load_validation(folder).tokens_sha256 if any(folder.glob("fineweb_val_*.bin")) else "",
  )


def _printable(name: str) -> str:
  return "".join(c for c in name if c.isprintable())[:200]


def tokenizer_to_embed(settings: Settings, folder: Path) -> bytes | None:
  """Returns the tokenizer's model if it is to travel in the artifact, as `quantize.embed_tokenizer` says.

  Raises:
    UserError: it is wanted and not there, or is not a SentencePiece model.
  """
  path, wanted = tokenizer_file(settings, folder), settings.quantize.embed_tokenizer
  if wanted == "never" or (wanted == "small" and not path.is_file()):
    return None
  model = Tokenizer.load(path, settings.model.vocab_size).model
  return model if wanted == "always" or len(zstd.compress(model)) <= SMALL_TOKENIZER else None


def require_tokenizer(origin: Origin, artifact: str, sha256: str, pieces: int, where: str) -> None:
  """Raises UserError unless a tokenizer is the artifact's, as far as the artifact knows its own.

  Args:
    artifact: its name, for the message.
    sha256: of the tokenizer; empty if it is not known.
    pieces: of the tokenizer.
    where: beginning of the message: what has the tokenizer, and a verb.
  """
  has_other_size = origin.pieces > 0 and pieces != origin.pieces
  if has_other_size or ("" not in (sha256, origin.tokenizer) and sha256 != origin.tokenizer):
    raise UserError(
      f"{where} a tokenizer of {_pieces(pieces, sha256)}, but {artifact} was made with one of "
      f"{_pieces(origin.pieces, origin.tokenizer)}; a model knows its own tokens alone, so give that one."
    )


def _pieces(count: int, sha256: str) -> str:
  return f"{count:,} pieces" + (f" (sha256 {sha256[:8]})" if sha256 else "")


def require_data(
  origin: Origin, artifact: str, folder: Path, data: ValidationData, settings: Settings, *, any_text: bool = False
) -> None:
  """Raises UserError unless a data folder's validation split may be scored with an artifact.

  Args:
    origin: of the artifact; where it is not known, sizes alone are compared.
    artifact: its name, for messages.
    data: what lies in the folder.
    settings: the artifact's.
    any_text: lets any text through that was tokenized with the artifact's tokenizer.
  """
  manifest, size = Manifest.read(folder), settings.model.vocab_size
  own = folder / TOKENIZER
  sha256 = manifest.tokenizer_sha256 if manifest else sha256_of(own) if own.is_file() else ""
  pieces = manifest.vocab_size if manifest else size
  known = origin if origin.pieces else Origin(pieces=size)
  require_tokenizer(known, artifact, sha256, pieces, f"The text in {folder} was made with")
  if (highest := int(data.tokens.max())) >= size:
    raise UserError(f"{folder} holds token {highest}, but the model of {artifact} has {size:,}; give its own data.")
  if manifest and manifest.markers != settings.data.markers:
    text, wanted = caseops.IN_WORDS[manifest.markers], caseops.IN_WORDS[settings.data.markers]
    raise UserError(f"The text in {folder} is {text}, that of {artifact} was {wanted}; give its own data.")
  if not origin.validation:
    log.warning("%s does not say which data it was made with; %s is scored as it is.", artifact, folder)
  elif data.tokens_sha256 != origin.validation and not any_text:
    name = _printable(manifest.validation if manifest else folder.resolve().name)
    raise UserError(
      f"{folder} holds {name} (tokens {data.tokens_sha256[:8]}), but {artifact} was made with {origin.data} (tokens "
      f"{origin.validation[:8]}); give that, or say --any-text to score another text of the same tokenizer."
    )


class NoTokenizer(UserError):
  """A tokenizer was looked for and not found."""


def find_tokenizer(name: str, artifact: Path | None, given: Path | None, beside: Path) -> Tokenizer:
  """Returns the tokenizer of a model: the given one, else the embedded one, else the one beside it.

  Args:
    name: of the model, for messages.
    artifact: its file; None for weights of a run that are not quantised.
    given: a .model file.
    beside: where a run or a submission keeps its tokenizer; it need not be there.

  Raises:
    NoTokenizer: there is none.
    UserError: it is not the artifact's.
  """
  origin, embedded = (UNKNOWN, None) if artifact is None else read_origin(artifact)
  if given is None and embedded is not None:
    return Tokenizer(embedded, name=f"the tokenizer in {name}")
  path = given or beside
  if given is None and not beside.is_file():
    named = f" of {_pieces(origin.pieces, origin.tokenizer)}" if origin.tokenizer else ""
    raise NoTokenizer(f"There is no tokenizer in {name} or beside it; give its own{named} with --tokenizer.")
  tokenizer = Tokenizer.load(path)
  require_tokenizer(origin, name, tokenizer.sha256, tokenizer.vocab_size, f"{path} is")
  return tokenizer
