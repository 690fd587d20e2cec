import numpy as np
import pytest
from safetensors.numpy import load_file

from pgolf_jax.errors import UserError
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


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ('{"a": 1,\n "b": tru', "line 2: damaged JSON"),
    ('{"a":\n[1]', "line 2: damaged JSON"),
    ("[1, 2]", "line 1: a JSON array where object is needed"),
    ("true", "line 1: a JSON truth value where object"),
    ("", "line 1: damaged JSON"),
    ('{"text": "[[",\n"a": ' + "[" * 100_000, "line 2: damaged JSON .more than 100 levels deep"),
    ('{"a":\n' + "9" * 5000 + "}", "line 2: damaged JSON .a number that is not finite or far too long"),
    ('{"a": 1,\n"b": NaN}', "line 2: damaged JSON .a number that is not finite"),
    ('{"a": "NaN",\n\n"b": -Infinity}', "line 3: damaged JSON .a number that is not finite"),
    ('{"a": [1e5,\n1e999]}', "line 2: damaged JSON .a number that is not finite"),
    ('{"a": "\n\udcff"}', "line 2: invalid UTF-8"),
  ],
)
def test_damaged_json_is_one_sentence_with_file_and_line(tmp_path, text, message):
  path = tmp_path / "results.json"
  path.write_bytes(text.encode(errors="surrogateescape"))
  with pytest.raises(UserError, match=f"results.json, {message}"):
    files.read_json(path)


def test_only_the_last_json_line_may_be_torn(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"a": 1}\n{"a": 2}\n{"a": ')
  assert files.read_json_lines(path) == [{"a": 1}, {"a": 2}]
  path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
  with pytest.raises(UserError, match=r"metrics.jsonl, line 2: damaged JSON"):
    files.read_json_lines(path)
  path.write_text('{"a": 1}\n[2]\n')
  with pytest.raises(UserError, match=r"metrics.jsonl, line 2: a JSON array"):
    files.read_json_lines(path)
  with pytest.raises(UserError, match=r"no.jsonl: cannot be read"):
    files.read_json_lines(tmp_path / "no.jsonl")
