"""Processes that tests start."""

import os


def environment(devices: int = 1, **more: str) -> dict[str, str]:
  """The environment of a process with so many virtual devices, which compiles as fast as the test that starts it."""
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"  # the last of a flag counts
  return os.environ | {"XLA_FLAGS": flags} | more
