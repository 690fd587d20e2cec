"""The submission folder: what is in it, whether it fits, and whether it scores from itself alone.

format.pgolf    the weights
code.tar.xz       every module that evaluation needs, minified, and the C sources
evaluate.py       unpacks the code and scores the artifact
tokenizer.model   apart from the budget
README.md, submission.json, logs/
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pgolf_jax.errors import UserError
from pgolf_jax.quantize.artifact import format
from pgolf_jax.settings.load import from_dict
from pgolf_jax.submission import accounting, starter
from pgolf_jax.submission.accounting import Account

_SAME_BPB = 1e-6  # a fresh process on the same machine repeats its sums


@dataclasses.dataclass(frozen=True)
class Code:
  """What ships beside the artifact so that it can be scored."""

  starter: bytes
  archive: bytes
  files: int

  @property
  def size(self) -> int:
    return len(self.starter) + len(self.archive)


def code() -> Code:
  """The evaluator's code as it ships."""
  script = accounting.minified(Path(starter.__file__).read_text(encoding="utf-8"), "evaluate.py")
  archive, files = accounting.archive(accounting.needed_modules())
  return Code(script.encode(), archive, files)


def require_fit(found: Account, data: bytes) -> None:
  """Raises UserError if the submission is over the budget: by how much, and what would fit."""
  if found.over <= 0:
    return
  ways = []
  loaded = format.read(data)
  if loaded.codec != "entropy":
    saved = len(data) - len(format.write(loaded.config, loaded.tensors, "entropy"))
    ways.append(f"quantize.codec='entropy' saves {saved:,} bytes" + ("" if saved >= found.over else ", too few"))
  # Each doubling of the grids' steps saves one bit a value.
  values = sum(tensor.q_MxN.size for tensor in loaded.tensors.values() if hasattr(tensor, "q_MxN"))
  multiplier = 2 ** (8 * found.over / max(values, 1))
  config = from_dict(loaded.config, where="the artifact's config").quantize
  names = ("attn_clip_sigmas", "mlp_clip_sigmas", "embed_clip_sigmas")
  clips = ", ".join(f"quantize.{name}={getattr(config, name) * multiplier:.2f}" for name in names)
  ways.append(f"clips {multiplier:.3f} times as wide would fit ({clips})")
  raise UserError(
    f"The submission takes {found.total:,} bytes, {found.over:,} over the budget of {found.budget:,}: "
    f"{'; '.join(ways)}; `pgolf quantize RUN --fit` finds the finest clips that do."
  )


def build(
  folder: Path, data: bytes, *, tokenizer: Path | None, logs: list[Path], score: dict | None, name: str
) -> Account:
  """Writes the submission folder and returns its account.

  Args:
    folder: where; must not exist or be empty.
    data: the artifact.
    tokenizer: SentencePiece model to put beside it.
    logs: files to copy into logs/.
    score: what the run reported for this artifact, for submission.json.
    name: of the submission.

  Raises:
    UserError: it is over the budget, or the folder holds something.
  """
  if folder.exists() and any(folder.iterdir()):
    raise UserError(f"{folder} is not empty; choose another folder with --out, or remove it.")
  loaded, shipped = format.read(data), code()
  settings = from_dict(loaded.config, where="the artifact's config")
  found = accounting.account(
    data,
    starter=shipped.starter,
    archive=shipped.archive,
    files=shipped.files,
    tokenizer=tokenizer.stat().st_size if tokenizer else 0,
    budget=settings.quantize.budget_bytes,
  )
  require_fit(found, data)
  (folder / "logs").mkdir(parents=True, exist_ok=True)
  (folder / "format.pgolf").write_bytes(data)
  (folder / "code.tar.xz").write_bytes(shipped.archive)
  (folder / "evaluate.py").write_bytes(shipped.starter)
  if tokenizer:
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
  for log in logs:
    shutil.copyfile(log, folder / "logs" / log.name)
  summary = {
    "name": name,
    "bytes_total": found.total,
    "bytes_artifact": found.artifact,
    "bytes_code": found.code,
    "bytes_tokenizer": found.tokenizer,
    "bytes_by_stream": found.by_stream,
    "bytes_by_tensor": {tensor: round(size, 1) for tensor, size in found.by_tensor.items()},
    "score": score,
    "config": loaded.config,
  }
  (folder / "submission.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
  (folder / "README.md").write_text(_readme(name, found, score), encoding="utf-8")
  return found


def verify(folder: Path, data: Path, *, expected_bpb: float | None, ttt: bool = False) -> dict:
  """Scores the folder in a fresh process, from a copy of the folder alone, and returns what it reported.

  Raises:
    UserError: it does not run, or its bits per byte are not those that the run reported.
  """
  with tempfile.TemporaryDirectory() as place:
    copy = Path(place) / "submission"
    shutil.copytree(folder, copy)
    environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    command = [
      sys.executable,
      "-I",
      str(copy / "evaluate.py"),
      "--data",
      str(data.resolve()),
      *(["--ttt"] if ttt else []),
    ]
    done = subprocess.run(command, cwd=place, env=environ, capture_output=True, text=True, check=False)
  if done.returncode:
    said = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines() or ["nothing"]
    raise UserError(f"The submission does not score from its own folder; it said: {said[-1].strip()}")
  found = json.loads(done.stdout.strip().splitlines()[-1])
  if expected_bpb is not None and abs(found["bpb"] - expected_bpb) > _SAME_BPB:
    raise UserError(
      f"The submission scores {found['bpb']:.6f} bits per byte from its own folder, but the run reported "
      f"{expected_bpb:.6f}; score the run's artifact anew on this machine."
    )
  return found


def _readme(name: str, found: Account, score: dict | None) -> str:
  reached = f"{score['bpb']:.5f} bits per byte" if score else "see submission.json"
  return f"""# {name}

{reached}, {found.total:,} of {found.budget:,} bytes ({found.artifact:,} weights, {found.code:,} code; tokenizer
{found.tokenizer:,}, apart).

    python -I evaluate.py --data FOLDER          # plain
    python -I evaluate.py --data FOLDER --ttt    # with test-time training and hints

FOLDER holds `fineweb_val_*.bin` and `fineweb_val_bytes_*.bin`. Needed: Python ≥ 3.11 with jax, flax, optax, numpy,
constriction 0.5.0, zstandard, jaxtyping, and a C compiler for the hints.

```
{accounting.table(found)}
```
"""
