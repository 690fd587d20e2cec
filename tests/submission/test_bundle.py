"""The code that ships: the modules that evaluation imports and no others, and the packages that it needs."""

import ast
import importlib.util
import io
import json
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
from pathlib import Path

import pytest
from tiny_model import SETTINGS, random_params, write_data

from pgolf_jax.quantize.make import make
from pgolf_jax.submission import bundle, package
from pgolf_jax.submission.evaluate import score

ROOT = Path(__file__).parents[2]

# Backends, and what they share, are imported when an operation first considers them.
LATE = re.compile(r"pgolf_jax\.kernels\.(\w+\.(reference|xla|mosaic_gpu|mosaic_tpu|vjp)|hopper(_attention)?|numerics)")

NOT_FOR_EVALUATION = (
  "pgolf_jax.kernels.ngram.in_numpy",
  "pgolf_jax.kernels.ngram.reference",
  "pgolf_jax.kernels.polar_express",
  "pgolf_jax.model.generate",
  "pgolf_jax.quantize.artifact.codecs.search",
  "pgolf_jax.quantize.artifact.writer",
  "pgolf_jax.quantize.calibrate",
  "pgolf_jax.quantize.corrections",
  "pgolf_jax.quantize.gptq",
  "pgolf_jax.quantize.make",
  "pgolf_jax.submission.package",
)
EVALUATION_ROOMS = {"data", "errors", "kernels", "model", "quantize", "runtime", "scoring", "settings", "submission"}
EVALUATION_ROOMS |= {"tables"}


@pytest.fixture(scope="module")
def modules():
  return bundle.needed_modules()


def test_what_evaluation_imports_ships_and_nothing_else_does(modules):
  program = """if True:
    import json, sys
    import pgolf_jax.submission.evaluate, pgolf_jax.scoring.ttt
    print(json.dumps([name for name in sys.modules if name.split(".")[0] == "pgolf_jax"]))
  """
  said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
  loaded = {name for name in json.loads(said) if not name.endswith("._ngram")}
  assert loaded <= set(modules)
  assert not {name for name in set(modules) - loaded if not LATE.fullmatch(name)}


def test_neither_training_nor_quantising_ships(modules):
  assert {name.split(".")[1] for name in modules if "." in name} <= EVALUATION_ROOMS
  assert not [name for name in modules if name.startswith(NOT_FOR_EVALUATION)]
  data = {name for name in modules if name.startswith("pgolf_jax.data.")}
  assert data == {"pgolf_jax.data.shards"}


def test_references_stay_behind_as_nothing_would_reach_them(modules):
  assert not [name for name in modules if name.endswith(".reference")]
  for name in modules:
    if name.endswith(".xla"):
      assert not hasattr(importlib.import_module(name), "obstacle"), name


def test_no_module_takes_a_private_name_of_another(modules):
  """They are given other names."""
  for name in modules:
    tree = ast.parse(Path(importlib.util.find_spec(name).origin).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    ours = [node for node in imports if isinstance(node, ast.ImportFrom) and node.module.startswith("pgolf_jax")]
    taken = {alias.name for node in ours for alias in node.names} - {"_ngram"}  # a module
    bound = {alias.asname or alias.name for node in ours for alias in node.names}
    taken |= {
      node.attr
      for node in ast.walk(tree)
      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound
    } - {"_fields"}  # of a class
    assert not [each for each in taken if each.startswith("_") and not each.startswith("__")], name


def test_c_sources_lose_their_comments_and_still_compile(tmp_path):
  with tarfile.open(fileobj=io.BytesIO(bundle.code().archive)) as archive:
    archive.extractall(tmp_path, filter="data")
  sources = list(tmp_path.rglob("*.c"))
  assert len(sources) == 4 and not any("/*" in source.read_text() for source in sources)
  headers = sysconfig.get_paths()["include"]
  options = ["-fsyntax-only", "-Werror", "-std=gnu11", "-DPy_LIMITED_API=0x030B0000", f"-I{headers}"]
  subprocess.run(["cc", *options, *sources], check=True)
  kept = 'a = "/* a string */";\nc = \'"\';'
  assert bundle.minified_c(f"// first\n{kept} /* last\n */\n") == f"{kept}\n"


def test_archive_is_small_and_reproducible(modules):
  code = bundle.code()
  assert code.files > len(modules)  # C sources
  assert bundle.archive(modules)[0] == code.archive
  assert code.size < 86_000  # of 16,000,000: the budget for the weights is what it costs


def test_requirements_are_those_of_pyproject(modules):
  declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
  requirements = bundle.requirements(modules)
  assert set(requirements) <= set(declared)
  assert {"constriction==0.5.0"} < set(requirements)
  with pytest.raises(RuntimeError, match=r"imports \w+, which no dependency"):
    bundle.requirements(["pgolf_jax.bench.torch_gpt"])


@pytest.mark.slow
def test_folder_scores_with_nothing_but_its_requirements_installed(tmp_path):
  """In a virtual environment in which pip has installed requirements.txt and nothing else."""
  data, folder = tmp_path / "data", tmp_path / "submission"
  write_data(data)
  artifact = make(SETTINGS, random_params(), data).data
  package.build(folder, artifact, package.Contents("tiny"))
  venv.create(tmp_path / "venv", with_pip=True)
  python = str(tmp_path / "venv/bin/python")
  pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
  requirements = (folder / "requirements.txt").read_text().split()
  probe = subprocess.run(
    [*pip, "download", "--no-deps", "--dest", tmp_path / "probe", requirements[0]], capture_output=True, text=True
  )
  if probe.returncode:
    pytest.skip(f"pip reaches no package index: {probe.stderr.strip().splitlines()[-1]}")
  subprocess.run([*pip, "install", "--requirement", folder / "requirements.txt"], check=True)
  expected = score(folder / "artifact.pgolf", data, ttt=False)["bpb"]
  package.verify(folder, data, expected_bpb=expected, python=python)
  package.verify(folder, data, expected_bpb=None, ttt=True, python=python)
