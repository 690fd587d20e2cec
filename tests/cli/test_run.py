"""`pgolf run` on a folder that another process has."""

from pgolf_jax.cli import main
from pgolf_jax.runtime.files import locked


def test_a_folder_in_use_is_refused_and_left_as_it_is(tmp_path, capsys):
  with locked(tmp_path):
    assert main(["run", "configs/demo.toml", "--out", str(tmp_path)]) == 1
    assert "in use by process" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
