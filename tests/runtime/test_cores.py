"""On CPUs the bits of a result depend on the number of threads, and that is fixed whatever the number of cores."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import hashlib, sys
from pgolf_jax.runtime import jax_setup
if sys.argv[1] == "fixed":
  jax_setup.set_xla_options()
import jax, jax.numpy as jnp, numpy as np
rng = np.random.default_rng(0)
x, w = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2048, 128), (128, 512)))
gradient = jax.jit(jax.grad(lambda w: jnp.mean(jnp.square(jax.nn.relu(x @ w)))))(w)
print(hashlib.sha256(np.asarray(gradient).tobytes()).hexdigest())
"""


def bits(kind: str, cores: set[int]) -> str:
  environ = {k: v for k, v in os.environ.items() if k not in ("PJRT_NPROC", "NPROC", "XLA_FLAGS")}
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, kind],
    env={**environ, "JAX_PLATFORMS": "cpu"},
    preexec_fn=lambda: os.sched_setaffinity(0, cores),
    capture_output=True,
    text=True,
    check=True,
  )
  return done.stdout


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot take cores from a process")
def test_one_core_gives_the_bits_of_two():
  cores = sorted(os.sched_getaffinity(0))
  if len(cores) < 2:
    pytest.skip("one core alone")
  one, two = set(cores[:1]), set(cores[:2])
  if bits("as it comes", one) == bits("as it comes", two):
    pytest.skip("here XLA gives the same bits by itself")
  assert bits("fixed", one) == bits("fixed", two)
