"""The hardware of a trace, and the peaks of chips."""

import json

import jax
import jax.numpy as jnp
import pytest

from pgolf_jax.bench.gpu_day_kernels import tunable
from pgolf_jax.errors import UserError
from pgolf_jax.kernels import hardware, softcapped_xent


def test_target_is_the_described_device_then_the_default_device_then_the_first(pretend_hopper, pretend_tpu):
  assert hardware.target().platform == "cpu" and not hardware.target().is_hopper
  with jax.default_device(jax.devices()[1]):
    assert hardware.target() == hardware.target()._replace(platform="cpu")
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
    ("NVIDIA B200", 8.0e12),
  ],
)
def test_a_card_has_no_other_cards_peaks(kind, bytes_per_s):
  limits = hardware.peaks(kind)
  assert (limits and limits.bytes_per_s) == bytes_per_s


@pytest.mark.parametrize(("flops", "num_bytes", "seconds"), [(989e12, 1, 1.0), (1, 3.35e12, 1.0)])
def test_floor_is_the_longer_of_the_two_times(flops, num_bytes, seconds):
  assert hardware.peaks("H100").floor_s(flops, num_bytes) == pytest.approx(seconds)


@pytest.fixture
def table(tmp_path, monkeypatch):
  """table(entries by kind) → the file that kernels then read their block sizes from."""
  hardware._table.cache_clear()
  path = tmp_path / "tuned.json"
  monkeypatch.setenv("PGOLF_TUNED", str(path))

  def write(content: dict) -> None:
    path.write_text(json.dumps(content))

  yield write
  hardware._table.cache_clear()


def test_block_sizes_are_those_of_the_table_for_this_kind_of_device(table, pretend_tpu):
  entry = {"sizes": {"rows": 128, "columns": 7}, "ms": 1.0, "p90": 1.1}
  table({"TPU v5 lite": {"xent": {"V=256": entry}}})
  with pretend_tpu():
    assert hardware.block_sizes("xent", "V=256", rows=256) == {"rows": 128}, "a name that the kernel has not is ignored"
    assert hardware.block_sizes("xent", "V=512", rows=256) == {"rows": 256}
    with hardware.trying("xent", rows=64) as classes:
      assert hardware.block_sizes("xent", "V=256", rows=256) == {"rows": 64}
      assert hardware.block_sizes("mlp", "all", rows=256) == {"rows": 256}
    assert classes == {"V=256"}
  assert hardware.block_sizes("xent", "V=256", rows=256) == {"rows": 256}, "another kind of device"


def test_a_damaged_table_is_named(table, tmp_path):
  (tmp_path / "tuned.json").write_text("{")
  with pytest.raises(UserError, match=r"tuned\.json is not a table of tuned block sizes"):
    hardware.block_sizes("xent", "V=256", rows=256)


def test_kernels_take_the_sizes_that_are_tried(interpret_tpu):
  choices = tunable("softcapped_xent", "mosaic_tpu")
  assert choices["softcapped_xent"]["rows"][0] == 256 and tunable("polar_express", "xla") == {}
  z = jax.random.normal(jax.random.key(0), (160, 128), jnp.bfloat16)
  f = jax.jit(lambda z: softcapped_xent.softcapped_xent(z, jnp.zeros(160, jnp.int32), cap_pos=30.0, cap_neg=30.0))
  with interpret_tpu():
    usual = jax.block_until_ready(f(z))
    with hardware.trying("softcapped_xent", rows=32) as classes:
      tried = jax.block_until_ready(f(z))
      assert "32,128" in str(jax.make_jaxpr(f)(z)).replace(" ", "")
  assert classes == {"V=128 bfloat16"}
  assert jnp.array_equal(usual, tried)
