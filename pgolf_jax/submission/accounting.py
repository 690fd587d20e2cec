"""What counts against the budget: the artifact's bytes by tensor and stream, and the code that evaluation needs.

Code is counted as it is shipped: every module that the evaluator's imports reach, minified, with the C sources, in one
compressed archive. The tokenizer is shown separately, as the rules have it.
"""

import ast
import dataclasses
import io
import math
import tarfile
from pathlib import Path

import pgolf_jax
import pgolf_jax.kernels
from pgolf_jax.quantize.artifact import format
from pgolf_jax.quantize.artifact.streams import describe, split

ENTRY = "pgolf_jax.submission.rescore"
"""The module that evaluates from a submission folder; its imports decide which code is counted."""

_SOURCES = (".c", ".h")


@dataclasses.dataclass(frozen=True)
class Account:
  """Bytes of a submission."""

  by_stream: dict[str, int]
  by_tensor: dict[str, float]  # a stream's bytes shared out by values; the header is nobody's
  code: int  # archive and starter
  code_files: int
  tokenizer: int  # counted separately
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


def account(data: bytes, *, starter: bytes, archive: bytes, files: int, tokenizer: int, budget: int) -> Account:
  """The account of an artifact with the code that ships beside it.

  Args:
    data: the artifact.
    starter: the script that unpacks and runs the code.
    archive: what `archive` made, of `files` files.
    tokenizer: bytes of the tokenizer model.
  """
  found = format.read(data)
  code = len(starter) + len(archive)
  return Account(found.stream_bytes, tensor_bytes(found), code, files, tokenizer, budget)


def tensor_bytes(found: format.Artifact) -> dict[str, float]:
  """Compressed bytes by tensor: each stream's shared out over its tensors by their number of values."""
  shares = dict.fromkeys(found.tensors, 0.0)
  for stream in split([describe(name, tensor) for name, tensor in found.tensors.items()]):
    values = sum(math.prod(shape) for *_, shape in stream.arrays)
    for name, _, shape in stream.arrays:
      shares[name] += found.stream_bytes[stream.name] * math.prod(shape) / values
  return shares


def needed_modules(entry: str = ENTRY) -> list[str]:
  """Every module of this package that `entry` imports, at once or later, itself included; by name."""
  found: set[str] = set()
  waiting = [entry]
  while waiting:
    name = waiting.pop()
    path = _path(name)
    if path is None or name in found:
      continue
    found.add(name)
    waiting += [name.rsplit(".", 1)[0]] if "." in name else []
    if name.startswith("pgolf_jax.kernels.") and path.name == "__init__.py":
      # Kernels pick the module of their backend by name.
      waiting += [f"{name}.{module.stem}" for module in path.parent.glob("*.py") if module != path]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.Import):
        waiting += [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom) and node.module:
        waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
  return sorted(found)


def archive(modules: list[str]) -> tuple[bytes, int]:
  """(the modules, minified, with the C sources beside them, as a .tar.xz; number of files). Reproducible."""
  files: dict[str, bytes] = {}
  for name in modules:
    path = _path(name)
    place = name.replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py")
    files[place] = minified(path.read_text(encoding="utf-8"), place).encode()
    if path.name == "__init__.py":
      for source in path.parent.iterdir():
        if source.suffix in _SOURCES:
          files[f"{name.replace('.', '/')}/{source.name}"] = source.read_bytes()
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w:xz", preset=9, format=tarfile.USTAR_FORMAT) as tar:
    for place in sorted(files):
      entry = tarfile.TarInfo(place)
      entry.size = len(files[place])
      tar.addfile(entry, io.BytesIO(files[place]))
  return buffer.getvalue(), len(files)


def minified(text: str, name: str) -> str:
  """Python source without docstrings, with short local names and without annotations, but for those of classes.

  Settings are read by the annotations of their dataclasses.
  """
  from python_minifier import RemoveAnnotationsOptions, minify

  annotations = RemoveAnnotationsOptions(
    remove_variable_annotations=True,
    remove_return_annotations=True,
    remove_argument_annotations=True,
    remove_class_attribute_annotations=False,
  )
  return minify(text, filename=name, remove_literal_statements=True, remove_annotations=annotations)


def table(found: Account) -> str:
  """The account, for people."""
  rows = [(name, f"{size:,}") for name, size in sorted(found.by_stream.items(), key=lambda item: -item[1])]
  rows += [("artifact", f"{found.artifact:,}"), (f"code ({found.code_files} files)", f"{found.code:,}")]
  rows += [("total", f"{found.total:,}"), ("budget", f"{found.budget:,}"), ("left", f"{-found.over:,}")]
  rows += [("tokenizer, apart", f"{found.tokenizer:,}")]
  width = max(len(name) for name, _ in rows)
  return "\n".join(f"{name:<{width}} {size:>14}" for name, size in rows)


def _path(name: str) -> Path | None:
  """The source file of one of this package's modules; None for any other name."""
  parts = name.split(".")
  if parts[0] != "pgolf_jax":
    return None
  root, rest = Path(pgolf_jax.__file__).parent, parts[1:]
  if rest[:1] == ["kernels"]:
    root, rest = Path(pgolf_jax.kernels.__file__).parent, rest[1:]
  folder = root.joinpath(*rest)
  if (folder / "__init__.py").is_file():
    return folder / "__init__.py"
  file = folder.with_suffix(".py") if rest else folder
  return file if file.is_file() else None
