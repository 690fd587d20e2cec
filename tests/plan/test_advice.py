"""The sentence before a run on hardware that cannot do it."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from pgolf_jax.plan import advice
from pgolf_jax.plan.advice import Device
from pgolf_jax.settings import Settings, builtin
from pgolf_jax.settings.load import from_toml

CPU = Mesh(np.array(jax.devices()[:1]), ("data",))
GB = 10**9
RECORD, DEMO = "record_1xgpu", "demo"


@pytest.mark.parametrize(
  ("config", "device", "words"),
  [
    (RECORD, None, ["378 TFLOP", "CPU cores", "`pgolf run demo`"]),
    (DEMO, None, None),
    (RECORD, Device("gpu", "Tesla T4", 16 * GB, 1), ["no units for bfloat16", "`pgolf run gpu_16gb`", "float32"]),
    ("gpu_16gb", Device("gpu", "Tesla T4", 16 * GB, 1), None),
    (
      RECORD,
      Device("gpu", "NVIDIA GeForce RTX 4090", 24 * GB, 1),
      ["GiB of memory or more", "has 22", "`pgolf run gpu_24gb`"],
    ),
    ("gpu_24gb", Device("gpu", "NVIDIA GeForce RTX 4090", 24 * GB, 1), None),
    (RECORD, Device("gpu", "NVIDIA H200", 141 * GB, 1), None),
    (RECORD, Device("tpu", "TPU v5 lite", 16 * 2**30, 1), ["has 16", "`pgolf run v5e_1`"]),
    ("v5e_1", Device("tpu", "TPU v5 lite", 16 * 2**30, 1), None),
    (RECORD, Device("gpu", "an unknown card", None, 1), None),
  ],
)
def test_the_sentence_names_what_is_missing_and_the_config_to_take(config, device, words, monkeypatch):
  settings: Settings = from_toml(builtin.find(config))
  monkeypatch.setattr(advice.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
  if device is not None:
    monkeypatch.setattr(Device, "of", lambda mesh: device)
  said = advice.warning(settings, CPU)
  if words is None:
    assert said is None
  else:
    assert all(word in said for word in words), said
    assert said.endswith(".") and "\n" not in said


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
