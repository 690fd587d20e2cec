"""The hardware of a trace, and the peaks of chips."""

import jax
import pytest

from pgolf_jax.kernels import hardware


def test_target_is_the_described_device_then_the_default_device_then_the_first(
  pretend_hopper, pretend_tpu, monkeypatch
):
  assert hardware.target().platform == "cpu" and not hardware.target().is_hopper
  with jax.default_device(jax.devices()[1]):
    monkeypatch.setattr(type(jax.devices()[0]), "device_kind", property(lambda device: f"chip {device.id}"))
    assert hardware.target().kind == "chip 1"
    with pretend_hopper(cores=7):
      assert hardware.target() == hardware.Target("gpu", "NVIDIA H100 80GB HBM3", 7)
      assert hardware.target().is_gpu and hardware.target().is_hopper
  with pretend_tpu():
    assert hardware.target() == hardware.Target("tpu", "TPU v5 lite", 1)


@pytest.mark.parametrize(
  ("platform", "kind", "is_hopper"),
  [
    ("cuda", "NVIDIA H200", True),
    ("gpu", "NVIDIA GH200 480GB", True),
    ("gpu", "NVIDIA A100-SXM4-80GB", False),
    ("tpu", "H100", False),
  ],
)
def test_hopper_gpus_are_known_by_name(platform, kind, is_hopper):
  assert hardware.Target(platform, kind, 1).is_hopper == is_hopper


def test_peaks_are_those_of_the_longest_name_that_fits():
  assert hardware.peaks("NVIDIA H100 80GB HBM3").bytes_per_s == 3.35e12
  assert hardware.peaks("NVIDIA H100 PCIe").flops_per_s == 756e12
  assert hardware.peaks("TPU v5 lite").flops_per_s == 197e12
  assert hardware.peaks("cpu") is None


@pytest.mark.parametrize(
  ("kind", "bytes_per_s"),
  [
    ("Tesla T4", 0.3e12),
    ("NVIDIA L4", 0.3e12),
    ("NVIDIA L40S", None),
    ("NVIDIA A10", None),
    ("NVIDIA A10G", 0.6e12),
    ("NVIDIA A100-SXM4-40GB", 1.555e12),
    ("NVIDIA A100-SXM4-80GB", 2.039e12),
    ("NVIDIA GeForce RTX 3090", 0.936e12),
    ("NVIDIA GeForce RTX 3090 Ti", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA GH200 480GB", 4.0e12),
    ("NVIDIA H200", 4.8e12),
    ("NVIDIA H100 NVL", 3.9e12),
    ("NVIDIA B200", 8.0e12),
  ],
)
def test_a_card_has_no_other_cards_peaks(kind, bytes_per_s):
  limits = hardware.peaks(kind)
  assert (limits and limits.bytes_per_s) == bytes_per_s


@pytest.mark.parametrize(("flops", "num_bytes", "seconds"), [(989e12, 1, 1.0), (1, 3.35e12, 1.0)])
def test_floor_is_the_longer_of_the_two_times(flops, num_bytes, seconds):
  assert hardware.peaks("H100").floor_s(flops, num_bytes) == pytest.approx(seconds)
