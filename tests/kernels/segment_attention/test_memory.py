"""A whole micro-batch of the record, 98,304 tokens in one row, goes through attention without a T×T mask."""

import os
import subprocess
import sys

PROGRAM = """
import resource
import jax, jax.numpy as jnp
from pgolf_jax.kernels.segment_attention.api import segment_attention, segment_starts

T, H, K, C, seq_len = 98_304, 8, 4, 64, 3072
keys = jax.random.split(jax.random.key(0), 3)
q, k, v = (jax.random.normal(key, (1, T, heads, C)) for key, heads in zip(keys, (H, K, K)))
start = segment_starts(jnp.full((1, T), 7), bos_id=1, seq_len=seq_len)
loss = lambda q, k, v: (segment_attention(q, k, v, start, max_segment=seq_len) ** 2).sum()
gradients = jax.block_until_ready(jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v))
assert all(jnp.isfinite(g).all() and g.any() for g in gradients)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_a_row_of_98304_tokens_takes_less_than_6_gb():
  found = subprocess.run(
    [sys.executable, "-c", PROGRAM], env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, check=True
  )
  assert int(found.stdout) < 6e9
