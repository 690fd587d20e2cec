"""The code that ships with an artifact: the modules that evaluation needs, minified, in one compressed archive.

Which modules these are, and which packages have to be installed beside them, follows from the imports of the evaluator:
nothing is listed by hand.
"""

import ast
import dataclasses
import functools
import importlib.metadata
import io
import lzma
import re
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pgolf_jax
import pgolf_jax.kernels
from pgolf_jax.kernels.operation import BACKENDS
from pgolf_jax.submission import starter

ENTRY = "pgolf_jax.submission.evaluate"
"""The module that evaluates from a submission folder."""

_SOURCES = (".c", ".h")
_C_LITERAL_OR_COMMENT = re.compile(r""""(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])+'|/\*.*?\*/|//[^\n]*""", re.DOTALL)
# For text: more of a byte follows from the byte before it than from its place in a word.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]


@dataclasses.dataclass(frozen=True)
class Code:
  """What ships beside the artifact so that it can be scored."""

  starter: bytes  # the script that unpacks and runs the archive
  archive: bytes  # .tar.xz
  files: int  # in the archive
  requirements: list[str]  # packages to install, as pip understands them

  @property
  def size(self) -> int:
    """Bytes that count against the budget."""
    return len(self.starter) + len(self.archive)


@functools.cache
def code() -> Code:
  """Returns the evaluator's code as it ships; the same bytes for the same sources."""
  modules = needed_modules()
  script = minified(Path(starter.__file__).read_text(encoding="utf-8"), "evaluate.py")
  packed, files = archive(modules)
  return Code(script.encode(), packed, files, requirements(modules))


def needed_modules(entry: str = ENTRY) -> list[str]:
  """Returns the names of all modules of this package that `entry` imports, at once or later, itself included."""
  needed: set[str] = set()
  waiting = [entry]
  while waiting:
    name = waiting.pop()
    path = _path(name)
    if path is None or name in needed:
      continue
    needed.add(name)
    waiting += [name.rsplit(".", 1)[0]] if "." in name else []
    for module, members in _imports(path):
      waiting += [module, *(f"{module}.{member}" for member in members)]
      if "Operation" in members:  # a package that imports its backends by name; XLA leaves nothing to the reference
        waiting += [f"{name}.{backend}" for backend in BACKENDS if backend != "reference"]
  return sorted(needed)


def requirements(modules: Iterable[str]) -> list[str]:
  """Returns the packages that the modules import, with the versions that this package depends on.

  Raises:
    RuntimeError: a module imports a package that this package does not depend on.
  """
  providers = importlib.metadata.packages_distributions()
  declared = {}
  for requirement in importlib.metadata.requires("pgolf_jax") or ():
    if "extra ==" not in requirement:
      declared[_canonical(re.match(r"[\w.-]+", requirement)[0])] = requirement
  needed = set()
  for package in sorted({name.split(".")[0] for module in modules for name, _ in _imports(_path(module))}):
    if package == "pgolf_jax" or package in sys.stdlib_module_names:
      continue
    distributions = [name for name in map(_canonical, providers.get(package, ())) if name in declared]
    if not distributions:
      raise RuntimeError(f"The evaluator imports {package}, which no dependency in pyproject.toml provides.")
    needed.update(distributions)
  return [declared[name] for name in sorted(needed)]


def archive(modules: Iterable[str]) -> tuple[bytes, int]:
  """Returns (the modules, minified, with the C sources beside them, as a .tar.xz; its number of files)."""
  files: dict[str, bytes] = {}
  for name in modules:
    path = _path(name)
    place = name.replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py")
    files[place] = minified(path.read_text(encoding="utf-8"), place).encode()
    if path.name == "__init__.py":
      for source in path.parent.iterdir():
        if source.suffix in _SOURCES:
          files[f"{name.replace('.', '/')}/{source.name}"] = minified_c(source.read_text(encoding="utf-8")).encode()
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
    for place in sorted(files):
      entry = tarfile.TarInfo(place)
      entry.size = len(files[place])
      tar.addfile(entry, io.BytesIO(files[place]))
  return lzma.compress(buffer.getvalue(), filters=_FILTERS), len(files)


def minified(text: str, name: str) -> str:
  """Returns Python source without docstrings, with short local and private names, and annotations of class fields only.

  Settings are read by the annotations of their dataclasses; what is told of each to a reader of help stays behind.
  """
  from python_minifier import RemoveAnnotationsOptions, minify  # only packaging needs it, and it takes long to import

  annotations = RemoveAnnotationsOptions(
    remove_variable_annotations=True,
    remove_return_annotations=True,
    remove_argument_annotations=True,
    remove_class_attribute_annotations=False,
  )
  tree = ast.parse(text, name)
  for node in ast.walk(tree):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setting":
      node.args[3] = ast.Constant("")
  # A literal that stands there again costs the compressed archive less than a name for it does.
  options = {"remove_literal_statements": True, "hoist_literals": False}
  # No module takes a private name from another.
  public = sorted(name for name in _names(tree) if not name.startswith("_") or name.startswith("__"))
  options |= {"rename_globals": True, "preserve_globals": public}
  return minify(ast.unparse(tree), filename=name, remove_annotations=annotations, **options)


def _names(tree: ast.Module) -> set[str]:
  """Every name that a module binds, imports or uses."""
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Name):
      names.add(node.id)
    elif isinstance(node, ast.FunctionDef | ast.ClassDef):
      names.add(node.name)
    elif isinstance(node, ast.alias):
      names.add(node.asname or node.name.partition(".")[0])
  return names


def minified_c(text: str) -> str:
  """Returns C source without comments, indentation and empty lines."""
  text = _C_LITERAL_OR_COMMENT.sub(lambda match: " " if match[0][0] == "/" else match[0], text)
  lines = (line.strip() for line in text.splitlines())
  return "".join(f"{line}\n" for line in lines if line)


def _imports(path: Path) -> Iterator[tuple[str, list[str]]]:
  """Yields (module, names taken from it) for every import in a file, those inside functions included."""
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      yield from ((alias.name, []) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
      yield node.module, [alias.name for alias in node.names]


def _path(name: str) -> Path | None:
  """Returns the source file of one of this package's modules; None for any other name."""
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


def _canonical(name: str) -> str:
  return re.sub(r"[-_.]+", "-", name).lower()
