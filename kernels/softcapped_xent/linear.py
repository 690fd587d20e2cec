"""A loss on the head's logits in blocks of tokens, so that the logits of all tokens never exist at once."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pgolf_jax.kernels import hardware
from pgolf_jax.kernels.softcapped_xent.vjp import zero_gradient

_BLOCK_LOGITS = 2**25
"""Logits in a block: 4096 tokens of 8192."""
_GPU_BLOCK_LOGITS = 2**28
"""Logits in a block on GPUs: 32,768 tokens of 8192. With 64 tokens to a thread block they give each of an H100's 132
multiprocessors four thread blocks, which hide each other's latencies; 4096 would leave half of them without work."""


def block_count(tokens: int, vocabulary: int) -> int:
  """Returns the number of blocks into which the hardware of the current trace divides so many tokens."""
  logits = _GPU_BLOCK_LOGITS if hardware.target().is_gpu else _BLOCK_LOGITS
  return -(-tokens // max(1, logits // vocabulary))


def block_size(tokens: int, vocabulary: int) -> int:
  """Returns the number of tokens in each of these blocks, padding included."""
  return -(-tokens // block_count(tokens, vocabulary))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_blocks(
  block_loss: Callable[..., jax.Array],
  blocks: int,
  x_NxD: jax.Array,
  weight_VxD: jax.Array,
  target_N: jax.Array,
  cap_pos: jax.Array,
  cap_neg: jax.Array,
) -> jax.Array:
  """Computes `block_loss(x, weight, target, cap_pos, cap_neg)`, one loss a token, over `blocks` blocks of tokens.

  The gradient goes through `block_loss` again block by block and sums the weight's in float32. The last
  block is padded with zero tokens whose losses are dropped.
  """
  return _forward(block_loss, blocks, x_NxD, weight_VxD, target_N, cap_pos, cap_neg)[0]


def _split(blocks: int, a_N: jax.Array) -> jax.Array:
  size = -(-a_N.shape[0] // blocks)
  padding = [(0, blocks * size - a_N.shape[0])] + [(0, 0)] * (a_N.ndim - 1)
  return jnp.pad(a_N, padding).reshape(blocks, size, *a_N.shape[1:])


def _join(a_BxN: jax.Array, n: int) -> jax.Array:
  return a_BxN.reshape(-1, *a_BxN.shape[2:])[:n]


def _forward(block_loss, blocks, x_NxD, weight_VxD, target_N, cap_pos, cap_neg):
  loss = jax.lax.map(
    lambda block: block_loss(block[0], weight_VxD, block[1], cap_pos, cap_neg),
    (_split(blocks, x_NxD), _split(blocks, target_N)),
  )
  return _join(loss, x_NxD.shape[0]), (x_NxD, weight_VxD, target_N, cap_pos, cap_neg)


def _backward(block_loss, blocks, residuals, d_loss_N):
  x_NxD, weight_VxD, target_N, cap_pos, cap_neg = residuals

  def step(d_weight_VxD, block):
    x, target, d_loss = block
    _, pull = jax.vjp(lambda x, weight: block_loss(x, weight, target, cap_pos, cap_neg), x, weight_VxD)
    dx, d_weight = pull(d_loss)
    return d_weight_VxD + d_weight.astype(jnp.float32), dx

  start = jnp.zeros(weight_VxD.shape, jnp.float32)
  inputs = tuple(_split(blocks, a_N) for a_N in (x_NxD, target_N, d_loss_N))
  d_weight_VxD, dx = jax.lax.scan(step, start, inputs)
  no_gradients = zero_gradient(target_N), jnp.zeros_like(cap_pos), jnp.zeros_like(cap_neg)
  return _join(dx, x_NxD.shape[0]), d_weight_VxD.astype(weight_VxD.dtype), *no_gradients


in_blocks.defvjp(_forward, _backward)
