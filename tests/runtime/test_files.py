import numpy as np
import pytest
from safetensors.numpy import load_file

from pgolf_jax.runtime import files


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
  path = tmp_path / "results.json"
  files.write_json(path, {"steps": 3})
  before = path.read_bytes()
  with pytest.raises(RuntimeError), files.replacing(path) as partial:
    partial.write_text("half a fi")
    raise RuntimeError("killed")
  assert path.read_bytes() == before
  assert list(tmp_path.iterdir()) == [path]


def test_lines_and_arrays_come_back(tmp_path):
  files.write_json_lines(tmp_path / "lines", [{"a": 1}, {"a": 2}])
  assert files.read_json_lines(tmp_path / "lines") == [{"a": 1}, {"a": 2}]
  strided = np.arange(12.0).reshape(3, 4).T
  files.write_arrays(tmp_path / "arrays", {"x": strided})
  np.testing.assert_array_equal(load_file(tmp_path / "arrays")["x"], strided)
