"""The sentence before a run on hardware that cannot do it."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from pgolf_jax.cli import main
from pgolf_jax.plan import advice
from pgolf_jax.plan.advice import Device
from pgolf_jax.settings import builtin
from pgolf_jax.settings.load import changed, from_toml

CPU = Mesh(np.array(jax.devices()[:1]), ("data",))
GB = 10**9
RECORD, DEMO = "record_1xgpu", "demo"


T4, RTX4090 = Device("gpu", "Tesla T4", 16 * GB, 1), Device("gpu", "NVIDIA GeForce RTX 4090", 24 * GB, 1)
V5E = Device("tpu", "TPU v5 lite", 16 * 2**30, 1)


@pytest.mark.parametrize(
  ("config", "device", "gib", "words"),
  [
    (RECORD, None, 0, ["378 TFLOP", "2 CPU cores", "take `pgolf run demo`"]),
    (DEMO, None, 0, None),
    (RECORD, T4, 35, ["no units for bfloat16", "take `pgolf run gpu_16gb`", "float32"]),
    ("gpu_16gb", T4, 5, None),
    (RECORD, RTX4090, 57, ["GiB of memory or more", "has 22", "take `pgolf run gpu_24gb`"]),
    (RECORD, RTX4090, 30, None),
    (RECORD, Device("gpu", "NVIDIA H200", 141 * GB, 1), 36, None),
    (RECORD, V5E, 36, ["58 GiB", "has 16", "take `pgolf run v5e_1`"]),
    ("v5e_1", V5E, 5, None),
    (RECORD, Device("gpu", "an unknown card", None, 1), 36, None),
  ],
)
def test_the_sentence_names_what_is_missing_and_the_config_to_take(config, device, gib, words, monkeypatch):
  monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
  monkeypatch.setattr(advice, "_step_bytes", lambda settings, mesh: gib * 2**30)
  if device is not None:
    monkeypatch.setattr(Device, "of", lambda mesh: device)
  said = advice.warning(from_toml(builtin.find(config)), CPU)
  if words is None:
    assert said is None
  else:
    assert all(word in said for word in words), said
    assert said.endswith(".") and "\n" not in said


def test_the_memory_is_that_of_the_last_train_step():
  settings = changed(from_toml(builtin.find(DEMO)), {"train.batch_tokens": 8192})
  small, large = (advice._step_bytes(s, CPU) for s in (from_toml(builtin.find(DEMO)), settings))
  assert 2 * small < large < 5 * small


def test_a_run_says_it_before_it_starts(tmp_path, capsys):
  assert main(["run", RECORD, "--out", str(tmp_path / "run"), "--data.path", str(tmp_path)]) == 1
  printed = capsys.readouterr()
  assert "take `pgolf run demo` instead" in printed.out + printed.err


@pytest.mark.parametrize(
  ("device", "name"),
  [
    (Device("cpu", "cpu", None, 1), "demo"),
    (Device("gpu", "Tesla T4", 16 * GB, 4), "gpu_16gb"),
    (Device("gpu", "NVIDIA GeForce RTX 3090", 24 * GB, 1), "gpu_24gb"),
    (Device("gpu", "NVIDIA A100-SXM4-40GB", 40 * GB, 8), "gpu_24gb"),
    (Device("gpu", "NVIDIA H100 80GB HBM3", 80 * GB, 1), "record_1xgpu"),
    (Device("gpu", "NVIDIA H200", 141 * GB, 8), "record_8xh100"),
    (Device("tpu", "TPU v5 lite", 16 * GB, 1), "v5e_1"),
    (Device("tpu", "TPU v5 lite", 16 * GB, 8), "v5e_8"),
  ],
)
def test_a_config_that_exists_fits_each_hardware(device, name):
  assert advice.fitting(device) == name and name in builtin.names()
