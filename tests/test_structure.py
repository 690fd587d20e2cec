"""The house rules of the tree: how many files there are, how long they may be, and which way imports go."""

import ast
import functools
import graphlib
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_FILES = 216
MAX_LINES = 400
MAX_PARAMETERS = 6
MAX_IMPORTS_IN_FUNCTIONS = 25


@functools.cache
def sources() -> dict[str, Path]:
  """Module name → file, for the package and its kernels."""
  files = {}
  for path in sorted([*(ROOT / "pgolf_jax").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "pgolf_jax" else ("pgolf_jax", *parts)
    files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
  return files


@functools.cache
def tree(module: str) -> ast.Module:
  return ast.parse(sources()[module].read_text(encoding="utf-8"))


def imported_modules(module: str, node: ast.AST) -> list[str]:
  """Modules of this package that an import statement of `module` names."""
  if isinstance(node, ast.Import):
    names = [alias.name for alias in node.names]
  else:
    assert node.level == 0, f"{module} has a relative import"
    names = [f"{node.module}.{alias.name}" for alias in node.names]
    names = [name if name in sources() else node.module for name in names]
  return [name for name in names if name in sources()]


def room(module: str) -> str:
  """The top folder that a module lies in, or the module itself where it lies in none."""
  return ".".join(module.split(".")[:2])


def test_there_are_few_files_and_none_is_long():
  lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in sources().items()}
  assert len(lines) <= MAX_FILES
  assert {module: count for module, count in lines.items() if count > MAX_LINES} == {}


def test_folders_form_no_cycle():
  above: dict[str, set[str]] = {}
  for module in sources():
    for node in ast.walk(tree(module)):
      if isinstance(node, ast.Import | ast.ImportFrom):
        above.setdefault(room(module), set()).update(room(name) for name in imported_modules(module, node))
  graphlib.TopologicalSorter({name: below - {name, "pgolf_jax"} for name, below in above.items()}).prepare()


def test_functions_take_few_parameters():
  many = []
  for module in sources():
    if module.startswith("pgolf_jax.kernels"):
      continue
    for node in ast.walk(tree(module)):
      if isinstance(node, ast.FunctionDef | ast.Lambda):
        arguments = [a.arg for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]
        arguments = [name for name in arguments if name not in ("self", "cls")]
        # The verbs' functions are command lines: each parameter is an option.
        if len(arguments) > MAX_PARAMETERS and not is_command(module, node) and not is_triton_kernel(node):
          many.append(f"{module}:{node.lineno} {getattr(node, 'name', 'lambda')} takes {len(arguments)}")
  assert many == []


def is_triton_kernel(node: ast.AST) -> bool:
  """Whether a function is one of Triton's kernels, which are given every array and every size by itself."""
  return any("triton.jit" in ast.unparse(decorator) for decorator in getattr(node, "decorator_list", ()))


def is_command(module: str, node: ast.AST) -> bool:
  """Whether a function's parameters are the options of a command line."""
  public = isinstance(node, ast.FunctionDef) and node in tree(module).body and not node.name.startswith("_")
  return public and module.startswith(("pgolf_jax.cli.", "pgolf_jax.bench."))


def test_imports_stand_at_the_top():
  inside = []
  for module in sources():
    if module.startswith("pgolf_jax.cli"):
      continue  # a verb imports what it needs when it is called, so that the others start at once
    for function in ast.walk(tree(module)):
      if isinstance(function, ast.FunctionDef):
        inside += [
          f"{module}:{node.lineno}" for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
  assert len(set(inside)) <= MAX_IMPORTS_IN_FUNCTIONS, sorted(set(inside))
