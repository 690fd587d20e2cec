"""The benchmark of quantisers on a tiny trained run: its figures, and going on from its file."""

import dataclasses
import math

import numpy as np
import pytest
import tomli_w
from tiny_model import SETTINGS, random_params, write_data

from pgolf_jax.bench import quantize
from pgolf_jax.cli import main
from pgolf_jax.quantize.artifact import read
from pgolf_jax.runtime.files import read_sealed, seal, write_json
from pgolf_jax.scoring import plain
from pgolf_jax.settings.load import changed, to_dict


@pytest.fixture
def run(tmp_path, monkeypatch):
  """A run folder that says it has trained, with random weights for average."""
  write_data(tmp_path / "data")
  settings = changed(
    SETTINGS,
    {
      "data.path": str(tmp_path / "data"),
      "quantize.lqer": False,
      "ttt.seq_len": 32,
      "ttt.chunk_size": 16,
      "ttt.batch_size": 4,
      "ttt.lora.rank": 2,
      "ttt.phase.prefix_docs": 0,
      "ttt.short.score_first": False,
    },
  )
  folder = tmp_path / "run"
  folder.mkdir()
  (folder / "config.toml").write_text(tomli_w.dumps(to_dict(settings)))
  write_json(folder / "results.json", {"train": seal({"steps": 1})})
  monkeypatch.setattr(quantize.stages, "averaged_params", lambda run, mesh: random_params())
  return folder


def test_end_to_end(run, tmp_path, capsys, monkeypatch):
  file = tmp_path / "figures.json"
  assert main(["bench", "quantize", str(run), "--rates", "1", "3", "--json", str(file), "--debug"]) == 0
  print(capsys.readouterr().out)
