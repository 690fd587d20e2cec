"""The benchmark of quantisers on a tiny run: its figures, going on from its file, and two methods side by side."""

import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tomli_w
from ttt_case import SETTINGS, random_documents, random_params

from pgolf_jax.bench import quantize
from pgolf_jax.cli import main
from pgolf_jax.data.shards import load_validation, shard_path, write_shard
from pgolf_jax.errors import UserError
from pgolf_jax.model import packed
from pgolf_jax.model.gpt import bind
from pgolf_jax.model.params import SOFTCAPS
from pgolf_jax.quantize import make
from pgolf_jax.quantize.artifact import read
from pgolf_jax.report.statistics import ratio
from pgolf_jax.runtime.distributed import data_mesh
from pgolf_jax.runtime.files import read_sealed, seal, write_json
from pgolf_jax.scoring import plain
from pgolf_jax.settings.load import changed, to_dict

LENGTHS = [40, 9, 75, 41, 22, 60]
CHANGES = {
  "train.seq_len": 48,
  "quantize.fp16_up_to": 1100,  # the MLP and the embedding are larger
  "quantize.calibration_batches": 2,
  "quantize.awq_group_size": 16,
  "quantize.lqer": False,
  "ttt.method": "cached",
}


@pytest.fixture(autouse=True, scope="module")
def on_one_device():
  """Random weights stand for the average of a run, on one device."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(quantize.stages, "averaged_params", lambda run, mesh: random_params())
    patch.setattr(quantize, "run_mesh", lambda settings: data_mesh(jax.devices()[:1]))
    yield


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  """Settings of the run, whose data are random documents."""
  data, documents = tmp_path_factory.mktemp("data"), random_documents(LENGTHS)
  for split, values in zip(("train", "val", "val_bytes"), (documents.tokens, *documents), strict=True):
    write_shard(shard_path(data, split, 0), values)
  return changed(SETTINGS, {"data.path": str(data), **CHANGES})


@pytest.fixture(scope="module")
def measured(tmp_path_factory, settings):
  """A folder with a run that says it is trained, and the figures of two rates."""
  folder = tmp_path_factory.mktemp("measured")
  (folder / "run").mkdir()
  (folder / "run" / "config.toml").write_text(tomli_w.dumps(to_dict(settings)))
  write_json(folder / "run" / "results.json", {"train": seal({"steps": 1})})
  bench(folder, "--methods", "gptq", "--rates", "1", "4")
  return folder


@pytest.fixture
def copied(measured, tmp_path):
  """A copy of that folder."""
  return shutil.copytree(measured, tmp_path / "copied")


def bench(folder, *options: str) -> None:
  words = ["bench", "quantize", str(folder / "run"), "--json", str(folder / "figures.json"), *options]
  assert main([*words, "--debug"]) == 0


def test_figures_are_those_of_the_artifacts(measured, settings):
  record = read_sealed(measured / "figures.json")
  assert list(record["rows"]) == ["gptq × 1", "gptq × 4"]
  fine, coarse = record["rows"].values()
  assert fine["bytes"] > coarse["bytes"] and 0 < fine["kl"] < coarse["kl"]

  config = changed(settings, coarse["settings"]).quantize
  assert config == make.scaled(settings.quantize, 4)
  mesh, folder = data_mesh(jax.devices()[:1]), Path(settings.data.path)
  data = load_validation(folder)
  artifact = read(make.make(changed(settings, coarse["settings"]), random_params(), folder).data)
  difference_N = plain.losses(settings, artifact.params(), data, mesh) - plain.losses(
    settings, random_params(), data, mesh
  ).astype(np.float64)
  assert len(coarse["plain"]) == len(LENGTHS)
  assert sum(coarse["plain"]) == pytest.approx(difference_N.sum(), rel=1e-9)
  assert coarse["plain"][0] == pytest.approx(difference_N[: LENGTHS[0]].sum(), rel=1e-9)
  assert coarse["bytes"] == sum(artifact.stream_bytes.values())


def test_divergence_by_its_definition(settings, programs_of_users):
  params = random_params()
  other = {name: value if name in SOFTCAPS else value * np.float32(1.1) for name, value in params.items()}
  rows_BxT = random_documents(LENGTHS).tokens[:144].reshape(3, 48)

  def logits(params):
    context = packed(jnp.asarray(rows_BxT), bos_id=settings.model.bos_id, seq_len=48, looping=True, dtype=jnp.float32)
    model = bind(settings.model, params)
    return model.evaluation_logits(model(jnp.asarray(rows_BxT), context).hidden)

  z, z_other = (np.asarray(jax.jit(logits)(p), np.float64) for p in (params, other))
  p, q = (np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True) for x in (z, z_other))
  mesh = data_mesh(jax.devices()[:2])  # the last row is alone
  expected = np.sum(p * np.log(p / q), axis=-1).mean()
  assert plain.divergence(settings, params, other, rows_BxT, mesh) == pytest.approx(expected, rel=1e-4)
  assert plain.divergence(settings, params, params, rows_BxT, mesh) == pytest.approx(0, abs=1e-9)


def test_finished_rows_are_not_measured_again(copied, capsys, monkeypatch):
  monkeypatch.setattr(quantize.make, "Maker", None)  # cannot be called
  before = read_sealed(copied / "figures.json")
  bench(copied, "--methods", "gptq", "--rates", "1", "4")
  assert read_sealed(copied / "figures.json") == before
  row = before["rows"]["gptq × 4"]
  bytes_n = np.add.reduceat(random_documents(LENGTHS).token_bytes[1:], np.cumsum([0, *LENGTHS[:-1]]))
  loss = ratio(np.array(row["plain"]) / math.log(2), bytes_n)
  cells = [f"{row['bytes']:,}", f"{row['kl']:.5f}", f"{loss.value:+.5f}", f"{loss.error:.5f}", f"{loss.p:.1g}"]
  assert capsys.readouterr().out.splitlines()[-1].split()[-5:] == cells


def test_scores_of_the_float_weights_must_repeat(copied):
  record = read_sealed(copied / "figures.json")
  record["float"]["sample"][2] += 1e-6
  write_json(copied / "figures.json", seal(record))
  with pytest.raises(UserError, match="scores the float weights otherwise"):
    bench(copied, "--rates", "1")


def test_figures_of_other_targets_are_refused(copied):
  with pytest.raises(UserError, match="targets differs"):
    bench(copied, "--rates", "1", "--targets", "100")


def test_two_methods_side_by_side(copied, capsys, monkeypatch):
  monkeypatch.setattr(quantize.make, "Maker", None)
  record = read_sealed(copied / "figures.json")
  loss = np.abs(record["rows"]["gptq × 4"]["plain"])
  for rate, size, share in (("bytes of × 1", 10_000, 0.5), ("bytes of × 4", 5_000, 2.0)):
    row = {**record["rows"]["gptq × 4"], "method": "rate", "rate": rate, "bytes": size}
    record["rows"][f"rate {rate}"] = row | {"plain": (share * loss).tolist()}
  record["rows"]["gptq × 1"] |= {"plain": loss.tolist(), "bytes": 10_000}
  record["rows"]["gptq × 4"] |= {"plain": (2 * loss).tolist(), "bytes": 6_000}
  write_json(copied / "figures.json", seal(record))
  bench(copied, "--rates", "1", "4")
  lines = [line.split() for line in capsys.readouterr().out.splitlines()]
  # The loss falls by half in 2,500 bytes: one is reached at 7,500, two at 5,000, and 6,000 have 2 / 2^0.4.
  assert ["×", "1", "0.500", "0.750"] in lines
  assert ["×", "4", f"{2**-0.4:.3f}", f"{5 / 6:.3f}"] in lines


@pytest.mark.slow
def test_every_kind_of_row(copied, settings, monkeypatch):
  monkeypatch.setattr(quantize, "TUNING_TOKENS", 96)
  monkeypatch.setattr(quantize, "TUNING_FACTORS", (1.5,))
  monkeypatch.setattr(quantize, "_CLIPS", ("embed_clip_sigmas",))
  bench(copied, "--rates", "4", "--factors", "0.5", "--tune", "--ttt", "--ttt-docs", "3")
  bench(copied, "--methods", "gptq", "--rates", "4", "--quantize.damping", "0.02")
  record = read_sealed(copied / "figures.json")
  names = ["gptq × 1", "gptq × 4", "gptq tuned", "rate bytes of × 4", "rate × 0.5", "gptq × 4 damping=0.02"]
  assert list(record["rows"]) == names
  first, coarse, tuned, same_bytes, fine, damped = record["rows"].values()
  assert damped["given"] == "damping=0.02" and damped["sha256"] != coarse["sha256"]
  assert 0.99 * first["bytes"] < tuned["bytes"] <= first["bytes"]
  assert 0.99 * coarse["bytes"] < same_bytes["bytes"] <= coarse["bytes"]
  assert same_bytes["kl"] < 0.5 * coarse["kl"]
  assert fine["settings"] == {"quantize.method": "rate", "quantize.step": 0.5 * settings.quantize.step}
  assert "ttt" not in first and all(len(row["ttt"]) == 3 for row in (coarse, tuned, same_bytes, fine))
  scorer = quantize.Scorer(settings, load_validation(settings.data.path), data_mesh(jax.devices()[:1]), ttt_docs=3)
  assert scorer.ttt(random_params()) == record["float"]["ttt"]
