"""A loss on the head's logits in blocks of tokens, so that the logits of all tokens never exist at once."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pgolf_jax.kernels import target

_BLOCK_LOGITS = 2**25
"""Logits per block: 4096 tokens of 8192."""
_GPU_BLOCK_LOGITS = 2**28
"""The same on GPUs, where 4096 tokens, 64 to a thread block, would leave half of an H100's 132 multiprocessors without
work and the rest with one thread block, which has no other to hide its latencies behind. 32,768 give each four."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def in_blocks(
  block_loss: Callable[..., jax.Array],
  x_NxD: jax.Array,
  weight_VxD: jax.Array,
  target_N: jax.Array,
  cap_pos: jax.Array,
  cap_neg: jax.Array,
) -> jax.Array:
  """`block_loss(x, weight, target, cap_pos, cap_neg)` over blocks of tokens, one loss a token.

  The gradient goes through `block_loss` again block by block and adds up the weight's in float32. The last
  block is padded with zero tokens whose losses are dropped.
  """
  return _forward(block_loss, x_NxD, weight_VxD, target_N, cap_pos, cap_neg)[0]


def _blocks(n: int, v: int) -> int:
  logits = _GPU_BLOCK_LOGITS if target.target().platform in ("gpu", "cuda") else _BLOCK_LOGITS
  return -(-n // max(1, logits // v))


def _split(blocks: int, a_N: jax.Array) -> jax.Array:
  size = -(-a_N.shape[0] // blocks)
  padding = [(0, blocks * size - a_N.shape[0])] + [(0, 0)] * (a_N.ndim - 1)
  return jnp.pad(a_N, padding).reshape(blocks, size, *a_N.shape[1:])


def _join(a_BxN: jax.Array, n: int) -> jax.Array:
  return a_BxN.reshape(-1, *a_BxN.shape[2:])[:n]


def _forward(block_loss, x_NxD, weight_VxD, target_N, cap_pos, cap_neg):
  split = partial(_split, _blocks(x_NxD.shape[0], weight_VxD.shape[0]))
  loss = jax.lax.map(
    lambda block: block_loss(block[0], weight_VxD, block[1], cap_pos, cap_neg),
    (split(x_NxD), split(target_N)),
  )
  return _join(loss, x_NxD.shape[0]), (x_NxD, weight_VxD, target_N, cap_pos, cap_neg)


def _backward(block_loss, kept, d_loss_N):
  x_NxD, weight_VxD, target_N, cap_pos, cap_neg = kept
  split = partial(_split, _blocks(x_NxD.shape[0], weight_VxD.shape[0]))

  def step(d_weight_VxD, block):
    x, target, d_loss = block
    _, pull = jax.vjp(lambda x, weight: block_loss(x, weight, target, cap_pos, cap_neg), x, weight_VxD)
    dx, d_weight = pull(d_loss)
    return d_weight_VxD + d_weight.astype(jnp.float32), dx

  start = jnp.zeros(weight_VxD.shape, jnp.float32)
  d_weight_VxD, dx = jax.lax.scan(step, start, (split(x_NxD), split(target_N), split(d_loss_N)))
  no_gradient = np.zeros(target_N.shape, jax.dtypes.float0)
  d_weight_VxD = d_weight_VxD.astype(weight_VxD.dtype)
  return (
    _join(dx, x_NxD.shape[0]),
    d_weight_VxD,
    no_gradient,
    jnp.zeros_like(cap_pos),
    jnp.zeros_like(cap_neg),
  )


in_blocks.defvjp(_forward, _backward)
