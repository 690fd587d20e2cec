import time

import jax
import jax.numpy as jnp

from pgolf_jax.runtime.clock import Clock


def test_a_clock_counts_only_while_it_runs():
  clock = Clock(seconds=10.0)
  time.sleep(0.02)
  assert clock.seconds == 10.0
  clock.start()
  time.sleep(0.02)
  with clock.stopped():
    stood = clock.seconds
    time.sleep(0.05)
    assert clock.seconds == stood >= 10.02
  clock.stop()
  assert stood <= clock.seconds < stood + 0.04


def test_compilations_inside_the_clock_are_counted():
  clock = Clock()
  clock.start()
  jax.jit(lambda x: x * 3.25 + 1).lower(jnp.ones(3)).compile()
  clock.stop()
  inside = clock.compilations
  assert inside >= 1
  jax.jit(lambda x: x * 4.25 + 2).lower(jnp.ones(3)).compile()
  clock.start()
  clock.stop()
  assert clock.compilations == inside
