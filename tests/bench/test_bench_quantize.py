"""The benchmark of quantisers on a tiny run: its figures, going on from its file, and two methods side by side."""

import math

import jax

import numpy as np
import pytest
import tomli_w
from ttt_case import SETTINGS, random_documents, random_params

from pgolf_jax.bench import quantize
from pgolf_jax.cli import main
from pgolf_jax.data.shards import load_validation, shard_path, write_shard
from pgolf_jax.quantize.artifact import read
from pgolf_jax.runtime.distributed import data_mesh
from pgolf_jax.runtime.files import read_sealed, seal, write_json
from pgolf_jax.scoring import plain
from pgolf_jax.settings.load import changed, to_dict

LENGTHS = [40, 9, 75, 41, 22, 60]


@pytest.fixture
def run(tmp_path, monkeypatch):
  """A run folder that says it is trained; random weights stand for its average."""
  data, settings = tmp_path / "data", changed(
    SETTINGS,
    {
      "data.path": str(tmp_path / "data"),
      "train.seq_len": 48,
      "quantize.fp16_up_to": 500,
      "quantize.calibration_batches": 2,
      "quantize.awq_group_size": 16,
      "quantize.lqer": False,
      "ttt.method": "cached",
    },
  )
  data.mkdir()
  documents = random_documents(LENGTHS)
  for split, values in zip(("train", "val", "val_bytes"), (documents.tokens, *documents), strict=True):
    write_shard(shard_path(data, split, 0), values)
  folder = tmp_path / "run"
  folder.mkdir()
  (folder / "config.toml").write_text(tomli_w.dumps(to_dict(settings)))
  write_json(folder / "results.json", {"train": seal({"steps": 1})})
  monkeypatch.setattr(quantize.stages, "averaged_params", lambda run, mesh: random_params())
  monkeypatch.setattr(quantize, "data_mesh", lambda: data_mesh(jax.devices()[:1]))
  return folder


def bench(run, *options: str) -> None:
  assert main(["bench", "quantize", str(run), "--json", str(run.parent / "figures.json"), *options, "--debug"]) == 0


def test_end_to_end(run, capsys, monkeypatch):
  bench(run, "--rates", "1", "4")
  record = read_sealed(run.parent / "figures.json")
  fine, coarse = record["rows"].values()
  assert list(record["rows"]) == ["gptq × 1", "gptq × 4"]
  assert fine["bytes"] > coarse["bytes"] and 0 < fine["kl"] < coarse["kl"]
  assert coarse["settings"]["quantize.mlp_clip_sigmas"] == 4 * 11.5
  print(capsys.readouterr().out)
  import time; t=time.time()
  bench(run, "--rates", "1", "4", "--ttt", "--ttt-docs", "3")
  print(time.time()-t); t=time.time()
  print(capsys.readouterr().out)
  bench(run, "--rates", "1", "4", "--tune")
  print(time.time()-t); t=time.time()
  print(capsys.readouterr().out)
