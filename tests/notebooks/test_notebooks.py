"""The notebooks: stored without output, made of public names alone, and run from top to bottom on a CPU."""

import ast
import json
import re
from pathlib import Path

import pytest

import pgolf_jax

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
TINY = {
  "model__num_layers": 2, "model__model_dim": 64, "model__num_heads": 2, "model__num_kv_heads": 1,
  "model__num_loops": 0, "model__parallel_start_layer": 0, "model__xsa_last_n": 2, "optimizer__muon_dtype": "float32",
  "train__compute_dtype": "float32", "train__iterations": 4, "train__max_wallclock_seconds": 0.0,
  "train__schedule_mode": "step", "train__batch_tokens": 1024, "train__micro_batches": 1, "train__world_size": 1,
  "train__seq_len": 128, "train__seq_schedule": "128@1.0", "train__warmup_steps": 1, "eval__batch_tokens": 8192,
  "eval__micro_batches": 1, "eval__seq_len": 128, "eval__doc_fraction": 0.1, "quantize__calibration_batches": 1,
  "quantize__calibration_micro_batches": 1, "quantize__reserve_seconds": 0.0, "ttt__method": "cached",
  "ttt__batch_size": 14, "ttt__seq_len": 256, "ttt__chunk_size": 256, "ttt__lora__rank": 2,
  "ttt__short__score_first": False, "ttt__phase__prefix_docs": 0,
}  # fmt: skip
SMALL = {
  "quickstart": {"OUT": "run", "DATA": "data", "VOCABULARY": 512, "OVERRIDES": TINY, "TOKENS": 8},
  "kaggle_tpu_v5e8": {
    "OUT": "run", "DATA": "data", "SHARDS": 0, "VOCABULARY": 512, "OVERRIDES": TINY, "TOKENS": 8, "DOCUMENTS": 1,
  },
}  # fmt: skip


def cells(path: Path) -> list[dict]:
  return json.loads(path.read_text(encoding="utf-8"))["cells"]


def code(cell: dict) -> str:
  return "".join(cell["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_without_output_and_every_cell_is_python(path):
  first = None
  for cell in cells(path):
    if cell["cell_type"] == "code":
      assert cell["outputs"] == [] and cell["execution_count"] is None
      ast.parse(code(cell))
      first = first or cell
  assert "parameters" in first["metadata"]["tags"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_uses_public_names_and_existing_verbs_alone(path):
  text = "\n".join(code(cell) for cell in cells(path) if cell["cell_type"] == "code")
  names = set(re.findall(r"\bpgolf_jax\.(\w+)", text))
  assert {"settings", "train", "load"} <= names <= set(pgolf_jax.__all__)
  assert not re.search(r"(from|import) pgolf_jax\.", text)


def with_parameters(notebook, values: dict):
  """Replaces the values of the cell of parameters; every one of them must be there."""
  cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
  for name, value in values.items():
    cell.source, count = re.subn(rf"^{name} = .*$", lambda _, n=name, v=value: f"{n} = {v!r}", cell.source, flags=re.M)
    assert count == 1, f"there is no parameter {name}"
  return notebook


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
  nbformat = pytest.importorskip("nbformat")
  nbclient = pytest.importorskip("nbclient")
  pytest.importorskip("ipykernel")
  pytest.importorskip("jinja2")
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  notebook = with_parameters(nbformat.read(path, as_version=4), SMALL[path.stem])
  nbclient.NotebookClient(notebook, timeout=1500, resources={"metadata": {"path": str(tmp_path)}}).execute()
  outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
  printed = "".join(output.get("text", "") for output in outputs)
  assert "versions" in printed and "JAX's devices" in printed, "pgolf doctor"
  assert "everything agrees with the PyTorch reference" in printed
  assert re.search(r"artifact +\d\.\d+ bits per byte", printed) and "bytes of artifact" in printed
  assert re.search(r"\d\.\d{3} bits per byte; \d\.\d{3} if it may learn", printed)
  shown = [output.data.get("text/html", "") for output in outputs if output.output_type == "display_data"]
  assert any("<iframe srcdoc=" in text and "bits per byte" in text for text in shown)
