"""What an installation gets: the lists in pyproject.toml match the tree, and a wheel works without the tree."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pgolf_jax
from pgolf_jax.settings import builtin

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
DATA_ALONE = {"pgolf_jax.configs", "pgolf_jax.parity.golden"}


def test_every_folder_of_code_is_packaged():
  folders = {p.parent.relative_to(ROOT) for top in ("pgolf_jax", "kernels") for p in (ROOT / top).rglob("*.py")}
  assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)
  names = {".".join(f.parts if f.parts[0] == "pgolf_jax" else ("pgolf_jax", *f.parts)) for f in folders}
  assert set(SETUPTOOLS["packages"]) == names | DATA_ALONE


def packaged(package: str) -> tuple[Path, set[Path]]:
  """The folder of a package, and the files in it that its patterns of data take along."""
  top, place = package, ""
  while top not in SETUPTOOLS["package-dir"] and "." in top:
    top, _, last = top.rpartition(".")
    place = f"{last}/{place}"
  folder = ROOT / SETUPTOOLS["package-dir"].get(top, top) / place
  patterns = SETUPTOOLS["package-data"].get(package, [])
  return folder, {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}


def test_every_file_that_is_not_code_is_packaged_or_left_out_on_purpose():
  not_for_users = {"kernels/ngram/sanitize.sh"}
  taken = set().union(*(packaged(package)[1] for package in SETUPTOOLS["packages"]))
  there = {
    path
    for top in ("pgolf_jax", "kernels", "configs", "tests/golden")
    for path in (ROOT / top).rglob("*")
    if path.is_file() and path.suffix not in (".py", ".pyc", ".so")
  }
  assert {str(path.relative_to(ROOT)) for path in there - taken} == not_for_users


def test_the_extension_has_every_c_file():
  [extension] = SETUPTOOLS["ext-modules"]
  files = {str(path.relative_to(ROOT)) for path in (ROOT / "kernels" / "ngram").glob("*.[ch]")}
  assert {*extension["sources"], *extension["depends"]} == files
  assert extension["optional"], "without a C compiler the rest is installed all the same"


def test_the_version_has_one_source():
  assert SETUPTOOLS["dynamic"]["version"] == {"attr": "pgolf_jax.__version__"}
  for command in (["-m", "pgolf_jax", "--version"], ["-c", "from pgolf_jax.cli import main; main(['--version'])"]):
    said = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True).stdout
    assert said == f"pgolf_jax {pgolf_jax.__version__}\n"


def test_every_built_in_config_is_described():
  for name in builtin.names():
    described = builtin.describe(builtin.find(name))
    assert all((described.title, described.command, described.hardware, described.time, described.score)), described
