"""The submission folder: its bytes against the budget, what is in it, and whether it scores from itself alone.

artifact.pgolf     the weights
code.tar.xz        every module that evaluation needs, minified, and the C sources
evaluate.py        unpacks the code and scores the artifact
requirements.txt   the packages that the code imports
tokenizer.model    does not count against the budget; one that is embedded in the artifact does
README.md, submission.json, logs/
"""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from pgolf_jax.data.tokenizer import Tokenizer
from pgolf_jax.errors import UserError
from pgolf_jax.quantize.artifact import Artifact, read, writer
from pgolf_jax.quantize.artifact.header import describe, split
from pgolf_jax.quantize.artifact.tensors import Grid, LogGrid
from pgolf_jax.quantize.make import SCALES, scaled
from pgolf_jax.quantize.provenance import require_tokenizer
from pgolf_jax.runtime.files import remove, write_bytes, write_json, write_text
from pgolf_jax.runtime.log import progress
from pgolf_jax.settings.load import from_dict
from pgolf_jax.submission import bundle
from pgolf_jax.tables import Table

_MARKS = ("submission.json", "artifact.pgolf", "evaluate.py")  # a folder with one of them is a submission
_SAME_BPB = 1e-6  # a fresh process on the same machine repeats its sums


@dataclasses.dataclass(frozen=True)
class Account:
  """Bytes of a submission."""

  by_stream: dict[str, int]
  by_tensor: dict[str, float]  # a stream's bytes shared out by values; the header belongs to no tensor
  code: int  # archive and starter
  code_files: int
  tokenizer: int  # does not count
  budget: int

  @property
  def artifact(self) -> int:
    return sum(self.by_stream.values())

  @property
  def total(self) -> int:
    return self.artifact + self.code

  @property
  def over(self) -> int:
    """Bytes above the budget; negative where some are left."""
    return self.total - self.budget


@dataclasses.dataclass(frozen=True)
class Contents:
  """What goes into a folder beside the artifact and its code."""

  name: str  # of the submission
  tokenizer: Path | None = None  # SentencePiece model
  logs: Sequence[Path] = ()
  score: dict | None = None  # what the run reported for this artifact


def count(data: bytes, code: bundle.Code, *, budget: int, tokenizer: int = 0) -> Account:
  """Returns the account of an artifact with the code that ships beside it.

  Args:
    data: the artifact.
    budget: bytes that artifact and code may take.
    tokenizer: bytes of the tokenizer model.
  """
  artifact = read(data)
  return Account(artifact.stream_bytes, tensor_bytes(artifact), code.size, code.files, tokenizer, budget)


def tensor_bytes(artifact: Artifact) -> dict[str, float]:
  """Returns compressed bytes by tensor: each stream's, shared out over its tensors by their number of values."""
  shares = dict.fromkeys(artifact.tensors, 0.0)
  for stream in split([describe(name, tensor) for name, tensor in artifact.tensors.items()]):
    values = sum(math.prod(shape) for *_, shape in stream.arrays)
    for name, _, shape in stream.arrays:
      shares[name] += artifact.stream_bytes[stream.name] * math.prod(shape) / values
  return shares


def table(account: Account) -> Table:
  """Returns the account in bytes, the largest stream first."""
  names = {"tokenizer": "tokenizer, in the artifact"}
  by_size = sorted(account.by_stream.items(), key=lambda item: -item[1])
  rows = [(names.get(name, name), f"{size:,}") for name, size in by_size]
  rows += [("artifact", f"{account.artifact:,}"), (f"code ({account.code_files} files)", f"{account.code:,}")]
  rows += [("total", f"{account.total:,}"), ("budget", f"{account.budget:,}"), ("left", f"{-account.over:,}")]
  if account.tokenizer:
    rows.append(("tokenizer's file, not counted", f"{account.tokenizer:,}"))
  return Table(("", ">bytes"), rows)


def build(
  folder: Path, data: bytes, contents: Contents, *, verify: Callable[[Path], None] = lambda built: None
) -> Account:
  """Writes the submission folder and returns its account.

  It is built beside its place, which it takes once it is whole; a submission that is there already stays until then.

  Args:
    folder: must be empty, hold a submission, or not exist.
    data: the artifact.
    verify: called with the folder that was built; what it raises leaves everything as it was.

  Raises:
    UserError: it is over the budget, or the folder holds something else.
  """
  beside, before = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "before"))
  if folder.exists() and not folder.is_dir():
    raise UserError(f"{folder} is a file; choose another folder with --out, or remove it.")
  if folder.exists() and any(folder.iterdir()) and not any((folder / name).exists() for name in _MARKS):
    raise UserError(f"{folder} is not empty; choose another folder with --out, or remove it.")
  remove(beside)
  try:
    account = _fill(beside, data, contents)
    verify(beside)
  except BaseException:
    remove(beside)
    raise
  remove(before)
  if folder.exists():
    folder.rename(before)
  beside.rename(folder)
  remove(before)
  return account


