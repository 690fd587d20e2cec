"""What an installation gets: the lists in pyproject.toml match the tree, and a wheel works without the tree."""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

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


CHECK = """
import sys, numpy, pgolf_jax
from pgolf_jax.kernels import ngram
from pgolf_jax.settings import builtin
assert pgolf_jax.__file__.startswith(sys.prefix), pgolf_jax.__file__
assert str(builtin.folder()).startswith(sys.prefix)
state = ngram.NgramState(2, threshold=0.8)
hint, gate = state.update(numpy.array([3, 4, 3, 4, 3]))
assert hint.tolist() == [0, 0, 0, 4, 3] and gate.tolist() == [False, False, False, True, True]
print(pgolf_jax.settings("demo").model.vocab_size, ngram.IS_COMPILED)
"""


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
  """Folder of the sdist of this tree, and of the wheel that is built from the sdist alone."""
  place = tmp_path_factory.mktemp("dist")
  files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
  for name in filter(None, files):
    (place / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / name, place / "tree" / name)
  subprocess.run([sys.executable, "-m", "build", "--outdir", place / "made", place / "tree"], check=True)
  shutil.rmtree(place / "tree")
  return place / "made"


@pytest.mark.slow
@pytest.mark.parametrize(("what", "compiler"), [("*-cp311-abi3-*.whl", "cc"), ("*.tar.gz", "/bin/false")])
def test_wheel_and_sdist_work_without_the_tree(distributions, tmp_path, what, compiler):
  """In an environment with the dependencies of this one, from an empty folder; the sdist without a C compiler."""
  [made] = distributions.glob(what)
  venv.create(tmp_path / "env", with_pip=True)
  python, work = tmp_path / "env" / "bin" / "python", tmp_path / "work"
  work.mkdir()
  install = [python, "-m", "pip", "install", "--quiet", "--no-deps", made]
  subprocess.run(install, check=True, cwd=work, env=os.environ | {"CC": compiler})
  [site] = (tmp_path / "env" / "lib").glob("python*/site-packages")
  (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
  done = subprocess.run([python, "-c", CHECK], check=True, cwd=work, capture_output=True, text=True)
  assert done.stdout == f"1024 {compiler == 'cc'}\n"
  assert ("install a C compiler" in done.stderr) == (compiler != "cc")
  pgolf = tmp_path / "env" / "bin" / "pgolf"
  said = subprocess.run([pgolf, "configs"], check=True, cwd=work, capture_output=True, text=True).stdout
  assert all(name in said for name in builtin.names())
  assert main_error(pgolf, work) == "pgolf: There is no built-in config 'dmo'; did you mean demo?\n"
  subprocess.run([pgolf, "parity", "check", "--all"], check=True, cwd=work)
  assert list(work.iterdir()) == []


def main_error(pgolf: Path, work: Path) -> str:
  return subprocess.run([pgolf, "run", "dmo"], cwd=work, capture_output=True, text=True).stderr
