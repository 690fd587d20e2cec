import jax
import pytest

from pgolf_jax.runtime.distributed import usable_devices


@pytest.mark.parametrize("micro_batches, devices", [(1, 1), (6, 6), (8, 8), (12, 6), (7, 7)])
def test_a_run_takes_as_many_devices_as_can_share_a_step(micro_batches, devices):
  assert jax.device_count() == 8
  assert len(usable_devices(micro_batches)) == devices
