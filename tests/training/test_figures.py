"""The figures of a step: MFU by its formula, learning rates as the step has them, names of curves."""

from types import SimpleNamespace

import numpy as np
import pytest
from test_resume import SETTINGS

from pgolf_jax.settings import Settings
from pgolf_jax.training import StepPlan
from pgolf_jax.training.figures import curves, learning_rates, mfu, peak_memory, speed

PLAN = StepPlan(0.5, 3072, True, 0.25, 0.95, False)


def mesh(kind: str, count: int):
  device = SimpleNamespace(device_kind=kind, memory_stats=lambda: {"peak_bytes_in_use": 3 * 2**30})
  return SimpleNamespace(devices=np.array([device] * count), size=count, local_devices=[device])


def test_mfu_is_the_models_operations_over_the_peak_of_all_devices():
  # 17 layer passes of the record's looped model: 2·(2·512² + 2·512·256 + 2·512·2048) a token, attention, 8192 logits.
  token = 2 * 17 * (2 * 512**2 + 2 * 512 * 256 + 2 * 512 * 2048) + 2 * 8192 * 512 + 4 * 17 * 512 * 3073 / 2
  expected = 3 * 786432 * token / 0.1 / (8 * 989e12)
  assert mfu(Settings(), mesh("NVIDIA H100 80GB HBM3", 8), PLAN, 0.1) == pytest.approx(expected, rel=1e-12)
  assert 0.1 < expected < 1
  assert mfu(Settings(), mesh("cpu", 8), PLAN, 0.1) is None


def test_speed_leaves_out_what_the_device_does_not_tell():
  assert set(speed(SETTINGS, mesh("cpu", 1), PLAN, 0.5)) == {"tokens_per_second", "peak_memory_bytes"}
  assert speed(SETTINGS, mesh("TPU v5e", 1), PLAN, 0.5)["tokens_per_second"] == 1024
  silent = mesh("cpu", 1)
  silent.local_devices[0].memory_stats = lambda: None
  assert 2**24 < peak_memory(silent) < 2**40  # of this process


def test_curves_are_grouped_and_keep_every_figure_but_the_step():
  line = {"step": 7, "loss": 2.5, "peak_memory_bytes": 3 * 2**30, "val_bpb": 1.25, **learning_rates(Settings(), 0.5)}
  assert curves(line) == {
    "loss": 2.5, "peak_memory_gib": 3.0, "bpb/validation": 1.25,
    "lr/matrix": 0.013, "lr/embed": 0.015, "lr/scalar": 0.01,
  }  # fmt: skip