def _fill(folder: Path, data: bytes, contents: Contents) -> Account:
  whole = read(data)
  if contents.tokenizer:
    model = Tokenizer.load(contents.tokenizer)
    require_tokenizer(whole.origin, "the artifact", model.sha256, model.vocab_size, f"{contents.tokenizer} is")
  config, code = whole.config, bundle.code()
  settings = from_dict(config, where="the artifact's config")
  tokenizer = contents.tokenizer.stat().st_size if contents.tokenizer else 0
  account = count(data, code, budget=settings.quantize.budget_bytes, tokenizer=tokenizer)
  require_fit(account, data)
  (folder / "logs").mkdir(parents=True, exist_ok=True)
  write_bytes(folder / "artifact.pgolf", data)
  write_bytes(folder / "code.tar.xz", code.archive)
  write_bytes(folder / "evaluate.py", code.starter)
  write_text(folder / "requirements.txt", "".join(f"{line}\n" for line in code.requirements))
  if contents.tokenizer:
    shutil.copyfile(contents.tokenizer, folder / "tokenizer.model")
  for log in contents.logs:
    shutil.copyfile(log, folder / "logs" / log.name)
  summary = {
    "name": contents.name,
    "bytes_total": account.total,
    "bytes_artifact": account.artifact,
    "bytes_code": account.code,
    "bytes_tokenizer": account.tokenizer,
    "bytes_by_stream": account.by_stream,
    "bytes_by_tensor": {tensor: round(size, 1) for tensor, size in account.by_tensor.items()},
    "score": contents.score,
    "config": config,
  }
  write_json(folder / "submission.json", summary)
  write_text(folder / "README.md", _readme(account, contents))
  return account


def require_fit(account: Account, data: bytes) -> None:
  """Raises UserError if the submission is over the budget: by how much, and what would fit."""
  if account.over <= 0:
    return
  ways = []
  artifact = read(data)
  if artifact.codec != "entropy":
    again = writer.write(artifact.config, artifact.tensors, "entropy", artifact.origin, artifact.tokenizer)
    saved = len(data) - len(again)
    ways.append(f"quantize.codec='entropy' saves {saved:,} bytes" + ("" if saved >= account.over else ", too few"))
  ways.append(_coarser(account.over, artifact))
  raise UserError(
    f"The submission takes {account.total:,} bytes, {account.over:,} over the budget of {account.budget:,}: "
    f"{'; '.join(ways)}."
  )


def _coarser(over: int, artifact: Artifact) -> str:
  """How much coarser grids would save so many bytes."""
  config = from_dict(artifact.config, where="the artifact's config").quantize
  scale = SCALES[config.method]
  # Each doubling of the grids' steps saves one bit a value.
  values = sum(tensor.q_MxN.size for tensor in artifact.tensors.values() if isinstance(tensor, Grid | LogGrid))
  if 8 * over > values * math.log2(scale.most):
    return f"train a smaller model, for even grids {scale.most:g} times as coarse would not fit"
  multiplier = 2 ** (8 * over / values)
  coarser, what = scaled(config, multiplier), "clips" if len(scale.names) > 1 else "a step"
  named = ", ".join(f"quantize.{name}={getattr(coarser, name):.4g}" for name in scale.names)
  return (
    f"{what} {multiplier:.3f} times as wide would fit ({named}); `pgolf quantize RUN --fit` finds the finest that does"
  )


def verify(
  folder: Path, data: Path, *, expected_bpb: float | None, ttt: bool = False, python: str = sys.executable
) -> dict:
  """Scores the folder in a fresh process, from a copy of the folder alone, and returns what it reported.

  Args:
    data: folder of the validation shards and their byte sidecar.
    expected_bpb: what the run reported; None accepts any score.
    ttt: score with test-time training and hints.
    python: the interpreter.

  Raises:
    UserError: it does not run, or its bits per byte are not those that the run reported.
  """
  with tempfile.TemporaryDirectory() as place:
    copy = Path(place) / "submission"
    shutil.copytree(folder, copy)
    environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    command = [python, "-I", str(copy / "evaluate.py"), "--data", str(data.resolve()), *(["--ttt"] if ttt else [])]
    with progress("scoring the folder in a process of its own"):
      done = subprocess.run(command, cwd=place, env=environ, capture_output=True, text=True, check=False)
  if done.returncode:
    said = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines() or ["nothing"]
    raise UserError(f"The submission does not score from its own folder; it said: {said[-1].strip()}")
  score = json.loads(done.stdout.strip().splitlines()[-1])
  if expected_bpb is not None and abs(score["bpb"] - expected_bpb) > _SAME_BPB:
    raise UserError(
      f"The submission scores {score['bpb']:.6f} bits per byte from its own folder, but the run reported "
      f"{expected_bpb:.6f}; score the run's artifact anew on this machine."
    )
  return score


def _readme(account: Account, contents: Contents) -> str:
  reached = f"{contents.score['bpb']:.5f} bits per byte" if contents.score else "see submission.json"
  return f"""# {contents.name}

{reached}, {account.total:,} of {account.budget:,} bytes ({account.artifact:,} weights, {account.code:,} code; tokenizer
{account.tokenizer:,}, apart).

    pip install -r requirements.txt
    python -I evaluate.py --data FOLDER          # plain
    python -I evaluate.py --data FOLDER --ttt    # with test-time training and hints

FOLDER holds `fineweb_val_*.bin` and `fineweb_val_bytes_*.bin`. Needed are Python 3.11 or newer, the packages in
requirements.txt, and a C compiler for the hints. For an accelerator, install JAX with its extra, such as `jax[cuda13]`.

```
{table(account)}
```
"""
