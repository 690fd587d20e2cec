import dataclasses

import jax
import pytest

from pgolf_jax import stages
from pgolf_jax.settings import Settings


@pytest.mark.parametrize("micro_batches, devices", [(1, 1), (6, 6), (8, 8), (12, 6), (7, 7)])
def test_a_run_takes_as_many_devices_as_can_share_a_step(micro_batches, devices):
  assert jax.device_count() == 8
  settings = Settings()
  settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, micro_batches=micro_batches))
  assert len(stages.usable_devices(settings)) == devices
