"""Every name that the code imports or uses exists, in functions too, where a fault would show only when they run."""

import ast
import builtins
import importlib
import symtable
from collections import defaultdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONAL = {
  "torch",
  "wandb",
  "libtpu",
  "triton",
  "tensorflow",
  "matplotlib",
  "jinja2",
  "markupsafe",
  "PIL",
  "flash_attn_interface",
}
FILES = sorted(path for top in ("pgolf_jax", "kernels", "tests") for path in (ROOT / top).rglob("*.py"))
MODULE_NAMES = {"__file__", "__name__", "__doc__", "__path__", "__spec__", "__package__"}


@cache
def tree(path: Path) -> ast.Module:
  return ast.parse(path.read_text(encoding="utf-8"))


def module_file(name: str, beside: Path | None = None) -> Path | None:
  """The file or folder of a module of this repository; tests import their neighbours by their bare names."""
  if name.split(".")[0] == "pgolf_jax":
    below = name.split(".")[1:]
    base = ROOT.joinpath("kernels", *below[1:]) if below[:1] == ["kernels"] else ROOT.joinpath("pgolf_jax", *below)
    places = [base]
  else:
    folders = [] if beside is None else [f for f in beside.parents if f.is_relative_to(ROOT / "tests")]
    places = [folder / name for folder in folders]
  for place in places:
    for candidate in (place / "__init__.py", place.parent / f"{place.name}.py", place):
      if candidate.exists():
        return candidate
  return None


@cache
def bound_at_top(path: Path) -> frozenset[str]:
  """Names that a module binds when it is imported, and the modules in its folder if it is a package."""
  if path.is_dir():
    return frozenset(p.stem for p in path.iterdir())
  table = symtable.symtable(path.read_text(encoding="utf-8"), str(path), "exec")
  names = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
  if path.name == "__init__.py":
    names |= {p.stem for p in path.parent.iterdir()}
  if "__getattr__" in names:  # what it gives is what the module declares
    names |= {name for node in tree(path).body if is_declaration(node) for name in ast.literal_eval(node.value)}
  return frozenset(names | MODULE_NAMES)


def is_declaration(node: ast.AST) -> bool:
  """Whether a statement is `__all__ = […]`."""
  return isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]


def faults_of_imports(path: Path) -> list[str]:
  """Imports of a file that do not resolve, and attributes of this repository's modules that do not exist."""
  faults, modules, rebound = [], defaultdict(set), set()
  for node in ast.walk(tree(path)):
    if isinstance(node, ast.Import):
      for alias in node.names:
        faults += fault_of_module(alias.name, path, node.lineno)
        file = module_file(alias.name, path)
        if file and alias.asname:
          modules[alias.asname].add(file)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
      missing = fault_of_module(node.module, path, node.lineno)
      faults += missing
      for alias in node.names:
        faults += [] if missing else fault_of_name(node.module, alias.name, path, node.lineno)
        file = module_file(f"{node.module}.{alias.name}", path)
        if file:
          modules[alias.asname or alias.name].add(file)
    elif isinstance(node, ast.arg):
      rebound.add(node.arg)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      rebound.add(node.id)
    elif isinstance(node, ast.FunctionDef | ast.ClassDef):
      rebound.add(node.name)
  for node in ast.walk(tree(path)):
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and isinstance(node.ctx, ast.Load):
      files = modules.get(node.value.id, ())
      # A name that the file also gives to something else may be that in this place.
      if files and node.value.id not in rebound and not any(node.attr in bound_at_top(file) for file in files):
        faults.append(f"{path}:{node.lineno}: {node.value.id} has no {node.attr}")
  return faults


def fault_of_module(name: str, path: Path, line: int) -> list[str]:
  if module_file(name, path):
    return []
  top = name.split(".")[0]
  if top == "pgolf_jax" or (find_spec(top) is None and top not in OPTIONAL):
    return [f"{path}:{line}: there is no module {name}"]
  return []


def fault_of_name(module: str, name: str, path: Path, line: int) -> list[str]:
  file = module_file(module, path)
  if file is not None:
    known = name in bound_at_top(file) or module_file(f"{module}.{name}", path)
  elif find_spec(module.split(".")[0]) is None:
    return []
  else:
    known = hasattr(importlib.import_module(module), name) or find_spec(f"{module}.{name}")
  return [] if known else [f"{path}:{line}: {module} has no {name}"]


def unbound_names(path: Path) -> list[str]:
  """Global names that a file uses and nothing binds. Shape letters of annotations are strings, hence not among them."""
  table = symtable.symtable(path.read_text(encoding="utf-8"), str(path), "exec")
  bound = bound_at_top(path) | set(dir(builtins))
  faults, scopes = [], [table]
  while scopes:
    scope = scopes.pop()
    scopes += scope.get_children()
    for symbol in scope.get_symbols():
      if symbol.is_global() and symbol.is_declared_global():
        bound |= {symbol.get_name()}
      if symbol.is_referenced() and symbol.is_global() and symbol.get_name() not in bound:
        faults.append(f"{path}: {scope.get_name()} uses {symbol.get_name()}, which nothing binds")
  return faults


def test_every_import_resolves():
  faults = [fault for path in FILES for fault in faults_of_imports(path)]
  assert not faults, "\n".join(faults)


def test_every_global_name_is_bound():
  faults = [fault for path in FILES for fault in unbound_names(path)]
  assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
  "line",
  [
    "from pgolf_jax.quantize.stage import no_such_name",
    "from pgolf_jax.no_such_room import run",
    "import pgolf_jax.no_such_room",
    "import no_such_package",
    "from numpy import no_such_name",
    "from pgolf_jax.parity import check; check.no_such_name",
    "from pgolf_jax.parity import no_such_module",
  ],
)
def test_a_fault_inside_a_function_is_seen(tmp_path, line):
  path = tmp_path / "module.py"
  path.write_text(f"def run():\n  {line}\n")
  assert len(faults_of_imports(path)) == 1


def test_an_unbound_name_is_seen(tmp_path):
  path = tmp_path / "module.py"
  path.write_text("from jaxtyping import Float\n\ndef f(x: Float['Array', 'B T']) -> Settings:\n  return x\n")
  assert len(unbound_names(path)) == 1
