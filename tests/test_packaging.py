import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_folder_of_code_is_packaged():
  listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
  folders = {p.parent.relative_to(ROOT) for top in ("pgolf_jax", "kernels") for p in (ROOT / top).rglob("*.py")}
  assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)
  names = {".".join(f.parts if f.parts[0] == "pgolf_jax" else ("pgolf_jax", *f.parts)) for f in folders}
  assert set(listed) == names | {"pgolf_jax.parity.golden"}  # data alone: the small golden cases


def test_every_small_golden_case_is_packaged():
  setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
  folder = ROOT / setuptools["package-dir"]["pgolf_jax.parity.golden"]
  patterns = setuptools["package-data"]["pgolf_jax.parity.golden"]
  packaged = {path for pattern in patterns for path in folder.glob(pattern)}
  assert folder == ROOT / "tests" / "golden"
  assert {path for path in folder.rglob("*") if path.is_file()} == {path for path in packaged if path.is_file()}
